"""The distribution that the views of nucleus crops are drawn from, and its named policies."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lemon_muse.config import Config

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]

# Differences from the defaults of `ViewConfig`, which are the policy a1+gray.
POLICIES: dict[str, dict[str, Any]] = {
    "a0": {"rotate": False, "scale": (0.08, 1.0), "erase": 0.0},
    "a1": {"gray": 0.0},
    "a1+gray": {},
    "a1+gmm1": {"gray": 0.0, "restain": 1.0, "gaussians": 1},
    "a1+gmm10": {"gray": 0.0, "restain": 1.0, "gaussians": 10},
    "a1+hed": {"gray": 0.0, "hed": 1.0},
    "mild": {"scale": (0.4, 1.0), "hue": 0.025, "blur_sigma": (0.1, 1.0), "erase": 0.0},
    # Every view has the crop's own size. The shift is the most that any turn of a window of 40 px
    # leaves in stored crops of 64 px.
    "size": {
        "centred": True,
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "shift": 3.7,
        "blur_sigma": (0.1, 1.0),
        "erase": 0.25,
        "erase_scale": (0.02, 0.1),
    },
}


class ViewConfig(Config):
    """The distribution of one view; a policy fills every field that is not given.

    Policies: a0 is MoCo v3's augmentation without solarisation; a1 is LEMON's, with rotation and
    erasing and without grayscale; a1+gray is LEMON's choice; a1+gmm1 and a1+gmm10 draw the stain of
    a view from 1 or 10 Gaussians fitted over the slides; a1+hed changes the amounts of hematoxylin
    and eosin a little (`stain_views` has both); mild suits small runs; size turns, mirrors and
    moves a nucleus and never rescales it. The LEMON paper names the operations, the crop scale, the
    erased area and the largest sigma; a value marked (*) is not found there and is that of the MoCo
    v3 reference, (**) that of torchvision.
    """

    policy: Literal["a0", "a1", "a1+gray", "a1+gmm1", "a1+gmm10", "a1+hed", "mild", "size"] = Field(
        "a1+gray", description="named set of values for the fields that are not given"
    )
    rotate: bool = Field(True, description="turn by any angle, taking pixels from the stored crop")
    scale: tuple[Positive, Positive] = Field(
        (0.32, 1.0), description="area of the resized crop, least and most, fraction of the window"
    )
    ratio: tuple[Positive, Positive] = Field(
        (3 / 4, 4 / 3), description="width / height of the resized crop, least and most (**)"
    )
    centred: bool = Field(
        False,
        description="keep the nucleus in the middle (plus shift) and zoom in or out about it, "
        "instead of placing the resized crop anywhere in the window; scale may then exceed 1",
    )
    shift: Strength = Field(0.0, description="largest translation in x and in y, pixels")
    hflip: Probability = Field(0.5, description="probability of a mirrored view (*)")
    vflip: Probability = Field(0.0, description="probability of an upside-down view")
    restain: Probability = Field(
        0.0, description="probability that a view gets a stain drawn from those of all slides"
    )
    gaussians: int = Field(
        1, gt=0, description="Gaussians that are fitted over the slides' stains for restain"
    )
    hed: Probability = Field(0.0, description="probability of jittered amounts of H and E")
    hed_range: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="amounts are multiplied by 1 ± this, then ± this (optical density) added"
    )
    jitter: Probability = Field(0.8, description="probability of colour jitter (*)")
    brightness: Strength = Field(0.4, description="brightness factor in 1 ± this (*)")
    contrast: Strength = Field(0.4, description="contrast factor in 1 ± this (*)")
    saturation: Strength = Field(0.2, description="saturation factor in 1 ± this (*)")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.1, description="hue is turned by up to ± this, fraction of a full turn (*)"
    )
    gray: Probability = Field(0.2, description="probability of grayscale (*)")
    blur: tuple[Probability, Probability] = Field(
        (1.0, 0.1), description="probability of Gaussian blur in the first and in other views (*)"
    )
    blur_sigma: tuple[Positive, Positive] = Field(
        (0.1, 2.0), description="sigma of the blur, least (*) and most, pixels"
    )
    erase: Probability = Field(0.5, description="probability of an erased rectangle (**)")
    erase_scale: tuple[Positive, Positive] = Field(
        (0.02, 0.3), description="area of the rectangle, least (**) and most, fraction of the view"
    )
    erase_ratio: tuple[Positive, Positive] = Field(
        (0.3, 3.3), description="height / width of the rectangle, least and most (**)"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        filled = {**POLICIES.get(str(given.get("policy", "a1+gray")), {}), **given}
        for name, switch in (("gaussians", "restain"), ("hed_range", "hed")):
            if name in given and switch not in filled:
                raise ValueError(f"'{name}' has no effect: '{switch}', its probability, is 0.")
        return filled

    @model_validator(mode="after")
    def _ordered(self) -> "ViewConfig":
        for name in ("scale", "ratio", "blur_sigma", "erase_scale", "erase_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"'{name}' is ({low}, {high}): give the smaller number first.")
        for name in ("scale", "erase_scale"):
            if getattr(self, name)[1] > 1 and not (name == "scale" and self.centred):
                raise ValueError(f"'{name}' ends above 1, but it is a fraction of an area.")
        return self

    @property
    def blur_radius(self) -> int:
        """Half width of the blur kernel in pixels: three times the largest sigma."""
        return math.ceil(3 * self.blur_sigma[1])
