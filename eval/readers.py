"""Modules that read an encoder another way than its own: tokens, class token, resized windows.

`Tokens` keeps the contract of `eval.dense` (`nuclei`); the others that of `eval.features`: mean,
std, image_size and mpp of what they are given, and `forward` to one feature a window.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

from lemon_muse.backbones.sampling import sample
from lemon_muse.dense import DenseEncoder
from lemon_muse.errors import UserError


class Tokens(nn.Module):
    """Patch tokens of a ViT, read at nuclei; keeps the contract of `eval.dense`.

    A ViT whose positions were learnt for another window gets its position table resampled once, by
    timm's `set_input_size` (bicubic, antialiased); of a MUSE encoder the last map of the encoder is
    read, and its positions are resampled as in training. An encoder that is not ours may say by
    `patch_tokens` how its tokens are made.
    """

    def __init__(self, encoder: Any, window: int, align: str) -> None:
        super().__init__()
        self.mean, self.std, self.align, self.name = encoder.mean, encoder.std, align, encoder.name
        self.dense = isinstance(encoder, DenseEncoder)
        self.made = getattr(encoder, "patch_tokens", None)
        if self.dense:
            self.network = encoder
        else:
            self.network = encoder.network if self.made else vit_for(encoder, window)

    def nuclei(
        self, images: torch.Tensor, points: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        """float [B, 3, H, W], [n, 2] px, int64 [n] -> float [n, dim]."""
        network: Any = self.network
        if self.dense:
            return network.tokens(images, points, owner)
        size = (images.shape[-2], images.shape[-1])
        if self.made:
            tokens = self.made(network, images)
            grid = self._square(tokens, images)
        else:
            tokens = normed_tokens(network, images)[:, network.num_prefix_tokens :]
            grid = tuple(network.patch_embed.grid_size)
        maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        return sample(maps, points, owner, size=size, convention=self.align)  # type: ignore[arg-type]

    def _square(self, tokens: Any, images: torch.Tensor) -> tuple[int, int]:
        """The grid of tokens that the user's function made; windows are square."""
        shape = tuple(getattr(tokens, "shape", ()))
        cells = math.isqrt(shape[1]) if len(shape) == 3 else 0
        if shape[:1] != images.shape[:1] or not cells or cells**2 != shape[1]:
            raise UserError(
                f"'tokens' of {self.name} gives {shape or type(tokens).__name__} for "
                f"{tuple(images.shape)}; it must give the patch tokens alone, [B, rows * cols, D], "
                f"without class and register tokens."
            )
        return cells, cells


class ClassToken(nn.Module):
    """The class token of a whole window (MUSE: the image feature)."""

    def __init__(self, encoder: Any, window: int, mpp: float) -> None:
        super().__init__()
        self.mean, self.std, self.image_size, self.mpp = encoder.mean, encoder.std, window, mpp
        self.dense = isinstance(encoder, DenseEncoder)
        self.network = encoder if self.dense else vit_for(encoder, window)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [B, 3, window, window] -> [B, width]."""
        return self.network(images) if self.dense else normed_tokens(self.network, images)[:, 0]


class Resized(nn.Module):
    """A window brought to the side of the network's input: torchvision's antialiased bicubic.

    Pixels are resized before they are normalised and rounded to whole levels, as a torchvision
    transform does it to an image. Antialiased when it enlarges, too: without, torch takes another
    cubic (a = -0.75) than Pillow's, which the encoders were trained on.
    """

    def __init__(self, encoder: Any, window: int, mpp: float, *, side: int) -> None:
        super().__init__()
        self.encoder, self.image_size, self.mpp, self.side = encoder, window, mpp, side
        # So that `forward` is given plain pixels / 255.
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """float [B, 3, window, window] in 0..1 -> uint8 [B, side, side, 3]."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        levels = (images * 255).round().to(torch.uint8)
        side = [self.side, self.side]
        return resize(levels, side, InterpolationMode.BICUBIC, antialias=True).permute(0, 2, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float [B, 3, window, window] in 0..1, not normalised -> [B, dim]."""
        from lemon_muse.data.augment import prepare

        encoder: Any = self.encoder
        given = prepare(self.pixels(images), window=self.side, mean=encoder.mean, std=encoder.std)
        return encoder(given)


def vit_for(encoder: Any, window: int) -> nn.Module:
    """The encoder's ViT for windows of this side; a copy where positions must be resampled."""
    network: Any = encoder.network
    if tuple(network.patch_embed.img_size or ()) == (window, window):
        return network
    if not hasattr(network, "set_input_size"):
        raise UserError(
            f"window={window}: {encoder.name} takes only {encoder.image_size} px; leave it out."
        )
    network = copy.deepcopy(network)
    network.set_input_size(img_size=(window, window))
    return network


def normed_tokens(network: Any, images: torch.Tensor) -> torch.Tensor:
    """All last tokens of a timm ViT through its final norm, float [B, prefix + patches, D]."""
    tokens = network.forward_features(images)
    # Pooling ViTs norm after pooling: their tokens come without.
    if isinstance(getattr(network, "norm", None), nn.Identity):
        tokens = network.fc_norm(tokens)
    return tokens
