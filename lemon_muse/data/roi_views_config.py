"""The distribution that the views of ROIs are drawn from."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lemon_muse.config import Config
from lemon_muse.data.augment_config import Positive, Probability, Strength

Side = Annotated[int, Field(ge=16)]


class RoiViewConfig(Config):
    """The distribution of the views of one ROI: large ones for the teacher, all for the student.

    Sizes and ranges of mpp are those of the MUSE paper (section on implementation and Table 5). It
    does not state the rest: a value marked (*) is that of the DINO reference.
    """

    global_size: Side = Field(224, description="side of a global view, pixels")
    local_size: Side = Field(96, description="side of a local view, pixels")
    globals: int = Field(2, ge=1, description="global views of a ROI (*)")
    locals: int = Field(8, ge=0, description="local views of a ROI (*)")
    global_mpp: tuple[Positive, Positive] = Field(
        (0.25, 0.5), description="µm per pixel of global views, least and most, log-uniform"
    )
    local_mpp: tuple[Positive, Positive] = Field(
        (0.25, 0.5), description="µm per pixel of local views, least and most, log-uniform"
    )
    placement: Literal["anchored", "independent"] = Field(
        "anchored",
        description="anchored: all views of a ROI contain one nucleus of it; independent: anywhere",
    )
    margin: Strength = Field(
        4.0, description="nuclei closer than this to the border of a view are not matched, pixels"
    )
    cap: int = Field(128, ge=1, description="most nuclei of a view that are matched")
    turns: bool = Field(True, description="turn by multiples of 90° and mirror")
    jitter: Probability = Field(0.8, description="probability of colour jitter (*)")
    brightness: Strength = Field(0.4, description="brightness factor in 1 ± this (*)")
    contrast: Strength = Field(0.4, description="contrast factor in 1 ± this (*)")
    saturation: Strength = Field(0.2, description="saturation factor in 1 ± this (*)")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.1, description="hue is turned by up to ± this, fraction of a full turn (*)"
    )
    gray: Probability = Field(0.2, description="probability of grayscale (*)")
    blur: tuple[Probability, Probability, Probability] = Field(
        (1.0, 0.1, 0.5),
        description="probability of Gaussian blur in the first, in other global and in local "
        "views (*)",
    )
    blur_sigma: tuple[Positive, Positive] = Field(
        (0.1, 2.0), description="sigma of the blur, least and most, pixels (*)"
    )

    @model_validator(mode="after")
    def _possible(self) -> "RoiViewConfig":
        for name in ("global_mpp", "local_mpp", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"'{name}' is ({low}, {high}): give the smaller number first.")
        smallest = min(self.size(view) for view in range(self.views))
        if self.margin > smallest / 4:
            raise ValueError(
                f"'margin' is {self.margin:g}, but at most {smallest / 4:g} (a quarter of the "
                "smallest view) leaves room for nuclei."
            )
        return self

    @property
    def views(self) -> int:
        """Number of views of a ROI; the global ones come first."""
        return self.globals + self.locals

    def size(self, view: int) -> int:
        """Side of a view, pixels."""
        return self.global_size if view < self.globals else self.local_size

    def mpp(self, view: int) -> tuple[float, float]:
        """Finest and coarsest µm per pixel of a view."""
        return self.global_mpp if view < self.globals else self.local_mpp

    def blur_probability(self, view: int) -> float:
        """Of one view."""
        return self.blur[0 if view == 0 else 1 if view < self.globals else 2]

    @property
    def blur_radius(self) -> int:
        """Half width of the blur kernel in pixels: three times the largest sigma."""
        return math.ceil(3 * self.blur_sigma[1])
