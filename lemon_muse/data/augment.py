"""Views of nucleus crops: random geometry, colour, blur and erasing for a whole batch at once.

A view is made in four steps: one bilinear resampling that merges rotation, resized crop, shift and
flips; colour; Gaussian blur; erasing and normalisation. `draw` makes the random numbers, `apply`
does the work on whatever device the pixels are on. The parameters of a view depend on the generator
alone, so a rank can draw them for the global batch and apply its own rows.

What differs from torchvision, with the same parameters (measured on BRCA-M2C crops of 64 px):

- One resampling instead of rotate-then-resize: sharper.
- The colour operations are one 3x3 matrix with one clamp at the end, where torchvision clamps after
  every operation; hue turns the I-Q plane of YIQ, where torchvision turns HSV. Without hue and
  without clipping both are equal; with them, views are alike in distribution, not pixel by pixel.
- Crop boxes are not rounded to whole pixels.
"""

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from lemon_muse.config import Config
from lemon_muse.data import augment_ops as ops

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]

# Differences from the defaults of `ViewConfig`, which are the policy a1+gray.
POLICIES: dict[str, dict[str, Any]] = {
    "a0": {"rotate": False, "scale": (0.08, 1.0), "erase": 0.0},
    "a1": {"gray": 0.0},
    "a1+gray": {},
    "mild": {"scale": (0.4, 1.0), "hue": 0.025, "blur_sigma": (0.1, 1.0), "erase": 0.0},
}

# Views per pass on the CPU (their intermediate tensors should stay in the cache) and on a device.
CPU_CHUNK = 32
DEVICE_CHUNK = 8192


class ViewConfig(Config):
    """The distribution of one view; a policy fills every field that is not given.

    Policies: a0 is MoCo v3's augmentation without solarisation; a1 is LEMON's, with rotation and
    erasing and without grayscale; a1+gray is LEMON's choice; mild suits small runs. The LEMON paper
    names the operations, the crop scale, the erased area and the largest sigma; a value marked (*)
    is not found there and is that of the MoCo v3 reference, (**) that of torchvision.
    """

    policy: Literal["a0", "a1", "a1+gray", "mild"] = Field(
        "a1+gray", description="named set of values for the fields that are not given"
    )
    rotate: bool = Field(True, description="turn by any angle, taking pixels from the stored crop")
    scale: tuple[Positive, Positive] = Field(
        (0.32, 1.0), description="area of the resized crop, least and most, fraction of the window"
    )
    ratio: tuple[Positive, Positive] = Field(
        (3 / 4, 4 / 3), description="width / height of the resized crop, least and most (**)"
    )
    shift: Strength = Field(0.0, description="largest translation in x and in y, pixels")
    hflip: Probability = Field(0.5, description="probability of a mirrored view (*)")
    vflip: Probability = Field(0.0, description="probability of an upside-down view")
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
        return {**POLICIES.get(given.get("policy", "a1+gray"), {}), **given}

    @model_validator(mode="after")
    def _ordered(self) -> "ViewConfig":
        for name in ("scale", "ratio", "blur_sigma", "erase_scale", "erase_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"'{name}' is ({low}, {high}): give the smaller number first.")
        for name in ("scale", "erase_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(f"'{name}' ends above 1, but it is a fraction of an area.")
        return self

    @property
    def blur_radius(self) -> int:
        """Half width of the blur kernel in pixels: three times the largest sigma."""
        return math.ceil(3 * self.blur_sigma[1])


def draw(
    config: ViewConfig,
    n: int,
    *,
    stored: int,
    window: int,
    generator: torch.Generator,
    view: int = 0,
) -> dict[str, torch.Tensor]:
    """Draw the parameters of `n` views, on the CPU.

    The amount of random numbers taken does not depend on `config`: changing one probability leaves
    the other parameters of every view as they were.

    Args:
        config: the distribution.
        n: number of views; the *global* batch, so that ranks agree.
        stored: side S of the stored crops, pixels.
        window: side of the views, pixels.
        generator: a CPU generator, the only source of randomness.
        view: 0 for the first view, 1 for the second: they differ in the probability of blur.

    Returns:
        Tensors whose first dimension is n, to be sliced together: `theta` float32 [n, 2, 3] (the
        affine map of `torch.nn.functional.affine_grid`, align_corners=False), `jitter` float32
        [n, 4] (brightness, contrast and saturation factors, hue in turns), `order` int64 [n, 4]
        (which of them comes first, second, ...), `gray` float32 [n] (0 or 1), `sigma` float32 [n]
        (pixels, 0 for no blur) and `erase` float32 [n, 4] (top, bottom, left, right in pixels).

    Raises:
        ValueError: the window does not fit into the stored crop, or not in its middle.
    """
    _check_window(stored, window)
    # Rows of random numbers: 0-5 geometry, 6-12 colour, 13-14 blur, 15-17 erasing, then two boxes.
    u = torch.rand(58, n, generator=generator)
    order = torch.rand(n, 4, generator=generator).argsort(1)
    strength = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low = torch.maximum(neutral - strength, torch.tensor([0.0, 0.0, 0.0, -1.0]))
    factor = low + u[6:10].T * (neutral + strength - low)
    low_sigma, high_sigma = config.blur_sigma
    sigma = low_sigma + u[13] * (high_sigma - low_sigma)
    erase = ops.draw_rectangles(
        u[38:], u[15:17], scale=config.erase_scale, ratio=config.erase_ratio, side=window
    )
    return {
        "theta": _draw_theta(config, u[:6], u[18:38], stored=stored, window=window),
        "jitter": torch.where((u[10] < config.jitter)[:, None], factor, neutral),
        "order": order,
        "gray": (u[11] < config.gray).float(),
        "sigma": torch.where(u[14] < config.blur[min(view, 1)], sigma, 0.0),
        "erase": erase * (u[17] < config.erase)[:, None],
    }


@torch.no_grad()
def apply(
    pixels: torch.Tensor,
    params: dict[str, torch.Tensor],
    config: ViewConfig,
    *,
    window: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Make one view of every crop, on the device of the pixels.

    On the CPU the result of a row depends on that row alone, bit for bit, however the batch is cut.

    Args:
        pixels: uint8 [B, S, S, 3], RGB.
        params: rows of what `draw` returned, with the same `config`, `stored` = S and `window`.
        config: the distribution that the parameters come from.
        window: side w of the views, pixels.
        mean: per channel, of pixels in 0..1; subtracted. An erased pixel gets this colour.
        std: per channel, of pixels in 0..1; divided by.
        dtype: torch.bfloat16 blurs in bfloat16: faster, and off by up to 0.004 in 0..1.

    Returns:
        float32 [B, 3, w, w], normalised.

    Raises:
        ValueError: wrong kind or shape of pixels, or as many parameters as crops are not there.
    """
    _check_pixels(pixels)
    count, stored = pixels.shape[:2]
    _check_window(stored, window)
    if len(params["theta"]) != count:
        raise ValueError(f"{count} crops need as many parameters, not {len(params['theta'])}")
    out = torch.empty(count, 3, window, window, device=pixels.device)
    if not count:
        return out
    moved = _move(params, pixels.device)
    norm = _normalisation(tuple(mean), tuple(std), pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):
        _make(pixels, moved, config, out, norm=norm, dtype=dtype)
    return out


@torch.no_grad()
def prepare(
    pixels: torch.Tensor, *, window: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """The central window of every crop, normalised, without augmentation.

    Args:
        pixels: uint8 [B, S, S, 3], RGB, on any device.
        window: side w of the window, pixels.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.

    Returns:
        float32 [B, 3, w, w] on the device of the pixels.

    Raises:
        ValueError: wrong kind or shape of pixels, or the window does not fit into the crops.
    """
    _check_pixels(pixels)
    _check_window(pixels.shape[1], window)
    scale, bias = _normalisation(tuple(mean), tuple(std), pixels.device)
    start = (pixels.shape[1] - window) // 2
    part = pixels[:, start : start + window, start : start + window]
    planes = part.permute(0, 3, 1, 2).contiguous().float()
    return planes.mul_(scale / 255).add_(bias)


def _make(
    pixels: torch.Tensor,
    params: dict[str, torch.Tensor],
    config: ViewConfig,
    out: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Fill `out`. Everything that is small per view is computed once, not chunk by chunk."""
    count, stored = pixels.shape[:2]
    window = out.shape[-1]
    padding = "border" if _stays_inside(config, stored, window) else "reflection"
    basis = ops.blur_basis(window, config.blur_radius, pixels.device)
    lines = ops.grid_lines(params["theta"], window)
    colour = ops.colour_matrices(params["jitter"], params["order"], params["gray"])
    colour = tuple(matrix / 255 for matrix in colour)
    kernels = ops.blur_kernels(params["sigma"], config.blur_radius)
    chunk = CPU_CHUNK if pixels.is_cpu else DEVICE_CHUNK
    for start in range(0, count, chunk):
        at = slice(start, start + chunk)
        view = ops.resample(pixels[at], *(line[at] for line in lines), padding=padding)
        view = ops.recolour(view, *(matrix[at] for matrix in colour))
        # on a device asking which rows are blurred would wait; there all of them go the same way
        rows = params["sigma"][at].nonzero()[:, 0] if pixels.is_cpu else None
        if rows is None or len(rows) == len(view):
            view = ops.blur(view, kernels[at], basis, dtype)
        elif len(rows):
            view[rows] = ops.blur(view[rows], kernels[at][rows], basis, dtype).float()
        torch.mul(view, norm[0], out=out[at]).add_(norm[1])
        if config.erase > 0:
            out[at].mul_(ops.keep_mask(params["erase"][at], window))


def _draw_theta(
    config: ViewConfig, u: torch.Tensor, boxes: torch.Tensor, *, stored: int, window: int
) -> torch.Tensor:
    """The affine map [n, 2, 3] from a view's square -1..1 to that of the stored crop."""
    width, height = ops.draw_crop_sizes(boxes, scale=config.scale, ratio=config.ratio)
    half_x = torch.where(u[4] < config.hflip, -width, width) * (window / stored)
    half_y = torch.where(u[5] < config.vflip, -height, height) * (window / stored)
    x = (2 * u[1] - 1) * (1 - width) * (window / stored)
    y = (2 * u[2] - 1) * (1 - height) * (window / stored)
    move = (2 * u[2:4] - 1) * (2 * config.shift / stored)
    angle = u[0] * (2 * math.pi if config.rotate else 0.0)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * half_x, -sin * half_y, cos * x - sin * y + move[0]], 1),
        torch.stack([sin * half_x, cos * half_y, sin * x + cos * y + move[1]], 1),
    ]
    return torch.stack(rows, 1)


def _stays_inside(config: ViewConfig, stored: int, window: int) -> bool:
    """Whether no view can need a pixel from outside its stored crop."""
    reach = window / 2 * (math.sqrt(2) if config.rotate else 1.0) + config.shift
    return reach <= stored / 2


@functools.cache
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand, each [3, 1, 1], that normalise pixels in 0..1."""
    both = torch.tensor([list(mean), list(std)], dtype=torch.float64)
    if both.shape != (2, 3) or not (both[1] > 0).all():
        raise ValueError(f"mean {mean} and std {std} must be three numbers each, std above 0")
    scale = (1 / both[1]).view(3, 1, 1)
    bias = (-both[0] / both[1]).view(3, 1, 1)
    return scale.float().to(device), bias.float().to(device)


def _move(params: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """All parameters to the device in one transfer, which does not wait."""
    if all(value.device == device for value in params.values()):
        return params
    count = len(params["theta"])
    packed = torch.cat([value.reshape(count, -1).float() for value in params.values()], 1)
    if device.type == "cuda":
        packed = packed.pin_memory()
    columns = packed.to(device, non_blocking=True).split(
        [value[:1].numel() for value in params.values()], 1
    )
    return {
        name: column.reshape(value.shape).to(value.dtype)
        for (name, value), column in zip(params.items(), columns, strict=True)
    }


def _check_pixels(pixels: torch.Tensor) -> None:
    square = pixels.ndim == 4 and pixels.shape[1] == pixels.shape[2] and pixels.shape[3] == 3
    if pixels.dtype != torch.uint8 or not square:
        raise ValueError(
            f"crops must be uint8 [B, S, S, 3], not {pixels.dtype} {list(pixels.shape)}"
        )


def _check_window(stored: int, window: int) -> None:
    if not 0 < window <= stored:
        raise ValueError(f"a window of {window} px does not fit into stored crops of {stored} px")
    if (stored - window) % 2:
        raise ValueError(
            f"a window of {window} px has no place in the middle of stored crops of {stored} px: "
            "both must be even, or both odd"
        )
