"""The settings of a MUSE run. Values that the paper does not state are DINO's; see the help."""

from pathlib import Path

from pydantic import Field

from lemon_muse.backbones.muse import MuseBackbone
from lemon_muse.data import roi_views
from lemon_muse.data.compose import select
from lemon_muse.data.roi_views_config import RoiViewConfig
from lemon_muse.data.shards import Index, open_index
from lemon_muse.methods.muse import MuseConfig
from lemon_muse.optim import Optim
from lemon_muse.recipe import Normalise, Train


class MuseOptim(Optim):
    """Optimiser and learning rate; the defaults are DINO's."""

    lr: float = Field(
        5e-4,
        gt=0,
        description="peak learning rate for a global batch of 256; scaled by batch/256",
    )
    end_lr: float = Field(1e-6, ge=0, description="learning rate at the last step, scaled likewise")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="share of the steps with linearly rising rate"
    )
    weight_decay: float = Field(0.04, ge=0, description="decoupled weight decay at step 0")
    end_weight_decay: float | None = Field(
        0.4, ge=0, description="weight decay at the last step, along a cosine; none = constant"
    )
    decay_norms: bool = Field(False, description="also decay biases and norm gains")
    clip: float = Field(
        3.0, ge=0, description="largest global gradient norm; 0 = no clipping (DINO: 3 S, 0.3 B)"
    )


class MuseTrain(Train):
    """Pretrain an encoder-decoder on ROIs (method.name=muse): DINO for images, NuLo for nuclei."""

    steps: int = Field(47_000, gt=0, description="optimiser steps (100 passes of 484k ROIs)")
    batch: int = Field(1024, gt=1, description="global batch of ROIs: all ranks, all parts")
    normalise: Normalise = Field(
        "imagenet", description="mean and std: of these shards, LEMON's released ones, ImageNet's"
    )
    method: MuseConfig = Field(MuseConfig(), description="the method")
    backbone: MuseBackbone = Field(MuseBackbone(), description="the network")
    view: RoiViewConfig = Field(RoiViewConfig(), description="views of a ROI")
    optim: MuseOptim = Field(MuseOptim(), description="optimiser")
    init: Path | None = Field(
        None,
        description="start from this run (heads and centres too), encoder folder or released "
        ".pth; positions are resampled to backbone.image",
    )

    def open_data(self) -> Index:
        return open_index(self.data, kind="rois")

    def check(self, index: Index) -> None:
        super().check(index)
        roi_views.check(self.view, index.size, index.mpp)

    def samples(self, index: Index) -> tuple[int, str]:
        chosen = select(index, self.subset, reads="rois")
        return len(index.blocks) if chosen is None else chosen.total, "ROIs"

    @property
    def window_px(self) -> int:
        return self.view.global_size
