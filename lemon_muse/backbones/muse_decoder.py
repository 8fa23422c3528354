"""MUSE's decoder: four maps of an encoder -> one map at stride 4, under the released names.

Source: models/muse_vit.py and models/muse_r50.py of alibaba-damo-academy/MUSE (facts, not code).
"""

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

STRIDES = (4, 8, 16, 32)

Convention = Literal["released", "centre"]
Norm = Literal["batch", "group"]


def resize(maps: torch.Tensor, size: tuple[int, int], convention: Convention) -> torch.Tensor:
    """Bilinear resampling, float [B, C, h, w] -> [B, C, *size].

    'released' puts the centres of the corner cells of both maps on each other (align_corners): the
    content moves by up to half a cell of the coarse map. 'centre' keeps every cell where it is.
    """
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=convention == "released")


def normaliser(channels: int, norm: Norm) -> nn.Module:
    """BatchNorm2d, or GroupNorm: at most 32 groups, each of 4 channels or more."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    # Fewer channels a group would leave the stride-32 map of a small view (3 x 3) without signal.
    groups = next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels >= 4 * g), 1)
    return nn.GroupNorm(groups, channels)


class ConvNorm(nn.Module):
    """Convolution without bias, normalisation and, if wanted, ReLU; the size stays."""

    def __init__(self, inputs: int, outputs: int, side: int, norm: Norm, *, relu: bool) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False),
            normaliser(outputs, norm),
            nn.ReLU(inplace=True) if relu else nn.Identity(),
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.layer(maps)


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut; ReLU after the sum."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, norm, relu=True)
        self.conv2 = ConvNorm(channels, channels, 3, norm, relu=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(self.conv1(maps)) + maps)


class SkipDrop(nn.Module):
    """In training, the encoder's map of a whole image becomes zero with probability `rate`.

    The maps that stay are not scaled up: so it is in the released code.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return maps
        kept = torch.rand(len(maps), 1, 1, 1, device=maps.device) >= self.rate
        return maps * kept.to(maps.dtype)


class Fuse(nn.Module):
    """One U-Net stage: the coarse map, brought to the fine map's size, beside the fine map."""

    def __init__(
        self, coarse: int, fine: int, norm: Norm, convention: Convention, skip_drop: float
    ) -> None:
        super().__init__()
        self.convention = convention
        self.skip = SkipDrop(skip_drop)
        self.first_block = ConvNorm(coarse + fine, fine, 3, norm, relu=True)
        self.last_block = Residual(fine, norm)

    def forward(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        size = (fine.shape[-2], fine.shape[-1])
        coarse = resize(coarse, size, self.convention)
        return self.last_block(self.first_block(torch.cat([coarse, self.skip(fine)], 1)))


class HyperFeats(nn.Module):
    """All levels, each projected to the same width, side by side at the finest size."""

    def __init__(
        self, levels: tuple[int, ...], width: int, norm: Norm, convention: Convention
    ) -> None:
        super().__init__()
        self.convention = convention
        self.conv_list = nn.ModuleList(
            ConvNorm(channels, width, 1, norm, relu=False) for channels in levels
        )

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        size = (levels[0].shape[-2], levels[0].shape[-1])
        return torch.cat(
            [
                resize(conv(level), size, self.convention)
                for conv, level in zip(self.conv_list, levels, strict=True)
            ],
            1,
        )


class Decoder(nn.Module):
    """Four taps of the encoder -> float [B, 4 * width, ceil(H/4), ceil(W/4)].

    Args:
        taps: channels of the four taps, shallow to deep.
        levels: channels of the pyramid at strides 4, 8, 16, 32. Where they differ from `taps` (a
            ViT, whose taps all have one stride) a 1x1 convolution and a resampling make the
            pyramid; else the taps are the pyramid.
        width: channels that each level gives to the output.
        multi_level: concatenate all levels (released); else project the finest one alone.
        skip_drop: chance, per image in training, that the encoder's map at stride 4, 8, 16 is
            withheld.
    """

    def __init__(
        self,
        taps: tuple[int, ...],
        levels: tuple[int, ...],
        width: int,
        *,
        multi_level: bool = True,
        norm: Norm = "batch",
        convention: Convention = "released",
        skip_drop: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        super().__init__()
        self.convention: Convention = convention
        self.channels = 4 * width
        a, b, c, d = levels
        if taps != levels:
            self.dim_map_layers = nn.ModuleList(
                nn.Conv2d(given, wanted, 1, bias=False)
                for given, wanted in zip(taps, levels, strict=True)
            )
        self.makes_pyramid = taps != levels
        self.decoder3 = Fuse(d, c, norm, convention, skip_drop[2])
        self.decoder2 = Fuse(c, b, norm, convention, skip_drop[1])
        self.decoder1 = Fuse(b, a, norm, convention, skip_drop[0])
        if multi_level:
            self.hyper_feats = HyperFeats(levels, width, norm, convention)
        else:
            self.projection = ConvNorm(a, self.channels, 1, norm, relu=False)
        self.multi_level = multi_level

    def forward(self, taps: list[torch.Tensor], image: tuple[int, int]) -> torch.Tensor:
        """`image` is the height and width of the images that the taps were made from, px."""
        if self.makes_pyramid:
            # Sizes are spelt out, as scale factors would round 208 / 32 down at one level only.
            taps = [
                resize(
                    layer(tap),
                    (math.ceil(image[0] / stride), math.ceil(image[1] / stride)),
                    self.convention,
                )
                for layer, tap, stride in zip(self.dim_map_layers, taps, STRIDES, strict=True)
            ]
        e1, e2, e3, e4 = taps
        d3 = self.decoder3(e4, e3)
        d2 = self.decoder2(d3, e2)
        d1 = self.decoder1(d2, e1)
        return self.hyper_feats([d1, d2, d3, e4]) if self.multi_level else self.projection(d1)
