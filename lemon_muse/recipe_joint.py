"""The settings of a joint run: those of MUSE, and `method.crop_…` for its crop encoder."""

from pydantic import Field

from lemon_muse.backbones.muse import MuseBackbone
from lemon_muse.data import augment, roi_crops, roi_views
from lemon_muse.data.compose import select
from lemon_muse.data.roi_views_config import RoiViewConfig
from lemon_muse.data.shards import Index, open_index
from lemon_muse.errors import UserError
from lemon_muse.methods.joint_config import JointConfig
from lemon_muse.recipe import Normalise, Train
from lemon_muse.recipe_muse import MuseOptim


class JointTrain(Train):
    """Pretrain MUSE and a crop encoder together on ROIs (method.name=joint)."""

    steps: int = Field(47_000, gt=0, description="optimiser steps (100 passes of 484k ROIs)")
    batch: int = Field(1024, gt=1, description="global batch of ROIs: all ranks, all parts")
    normalise: Normalise = Field(
        "imagenet", description="mean and std: of these shards, LEMON's released ones, ImageNet's"
    )
    method: JointConfig = Field(JointConfig(), description="the method")
    backbone: MuseBackbone = Field(MuseBackbone(), description="the dense network")
    view: RoiViewConfig = Field(RoiViewConfig(), description="views of a ROI")
    optim: MuseOptim = Field(MuseOptim(), description="optimiser")

    def open_data(self) -> Index:
        return open_index(self.data, kind="rois")

    def check(self, index: Index) -> None:
        super().check(index)
        roi_views.check(self.view, index.size, index.mpp)
        m = self.method
        stored = augment.stored_size(m.crop_view, m.crop_window)
        span = roi_crops.window_px(stored, mpp=index.mpp, wanted=m.crop_mpp)
        if span > index.size:
            raise UserError(
                f"The crops' views need {span} px of a ROI around a nucleus, but the ROIs are "
                f"{index.size} px wide; make method.crop_window smaller, or prepare larger ROIs."
            )

    def samples(self, index: Index) -> tuple[int, str]:
        chosen = select(index, self.subset, reads="rois")
        return len(index.blocks) if chosen is None else chosen.total, "ROIs"

    @property
    def window_px(self) -> int:
        """Of the encoder that is exported, which is the one that is probed."""
        m = self.method
        return m.crop_window if m.export == "crop" else self.view.global_size
