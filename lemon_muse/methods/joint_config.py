"""The settings of joint training. No paper has it: the new values are choices of this project."""

from typing import Literal

from pydantic import Field, model_validator

from lemon_muse.backbones import Backbone
from lemon_muse.data.augment_config import ViewConfig
from lemon_muse.methods.muse_config import MuseConfig


class JointConfig(MuseConfig):
    """MUSE and a crop encoder in one space of nuclei: their teachers teach each other's student."""

    name: Literal["joint"] = Field("joint", description="the method")  # type: ignore[assignment]
    nucleus_weight: float = Field(1.0, gt=0, description="λ_nu; the decoder's own loss")
    to_crop_weight: float = Field(
        1.0, ge=0, description="of the loss from the dense teacher to the crops' student"
    )
    to_dense_weight: float = Field(
        1.0, ge=0, description="of the loss from the crops' teacher to the dense student"
    )
    crop_weight: float = Field(
        1.0, ge=0, description="of the crops' own loss, DINO between the two views of a crop"
    )
    crops_per_roi: int = Field(
        16,
        gt=0,
        description="crops of a ROI: nuclei that the dense teacher sees, then others of the ROI",
    )
    crop_window: int = Field(
        40, gt=0, description="side of the window that the crop encoder sees, px (even)"
    )
    crop_mpp: float = Field(0.25, gt=0, description="µm per pixel of the crops")
    crop_backbone: Backbone = Field(Backbone(), description="the crop encoder")
    crop_view: ViewConfig = Field(
        ViewConfig(), description="augmentation of the crops, drawn apart from that of the ROIs"
    )
    export: Literal["crop", "dense"] = Field(  # type: ignore[assignment]
        "crop", description="which teacher is probed and exported: the crop encoder or MUSE's"
    )

    @model_validator(mode="after")
    def _crops_train(self) -> "JointConfig":
        if not self.to_crop_weight and not self.crop_weight:
            raise ValueError(
                "'to_crop_weight' and 'crop_weight' are both 0, so the crop encoder would not be "
                "trained; leave one above 0, or use method.name=muse."
            )
        if self.crop_window % 2:
            raise ValueError(f"'crop_window' is {self.crop_window}, but must be even.")
        if self.crop_backbone.inner is not None and not self.crop_view.centred:
            raise ValueError(
                f"'crop_backbone.inner' is {self.crop_backbone.inner}, which looks for the nucleus "
                f"in the middle of the window, but the views of 'crop_view' move it; use "
                f"crop_view.policy=size, or crop_view.centred=true."
            )
        if self.crop_view.restain or self.crop_view.hed:
            raise ValueError(
                "'crop_view' changes stains, for which a crop's slide must be known, but batches "
                "of ROIs do not say it; take another policy."
            )
        return self
