"""Views of nucleus crops: random geometry, colour, blur and erasing for a whole batch at once.

A view is made in steps: one bilinear resampling that merges rotation, resized crop, shift and
flips; another stain, where the policy has one; colour; Gaussian blur; erasing and normalisation.
`draw` makes the random numbers, `apply` does the work on whatever device the pixels are on. The
parameters of a view depend on the generator alone, so a rank can draw them for the global batch and
apply its own rows.

What differs from torchvision with the same parameters, measured on 40 px views of BRCA-M2C:

- One bilinear sample instead of rotation, then resized crop: 0.6 grey levels (of 255) on average,
  and a little sharper. Either step alone is equal. Crop boxes are not rounded to whole pixels.
- Colour is one 3x3 matrix with one clamp at the end; torchvision clamps after each operation and
  turns hue in HSV, where this turns the I-Q plane of YIQ. Without hue and clipping both are equal;
  without hue they differ by 0.3 grey levels on average (1 % of values by more than 7), with hue up
  to 0.1 turns by 3.6 (23). Over many views the channel means agree to 0.002 and the standard
  deviations to 0.005 (pixels in 0..1).
- Blur is equal: a Gaussian with reflected borders, cut off at three times the largest sigma.
- Views never hold fill pixels while window * sqrt(2) + 2 * shift <= stored; crops that are smaller
  than that are continued by reflection.
"""

import math
from collections.abc import Sequence

import torch

from lemon_muse.data import augment_draw
from lemon_muse.data import augment_ops as ops
from lemon_muse.data.augment_config import POLICIES, ViewConfig
from lemon_muse.data.stain_views import NUMBERS, Mixture

__all__ = ["POLICIES", "ViewConfig", "apply", "draw", "prepare"]

# Stored pixels per pass: on the CPU what is made on the way should stay in the cache (measured: 32
# crops of 64 px are best, 256 cost 1.6 times as much); on a device it should fit into memory.
CPU_PIXELS = 32 * 64**2
DEVICE_PIXELS = 8192 * 64**2


def draw(
    config: ViewConfig,
    n: int,
    *,
    stored: int,
    window: int,
    generator: torch.Generator,
    view: int = 0,
    stains: Mixture | None = None,
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
        stains: what `config.restain` draws from, of `config.gaussians` Gaussians.

    Returns:
        Tensors whose first dimension is n, to be sliced together: `theta` float32 [n, 2, 3] (the
        affine map of `torch.nn.functional.affine_grid`, align_corners=False), `jitter` float32
        [n, 4] (brightness, contrast and saturation factors, hue in turns), `order` int64 [n, 4]
        (which of them comes first, second, ...), `gray` float32 [n] (0 or 1), `sigma` float32 [n]
        (pixels, 0 for no blur) and `erase` float32 [n, 4] (top, bottom, left, right in pixels).
        Where `config` changes stains also `stain` float32 [n, 2, 3] (rows of H and E) and `restain`
        float32 [n] (0 or 1), and `hed` float32 [n, 4] (two factors, two summands): what
        `stain_views.Stains.change` makes a matrix of.

    Raises:
        ValueError: the window does not fit into the stored crop, or not in its middle; `stains` are
            needed.
    """
    _check_window(stored, window)
    # Rows of random numbers: 0-6 geometry, 7-12 colour, 13-14 blur, 15-17 erasing, then two boxes.
    u = torch.rand(58, n, generator=generator)
    order = torch.rand(n, 4, generator=generator).argsort(1)
    of_stain = torch.rand(NUMBERS + 5, n, generator=generator)
    colour = augment_draw.draw_colour(
        u[7:15],
        order,
        strength=(config.brightness, config.contrast, config.saturation, config.hue),
        jitter=config.jitter,
        gray=config.gray,
        blur=config.blur[0 if view == 0 else 1],
        blur_sigma=config.blur_sigma,
    )
    erase = augment_draw.draw_rectangles(
        u[38:], u[15:17], scale=config.erase_scale, ratio=config.erase_ratio, side=window
    )
    return {
        "theta": _draw_theta(config, u[:7], u[18:38], stored=stored, window=window),
        **colour,
        "erase": erase * (u[17] < config.erase)[:, None],
        **_draw_stain(config, of_stain, stains),
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
    stain: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        dtype: torch.bfloat16 blurs in bfloat16: faster; off by up to 0.01, pixels in 0..1.
        stain: matrix [B, 3, 3] and summand [B, 3] of `stain_views.Stains.change`, for the optical
            densities before any other colour; None leaves the stains as they are.

    Returns:
        float32 [B, 3, w, w], normalised.

    Raises:
        ValueError: wrong kind or shape of pixels, as many parameters as crops are not there, or
            `stain` is not.
    """
    _check_pixels(pixels)
    count, stored = pixels.shape[:2]
    _check_window(stored, window)
    if len(params["theta"]) != count:
        raise ValueError(f"{count} crops need as many parameters, not {len(params['theta'])}")
    out = torch.empty(count, 3, window, window, device=pixels.device)
    if not count:
        return out
    if stain is None and {"restain", "hed"} & params.keys():
        raise ValueError("these views have other stains: give stain=, of `stain_views`")
    if stain is not None:
        params = {**params, "matrix": stain[0], "summand": stain[1]}
    moved = ops.to_device(params, pixels.device)
    norm = ops.normalisation(tuple(mean), tuple(std), pixels.device)
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
    scale, bias = ops.normalisation(tuple(mean), tuple(std), pixels.device)
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
    padding = "border" if reach(config, window) <= stored / 2 else "reflection"
    basis = ops.blur_basis(window, config.blur_radius, pixels.device)
    lines = ops.grid_lines(params["theta"], window)
    colour = ops.colour_matrices(params["jitter"], params["order"], params["gray"])
    kernels = ops.blur_kernels(params["sigma"], config.blur_radius)
    chunk = max(1, (CPU_PIXELS if pixels.is_cpu else DEVICE_PIXELS) // stored**2)
    for start in range(0, count, chunk):
        at = slice(start, start + chunk)
        view = ops.resample(pixels[at], *(line[at] for line in lines), padding=padding)
        if "matrix" in params:
            view = ops.restain(view, params["matrix"][at], params["summand"][at])
        ops.finish(
            view,
            out[at],
            colour=(colour[0][at], colour[1][at]),
            sigma=params["sigma"][at],
            kernels=kernels[at],
            basis=basis,
            norm=norm,
            dtype=dtype,
        )
        if config.erase > 0:
            out[at].mul_(ops.keep_mask(params["erase"][at], window))


def _draw_stain(
    config: ViewConfig, u: torch.Tensor, stains: Mixture | None
) -> dict[str, torch.Tensor]:
    """What of a view's stain is drawn: nothing where the policy leaves stains alone."""
    drawn = {}
    if config.restain > 0:
        if stains is None:
            raise ValueError("a view that is stained anew needs the stains of the slides")
        drawn = {"stain": stains.draw(u[1:NUMBERS]), "restain": (u[0] < config.restain).float()}
    if config.hed > 0:
        strength = {"probability": config.hed, "width": config.hed_range}
        drawn["hed"] = augment_draw.draw_hed(u[NUMBERS:], **strength)
    return drawn


def _draw_theta(
    config: ViewConfig, u: torch.Tensor, boxes: torch.Tensor, *, stored: int, window: int
) -> torch.Tensor:
    """The affine map [n, 2, 3] from a view's square -1..1 to that of the stored crop."""
    if config.centred:
        # Log-uniform: zooming in and out by the same factor are equally likely.
        (low, high), (narrow, wide) = config.scale, config.ratio
        side = (low * (high / low) ** u[1]).sqrt()
        aspect = (narrow * (wide / narrow) ** u[2]).sqrt()
        width, height = side * aspect, side / aspect
    else:
        width, height = augment_draw.draw_crop_sizes(boxes, scale=config.scale, ratio=config.ratio)
    half_x = torch.where(u[3] < config.hflip, -width, width) * (window / stored)
    half_y = torch.where(u[4] < config.vflip, -height, height) * (window / stored)
    free = 0.0 if config.centred else window / stored
    x = (2 * u[1] - 1) * (1 - width) * free
    y = (2 * u[2] - 1) * (1 - height) * free
    move = (2 * u[5:7] - 1) * (2 * config.shift / stored)
    angle = u[0] * (2 * math.pi if config.rotate else 0.0)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * half_x, -sin * half_y, cos * x - sin * y + move[0]], 1),
        torch.stack([sin * half_x, cos * half_y, sin * x + cos * y + move[1]], 1),
    ]
    return torch.stack(rows, 1)


def reach(config: ViewConfig, window: int) -> float:
    """Distance in px from the middle of a crop to the farthest pixel that a view can need."""
    side = 1.0
    if config.centred:
        side = math.sqrt(config.scale[1] * max(config.ratio[1], 1 / config.ratio[0]))
    return side * window / 2 * (math.sqrt(2) if config.rotate else 1.0) + config.shift


def stored_size(config: ViewConfig, window: int) -> int:
    """Side of stored crops, a multiple of 16, that holds every pixel that a view can need."""
    return math.ceil(max(reach(config, window), window / 2) / 8) * 16


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
