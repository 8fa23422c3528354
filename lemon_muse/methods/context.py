"""The surroundings of a nucleus in training on crops: a wider field, same centre, coarser mpp.

Not in LEMON. Two ways, both with the field `zoom` times as wide as the window and brought to the
window's side:

- `positive`: the second view of a share of the crops is the wide one. What a nucleus looks like and
  what surrounds it become one feature.
- `environment`: VOLTA's masked environment (Nakhli et al., Nature Communications 2024, "VOLTA: an
  environment-aware contrastive cell representation learning for histopathology"; code
  AIMLab-UBC/VOLTA, from which facts were taken and no code). The nucleus is masked out of a third,
  wide view; a network of its own sees that view, and a second pair of projector and predictor on
  the crop's feature must find it among those of other nuclei.

The environment as built here: as in VOLTA an own encoder (of the same kind, trained with gradient,
not exported), an own projector and predictor for the cell, and weight 1. Different: the negatives
are those of all ranks; the loss goes both ways (crop finds environment, environment finds crop),
since keys carry no gradient here; the mask is a disc of known radius, because crops come without an
outline of the nucleus, where VOLTA masks the cell's bounding box times 1.2.
"""

import math
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import nn

from lemon_muse.backbones import build
from lemon_muse.config import Config
from lemon_muse.data import augment
from lemon_muse.data.augment import ViewConfig
from lemon_muse.data.augment_config import Probability
from lemon_muse.errors import UserError
from lemon_muse.heads import mlp
from lemon_muse.losses import info_nce
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.crop_views import CropViews


class ContextConfig(Config):
    """The surroundings of the nucleus (beyond LEMON)."""

    mode: Literal["none", "positive", "environment"] = Field(
        "none",
        description="positive: the second view of a share of the crops is the wide field; "
        "environment: the field without its nucleus is contrasted with the crop (VOLTA)",
    )
    zoom: float = Field(
        2.0, gt=1, le=8, description="width of the field in windows; same centre, coarser mpp"
    )
    share: Probability = Field(
        0.5, description="positive: share of the crops whose second view is the wide field"
    )
    radius: float = Field(5.0, gt=0, description="environment: radius of the masked disc, µm")
    weight: float = Field(1.0, gt=0, description="environment: weight of its loss (VOLTA: 1)")

    @model_validator(mode="after")
    def _of_this_mode(self) -> "ContextConfig":
        """Refuse what would be ignored; defaults are in the saved settings of every run."""
        unused = {"none": ("zoom", "share", "radius", "weight"), "positive": ("radius", "weight")}
        for name in unused.get(self.mode, ("share",)):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"'{name}' has no effect with mode={self.mode}: set method.context.mode too, "
                    f"or leave it out."
                )
        return self


class ContextViews(CropViews):
    """The views of crops, and what `ContextConfig` makes of them.

    Raises:
        UserError: the stored crops are too small for the wide field, or the disc covers it.
    """

    def __init__(self, context: ContextConfig, setting: Setting) -> None:
        super().__init__(setting)
        self.context = context
        if context.mode == "none":
            return
        self.wide = wide_view(setting.view, context.zoom)
        _check(context, self.wide, setting)
        self.factor = _factor(context.zoom, setting)
        if context.mode == "environment":
            self.views.append((self.wide, setting.window, 1))

    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """As `CropViews.draw`; of mode positive the second view has `wide`, bool [count], too."""
        rows = super().draw(count, generator)
        if self.context.mode != "positive":
            return rows
        s = self.setting
        bare = self.wide.model_copy(update={"restain": 0.0})  # of it, the geometry alone is used
        theta = augment.draw(bare, count, stored=s.stored, window=s.window, generator=generator)[
            "theta"
        ]
        wide = torch.rand(count, generator=generator) < self.context.share
        first, second = rows
        second["theta"] = torch.where(wide[:, None, None], theta, second["theta"])
        return [first, {**second, "wide": wide}]

    @torch.no_grad()
    def make(self, batch: dict[str, Any]) -> list[torch.Tensor]:
        """Two views, of mode environment three: float32 [b, 3, w, w] each."""
        if self.context.mode == "none":
            return super().make(batch)
        s, (view, window, _) = self.setting, self.views[0]
        first, second = batch["views"][:2]
        made = [self.one(batch, first, view, window)]
        if self.context.mode == "positive":
            return [*made, self._second(batch, second)]
        radius = self.context.radius / s.mpp
        alone = {**batch, "pixels": pooled(masked(batch["pixels"], radius), self.factor)}
        third = self.one(alone, batch["views"][2], self.wide, window)
        return [*made, self.one(batch, second, view, window), third]

    def _second(self, batch: dict[str, Any], row: dict[str, torch.Tensor]) -> torch.Tensor:
        """The second view: rows that are not wide from the crops, wide ones from pooled crops."""
        view, window, _ = self.views[1]
        wide = row["wide"].cpu()  # where it was drawn: no device is waited for
        row = {k: v for k, v in row.items() if k != "wide"}
        parts, order = [], []
        for config, factor, of in ((view, 1, ~wide), (self.wide, self.factor, wide)):
            at = of.nonzero()[:, 0]
            some = {k: v[at.to(v.device)] for k, v in batch.items() if k in ("pixels", "slide")}
            some["pixels"] = pooled(some["pixels"], factor)
            parts.append(self.one(some, {k: v[at] for k, v in row.items()}, config, window))
            order.append(at)
        back = torch.cat(order).argsort()
        return torch.cat(parts)[back.to(parts[0].device)]


class Environment(nn.Module):
    """The branch of mode environment: encoder and projector of the masked field, heads of the cell.

    Args:
        setting: of the run; the encoder is of its kind, with weights of its own.
        layers, hidden, out_dim: of the projectors.
        last_norm: whether the predictor ends with a batch norm.
    """

    def __init__(
        self, setting: Setting, *, layers: int, hidden: int, out_dim: int, last_norm: bool
    ) -> None:
        super().__init__()
        self.backbone = build(setting.backbone, setting.window, seed=setting.seed + 2)
        width = int(cast(int, self.backbone.num_features))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 3)
            self.projector, self.cell_projector = (
                mlp(layers, in_dim=width, hidden=hidden, out_dim=out_dim) for _ in range(2)
            )
            self.cell_predictor = mlp(
                2, in_dim=out_dim, hidden=hidden, out_dim=out_dim, last_norm=last_norm
            )

    def forward(
        self,
        images: torch.Tensor,
        features: list[torch.Tensor],
        *,
        temperature: float,
        groups: torch.Tensor | None,
    ) -> torch.Tensor:
        """The loss: sum over the views, mean over the two directions; chance as MoCo v3's.

        Args:
            images: masked wide views, float [n, 3, w, w].
            features: of the crops' views by the encoder that is trained, float [n, d] each.
            temperature, groups: see `info_nce`.
        """
        around = self.projector(self.backbone(images))
        settings: dict[str, Any] = {"temperature": temperature, "groups": groups}
        total = around.new_zeros((), dtype=torch.float32)
        for feature in features:
            cell = self.cell_predictor(self.cell_projector(feature))
            total = total + info_nce(cell, around, **settings) + info_nce(around, cell, **settings)
        return total / 2


def wide_view(view: ViewConfig, zoom: float) -> ViewConfig:
    """The distribution of wide views: `zoom` windows across, centred, coloured as `view` says."""
    field = {"centred": True, "scale": (zoom**2, zoom**2), "ratio": (1.0, 1.0)}
    return view.model_copy(update=field)


def stored_size(context: ContextConfig, view: ViewConfig, window: int) -> int:
    """Side of stored crops, a multiple of 16, that holds every pixel of all views, px."""
    views = [view] if context.mode == "none" else [view, wide_view(view, context.zoom)]
    return max(augment.stored_size(each, window) for each in views)


def pooled(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Means of blocks of factor x factor pixels: uint8 [b, S, S, 3] -> [b, S / factor, ...].

    A wide view takes one pixel of several; the bilinear sample alone would alias chromatin.
    """
    if factor == 1:
        return pixels
    count, side = len(pixels), pixels.shape[1] // factor
    # Sums of slices, lines first: five times as fast as torch's sum over both axes (measured, CPU).
    lines = pixels.reshape(count, side, factor, side * factor * 3)
    total = lines[:, :, 0].to(torch.int16)
    for i in range(1, factor):
        total += lines[:, :, i]
    columns = total.view(count, side, side, factor, 3)
    total = columns[..., 0, :].clone()
    for i in range(1, factor):
        total += columns[..., i, :]
    return total.add_(factor**2 // 2).floor_divide_(factor**2).to(torch.uint8)


def masked(pixels: torch.Tensor, radius: float) -> torch.Tensor:
    """Crops with a disc about the middle in the mean colour of the rest: uint8 [b, S, S, 3].

    The mean is of what lies outside, and the disc is filled before anything is resampled or
    blurred: no trace of the nucleus is left, not even how dark it was.
    """
    at = torch.arange(pixels.shape[1]) + 0.5 - pixels.shape[1] / 2
    disc = ((at[:, None] ** 2 + at**2) <= radius**2).flatten().nonzero()[:, 0].to(pixels.device)
    flat = pixels.flatten(1, 2)
    # Whole numbers: the mean is the same to the bit however the batch is cut.
    every = pixels.flatten(2).sum(1, dtype=torch.int32).view(len(pixels), -1, 3).sum(1)
    rest = every - flat[:, disc].sum(1, dtype=torch.int32)
    count = flat.shape[1] - len(disc)
    mean = (rest + count // 2).floor_divide(count).to(torch.uint8)
    return flat.index_copy(1, disc, mean[:, None].expand(-1, len(disc), -1)).view_as(pixels)


def _factor(zoom: float, setting: Setting) -> int:
    """The largest pooling of the stored crops that the wide view does not see as a loss."""
    return max(
        f
        for f in range(1, math.floor(zoom) + 1)
        if setting.stored % f == 0 and (setting.stored // f - setting.window) % 2 == 0
    )


def _check(context: ContextConfig, wide: ViewConfig, setting: Setting) -> None:
    window, stored = setting.window, setting.stored
    if augment.reach(wide, window) > stored / 2:
        raise UserError(
            f"method.context.zoom={context.zoom:g} needs crops of "
            f"{math.ceil(2 * augment.reach(wide, window))} px around each nucleus, but {stored} px "
            f"are stored; prepare them with 'lemon-muse prep crops "
            f"size={augment.stored_size(wide, window)}', or lower zoom."
        )
    field = context.zoom * window * setting.mpp
    if context.mode == "environment" and 2 * context.radius >= field:
        raise UserError(
            f"method.context.radius={context.radius:g} µm masks the whole field of {field:g} µm; "
            f"use less than {field / 2:g}, or raise zoom."
        )
