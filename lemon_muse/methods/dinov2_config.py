"""The settings of DINOv2 on crops; values are those of the DINOv2 reference where it has one."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lemon_muse.methods.contract import MethodConfig
from lemon_muse.methods.muse_config import Temperature

Share = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]


class Dinov2Config(MethodConfig):
    """DINOv2: class tokens (DINO), masked patches (iBOT) and a term that spreads features."""

    name: Literal["dinov2"] = Field("dinov2", description="the method")
    locals: int = Field(8, ge=0, description="local views; 0 = no local-to-global comparison")
    local_size: int = Field(
        24, gt=0, description="side of the local views, px; a multiple of backbone.patch"
    )
    local_scale: tuple[Area, Area] = Field(
        (0.05, 0.32), description="area of a local view, least and most, fraction of the window"
    )
    local_blur: Share = Field(0.5, description="probability of blur in a local view")
    global_scale: tuple[Area, Area] | None = Field(
        None,
        description="area of a global view, least and most, fraction of the window; none = "
        "view.scale (DINOv2: 0.32 to 1, as LEMON)",
    )
    image_weight: float = Field(1.0, ge=0, description="weight of the class-token loss")
    patch_weight: float = Field(1.0, ge=0, description="weight of the masked-patch loss; 0 = none")
    spread: Literal["koleo", "kde", "none"] = Field(
        "koleo", description="what spreads the class tokens of a view"
    )
    spread_weight: float | None = Field(
        None, ge=0, description="its weight; none = 0.1 for koleo (DINOv2), 0.05 for kde (LEMON)"
    )
    koleo_eps: float = Field(
        1e-4, gt=0, description="added to distances (DINOv2: 1e-8; DinoBloom, cells: 1e-4)"
    )
    kde_kappa: float = Field(5.0, gt=0, description="concentration of the kde kernel")
    masks: Literal["block", "random"] = Field("block", description="rectangles or single patches")
    mask_share: Share = Field(0.5, description="share of the global views that are masked")
    mask_ratio: tuple[Area, Area] = Field(
        (0.1, 0.5), description="masked share of a masked view's patches, least and most"
    )
    image_prototypes: int = Field(65_536, gt=1, description="outputs of the class-token head")
    patch_prototypes: int = Field(65_536, gt=1, description="outputs of the patch head")
    shared_head: bool = Field(
        False, description="one head for class token and patches, with image_prototypes outputs"
    )
    hidden: int = Field(2048, gt=0, description="width of the heads' MLP")
    bottleneck: int = Field(256, gt=0, description="width of the normalised bottleneck")
    head_layers: int = Field(3, ge=1, description="linear layers of the heads' MLP")
    norm_last: bool = Field(False, description="keep the prototypes' length at 1")
    freeze_last: Share = Field(
        0.01, description="share of the steps in which prototypes are not trained"
    )
    temperature: float = Field(0.1, gt=0, description="T of the student")
    teacher_temperature: tuple[Temperature, Temperature] = Field(
        (0.04, 0.07),
        description="T of the teacher, first and last value of a linear warm-up (runs of few steps "
        "need less, [0.02, 0.02]: their targets stay uniform else)",
    )
    warm_teacher: Share = Field(0.3, description="share of the steps over which that warm-up runs")
    momentum: Share = Field(0.992, description="EMA momentum at step 0; rises to 1 along a cosine")
    centring: Literal["sinkhorn", "centre"] = Field(
        "sinkhorn",
        description="what keeps the targets from collapsing (DINOv2's large models and DinoBloom: "
        "sinkhorn)",
    )
    centre_momentum: float = Field(0.9, ge=0, lt=1, description="EMA momentum of the centres")
    chunk: int = Field(1024, gt=0, description="rows whose logits exist at one time")
    export: Literal["teacher", "student"] = Field(
        "teacher", description="which network is probed and exported"
    )

    @property
    def weight_of_spread(self) -> float:
        """0 where there is no such term."""
        usual = {"koleo": 0.1, "kde": 0.05, "none": 0.0}[self.spread]
        if self.spread_weight is None or self.spread == "none":
            return usual
        return self.spread_weight

    @property
    def masks_patches(self) -> bool:
        """Whether anything is masked at all."""
        return bool(self.patch_weight and self.mask_share)

    @model_validator(mode="after")
    def _fits(self) -> "Dinov2Config":
        if not self.image_weight and not self.masks_patches:
            raise ValueError(
                "'image_weight' and 'patch_weight' (or 'mask_share') are both 0, so nothing would "
                "be learnt; leave at least one above 0."
            )
        for name in ("local_scale", "global_scale", "mask_ratio"):
            pair = getattr(self, name)
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"'{name}' is {pair}: give the smaller number first.")
        return self
