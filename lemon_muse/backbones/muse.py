"""MUSE's network: an encoder tapped at four depths, and a decoder that makes a map at stride 4.

The module tree gives `state_dict()` the names of the released files without their prefix
`module.backbone.`; see `muse_weights`. Sources: the MUSE paper; models/muse_vit.py, muse_r50.py
and dino_vision_transformer.py of alibaba-damo-academy/MUSE.
"""

from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from timm.layers import DropPath
from timm.models import ResNet, VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lemon_muse.backbones import create
from lemon_muse.backbones.muse_decoder import STRIDES, Convention, Decoder, SkipDrop
from lemon_muse.config import Config
from lemon_muse.errors import UserError

# Short names: timm's architecture and its width. Heads are 64 channels wide, as in DINO and timm.
VITS: dict[str, tuple[str, int]] = {
    "vit_tiny": ("vit_tiny_patch16_224", 192),
    "vit_small": ("vit_small_patch16_224", 384),
    "vit_base": ("vit_base_patch16_224", 768),
}
# DINO adds this to the wanted number of cells before it divides by the table's.
DINO_OFFSET = 0.1
# The released ResNet's constructor default, strides 4, 8, 16; the ViT has none.
RESNET_SKIP_DROP = (0.15, 0.10, 0.05)
# timm's arguments that have a key of their own here, and those that the network relies on.
OWN = {
    "img_size": "image",
    "patch_size": "patch",
    "num_heads": "heads",
    "drop_path_rate": "drop_path",
}
FIXED = ("dynamic_img_size", "dynamic_img_pad", "global_pool", "num_classes", "patch_drop_rate")
Share = Annotated[float, Field(ge=0, lt=1)]


class MuseBackbone(Config):
    """MUSE's network: encoder and decoder."""

    name: str = Field(
        "vit_small",
        description="vit_tiny, vit_small, vit_base, resnet50 or any timm ViT or ResNet",
    )
    patch: int | None = Field(
        None, gt=0, description="ViT patch side, px; none = 16, or what a timm name says"
    )
    heads: int | None = Field(
        None, gt=0, description="ViT attention heads; none = width / 64, or the timm model's"
    )
    image: int = Field(224, gt=0, description="ViT: side of the images of the position table, px")
    args: dict[str, Any] = Field(
        {}, description="further timm arguments, e.g. {depth: 4, embed_dim: 192}"
    )
    decoder: Literal["full", "single", "none"] = Field(
        "full",
        description="full: all levels at stride 4; single: only the last, projected; none: the "
        "encoder's last map",
    )
    norm: Literal["batch", "group"] = Field("batch", description="normalisation in the decoder")
    convention: Literal["released", "centre"] = Field(
        "released",
        description="resampling in the network: released (corners aligned, as the published "
        "weights were trained) or centre (every cell stays in its place)",
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="ViT: stochastic depth of the student")
    skip_drop: tuple[Share, Share, Share] | None = Field(
        None,
        description="chance per image that the student's decoder does without the encoder's map "
        "at stride 4, 8, 16; none = 0.15, 0.1, 0.05 for a ResNet, 0 for a ViT",
    )


def resize_positions(
    table: torch.Tensor, old: tuple[int, int], new: tuple[int, int], *, offset: float = 0.0
) -> torch.Tensor:
    """Bicubic resampling of a position table, without antialiasing (as DINO).

    Args:
        table: float [1, old rows * old cols, D]; no class token.
        offset: added to the new numbers of rows and cols before the scale is worked out. DINO's
            0.1 (`DINO_OFFSET`) shrinks the step between samples; 0 keeps cells in their places.

    Returns:
        float [1, new rows * new cols, D]; with an offset resampled even where `old` is `new`.
    """
    grid = table.reshape(1, *old, -1).permute(0, 3, 1, 2)
    if offset == 0:
        out = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    else:
        scale = ((new[0] + offset) / old[0], (new[1] + offset) / old[1])
        # The given scale, not the ratio of whole sizes, is what coordinates are worked out with.
        out = F.interpolate(grid, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    return out.permute(0, 2, 3, 1).flatten(1, 2)


class ViTTaps(nn.Module):
    """A timm ViT read after four of its blocks, each time through the final norm."""

    def __init__(self, vit: Any, convention: Convention) -> None:
        super().__init__()
        self.encoder: Any = vit
        self.width = int(vit.embed_dim)
        self.channels = (vit.embed_dim,) * len(STRIDES)
        self.levels = tuple(int(vit.embed_dim * share) for share in (0.25, 0.5, 1, 2))
        self.patch = int(vit.patch_embed.patch_size[0])
        self.offset = DINO_OFFSET if convention == "released" else 0.0
        depth, count = len(vit.blocks), len(STRIDES)
        # Evenly spaced, the last one at the end: 2, 5, 8, 11 of 12.
        self.taps = [max(0, depth * (i + 1) // count - 1) for i in range(count)]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """float [B, 3, H, W] -> class token [B, D]; four maps [B, D, H/patch, W/patch]."""
        vit, side = self.encoder, self.patch
        height, width = images.shape[-2:]
        if height % side or width % side:
            raise UserError(
                f"images of {height} × {width} px cannot be cut into patches of {side} px; use a "
                f"height and width that are multiples of {side}."
            )
        grid = (height // side, width // side)
        tokens = vit.norm_pre(vit.pos_drop(self._embed(images, grid)))
        read: dict[int, torch.Tensor] = {}
        for i, block in enumerate(vit.blocks):
            if vit.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if i in self.taps:
                read[i] = vit.norm(tokens)
        # A view: the layout of the memory is that of channels_last.
        maps = {
            i: normed[:, vit.num_prefix_tokens :].unflatten(1, grid).permute(0, 3, 1, 2)
            for i, normed in read.items()
        }
        return read[self.taps[-1]][:, 0], [maps[i] for i in self.taps]

    def _embed(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Patches, positions and leading tokens, float [B, prefix + h * w, D]."""
        vit = self.encoder
        patches = vit.patch_embed(images).flatten(1, 2)
        leading = torch.cat([t for t in (vit.cls_token, vit.reg_token) if t is not None], 1)
        leading = leading.expand(len(images), -1, -1)
        table, old = vit.pos_embed, vit.patch_embed.grid_size
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        if grid != old:
            moved = resize_positions(table[:, prefix:], old, grid, offset=self.offset)
            table = torch.cat([table[:, :prefix], moved], 1)
        if vit.no_embed_class:
            return torch.cat([leading, patches + table], 1)
        return torch.cat([leading, patches], 1) + table


class ResNetTaps(nn.Module):
    """A timm ResNet read after its four stages; the image's feature is the mean of the last."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.encoder: Any = resnet
        self.width = int(resnet.num_features)
        self.channels = tuple(int(stage["num_chs"]) for stage in resnet.feature_info[1:])
        self.levels = self.channels
        self.patch = int(resnet.feature_info[-1]["reduction"])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """float [B, 3, H, W] -> [B, D]; maps at strides 4, 8, 16, 32 (sizes rounded up)."""
        last, maps = self.encoder.forward_intermediates(images, indices=[1, 2, 3, 4])
        return last.mean((2, 3)), maps


class MuseNet(nn.Module):
    """Images to one feature each and a dense map for nuclei. Works in torch.channels_last and bf16.

    Attributes:
        settings: what it was built from.
        dim, map_dim: widths D of the image feature and C of the map.
        stride: px of the image per cell of the map.
    """

    def __init__(self, encoder: ViTTaps | ResNetTaps, settings: MuseBackbone) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = encoder
        self.decoder: Decoder | None = None
        self.dim = encoder.width
        self.map_dim, self.stride = encoder.width, encoder.patch
        if settings.decoder != "none":
            resnet = isinstance(encoder, ResNetTaps)
            self.decoder = Decoder(
                encoder.channels,
                encoder.levels,
                encoder.width // (8 if resnet else 4),
                multi_level=settings.decoder == "full",
                norm=settings.norm,
                convention=settings.convention,
                skip_drop=settings.skip_drop or (RESNET_SKIP_DROP if resnet else (0.0, 0.0, 0.0)),
            )
            self.map_dim, self.stride = self.decoder.channels, STRIDES[0]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float [B, 3, H, W], normalised -> image features [B, D], map [B, C, H/4, W/4].

        Raises:
            UserError: a ViT, and H or W is not a multiple of the patch.
        """
        cls, maps = self.encoder(images)
        if self.decoder is None:
            return cls, maps[-1]
        return cls, self.decoder(maps, (images.shape[-2], images.shape[-1]))

    def without_drops(self) -> "MuseNet":
        """Switch off stochastic depth and every other dropping for good (the teacher); self."""
        for module in self.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, SkipDrop):
                module.rate = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        return self


def build_muse(settings: MuseBackbone, *, seed: int) -> MuseNet:
    """A freshly initialised network: the encoder as in DINO, the decoder by torch's defaults.

    Raises:
        UserError: a name that timm does not know, or arguments that do not fit.
    """
    architecture, arguments = timm_arguments(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = create(settings.name, architecture, arguments, short=VITS)
        # Subclasses have tokens or positions of their own.
        if type(network) is VisionTransformer:
            if network.pos_embed is None or network.embed_dim % 4:
                raise UserError(
                    f"{architecture} has no position table or a width that 4 does not divide, and "
                    "MUSE needs both; use vit_small or vit_base."
                )
            nn.init.trunc_normal_(cast(torch.Tensor, network.cls_token), std=0.02)
            return MuseNet(ViTTaps(network, settings.convention), settings)
        if isinstance(network, ResNet):
            return MuseNet(ResNetTaps(network), settings)
    raise UserError(
        f"{architecture} is not a plain ViT or ResNet of timm; use {', '.join(VITS)} or resnet50."
    )


def timm_arguments(settings: MuseBackbone) -> tuple[str, dict[str, Any]]:
    """The timm architecture and its arguments."""
    architecture, width = VITS.get(settings.name, (settings.name, 0))
    vit = architecture.startswith(("vit_", "deit", "flexivit"))
    for key in settings.args:
        if key in (OWN if vit else ()):
            raise UserError(f"backbone.args must not hold {key}; set backbone.{OWN[key]}.")
        if key in FIXED:
            raise UserError(f"backbone.args must not hold {key}; MUSE has its own way with it.")
    if not vit:
        return architecture, dict(settings.args)
    patch, heads = settings.patch, settings.heads
    if width:
        patch = patch or 16
        heads = heads or max(1, settings.args.get("embed_dim", width) // 64)
    if patch and settings.image % patch:
        raise UserError(
            f"backbone.patch={patch} does not divide backbone.image={settings.image}; "
            f"use a multiple of {patch} for the image."
        )
    chosen: dict[str, Any] = {"img_size": settings.image, "drop_path_rate": settings.drop_path}
    chosen |= {"patch_size": patch} if patch else {}
    chosen |= {"num_heads": heads} if heads else {}
    chosen |= {"dynamic_img_size": True, "global_pool": "token"}
    return architecture, {**settings.args, **chosen}
