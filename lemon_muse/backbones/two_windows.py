"""One ViT that sees a nucleus twice: its close window at full resolution, and the wide one around.

The middle of the window is cut at full resolution, the whole of it is averaged down to the same
side. Both become tokens by the same patch projection and the same positions; a learnt summand says
which of the two a token is from. All tokens and one class token go through the blocks together, so
that what the nucleus is and where it lies meet in every layer. Close and wide windows of a cell
side by side are in NuClass (arXiv 2511.13586), there as two networks and a gate.
"""

from typing import Any

import torch
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from lemon_muse.errors import UserError

ARCHITECTURE = "two_windows"
SCALES = 2  # the middle, and the whole


class TwoWindows(nn.Module):
    """float [B, 3, window, window] -> [B, num_features].

    Args:
        vit: a timm ViT without classifier for windows of `inner` px.
        inner: side of the middle that is seen at full resolution, px.
        window: side of the whole, px: a multiple of `inner`, with the middle on whole pixels.

    Raises:
        UserError: another network, or sides that do not fit.
    """

    def __init__(self, vit: nn.Module, *, inner: int, window: int) -> None:
        super().__init__()
        if type(vit) is not VisionTransformer:
            raise UserError(
                f"backbone.inner={inner} needs a plain ViT, and {type(vit).__name__} is none; use "
                f"backbone.name=vit_tiny, vit_small or vit_base."
            )
        self.factor = check_sides(inner, window)
        self.vit: Any = vit
        self.inner, self.window = inner, window
        self.num_features = int(vit.num_features)
        self.global_pool = vit.global_pool
        self.scale = nn.Parameter(torch.empty(SCALES, 1, int(vit.embed_dim)))
        nn.init.trunc_normal_(self.scale, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vit.forward_head(self.forward_features(images))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """All last tokens, normed: float [B, prefix + 2 * patches, D], the middle's first."""
        vit = self.vit
        prefix = int(vit.num_prefix_tokens)
        parts: list[torch.Tensor] = []
        for window, scale in zip(self.windows(images), self.scale, strict=True):
            tokens = vit._pos_embed(vit.patch_embed(window))
            if not parts:
                parts.append(tokens[:, :prefix])
            parts.append(tokens[:, prefix:] + scale)
        return vit.norm(vit.blocks(vit.norm_pre(vit.patch_drop(torch.cat(parts, 1)))))

    def windows(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The middle as it is, and the whole averaged: float [B, 3, inner, inner] each."""
        start = (self.window - self.inner) // 2
        at = slice(start, start + self.inner)
        return images[..., at, at], F.avg_pool2d(images, self.factor)


def check_sides(inner: int, window: int) -> int:
    """How many times the window is as wide as its middle.

    Raises:
        UserError: no whole number above 1, or no middle on whole pixels.
    """
    factor = window // inner
    if factor < 2 or window % inner or (window - inner) % 2:
        even = "" if inner % 2 == 0 else " (odd multiples, for an odd middle)"
        raise UserError(
            f"window={window} px is not a multiple of backbone.inner={inner} px{even}; use "
            f"window={inner * (2 if inner % 2 == 0 else 3)}, for example."
        )
    return factor
