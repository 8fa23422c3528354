"""The settings of MUSE. Values that the paper does not state are those of the DINO reference."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lemon_muse.methods.contract import MethodConfig

# 0 would divide by zero, and a negative one turn the targets round.
Temperature = Annotated[float, Field(gt=0)]


class MuseConfig(MethodConfig):
    """MUSE: image loss (DINO) and nucleus loss (NuLo)."""

    name: Literal["muse"] = Field("muse", description="the method")
    image_weight: float = Field(1.0, ge=0, description="λ_image; 0 = no image loss")
    nucleus_weight: float = Field(
        1.0, ge=0, description="λ_nu; 0 = no nucleus loss, the decoder is not trained"
    )
    image_prototypes: int = Field(65_536, gt=1, description="outputs of the image head")
    nucleus_prototypes: int = Field(16_384, gt=1, description="outputs of the nucleus head")
    hidden: int = Field(2048, gt=0, description="width of the heads' MLP")
    bottleneck: int = Field(256, gt=0, description="width of the normalised bottleneck")
    head_layers: int = Field(3, ge=1, description="linear layers of the heads' MLP")
    norm_last: bool = Field(
        False, description="keep the prototypes' length at 1 (DINO: ViT-S no, ViT-B yes)"
    )
    freeze_last: float = Field(
        0.01, ge=0, le=1, description="share of the steps in which prototypes are not trained"
    )
    temperature: float = Field(0.1, gt=0, description="T of the student")
    teacher_temperature: tuple[Temperature, Temperature] = Field(
        (0.04, 0.07), description="T of the teacher, first and last value of a linear warm-up"
    )
    warm_teacher: float = Field(
        0.3, ge=0, le=1, description="share of the steps over which that warm-up runs"
    )
    momentum: float = Field(
        0.996, ge=0, le=1, description="EMA momentum at step 0; rises to 1 along a cosine"
    )
    centring: Literal["centre", "sinkhorn"] = Field(
        "centre", description="what keeps the targets from collapsing"
    )
    centre_momentum: float = Field(0.9, ge=0, lt=1, description="EMA momentum of the centres")
    reduction: Literal["pair", "sqrt", "nucleus", "sum"] = Field(
        "pair",
        description="NuLo: each pair of views alike, by the root of its nuclei, each nucleus "
        "alike, or the paper's plain sum",
    )
    chunk: int = Field(1024, gt=0, description="nuclei whose logits exist at one time")
    export: Literal["teacher", "student"] = Field(
        "teacher", description="which network is probed and exported (MUSE released the teacher)"
    )

    @model_validator(mode="after")
    def _trains(self) -> "MuseConfig":
        if not self.image_weight and not self.nucleus_weight:
            raise ValueError(
                "'image_weight' and 'nucleus_weight' are both 0, so nothing would be trained; "
                "leave at least one above 0."
            )
        return self
