"""Views of ROIs at several scales, with their nuclei, for a whole batch at once.

`draw` makes the random numbers of a step for the global batch; `place` decides which square of its
ROI every view shows; `apply` makes one view of every ROI of a rank, pixels and nuclei, on whatever
device the pixels are on: one resampling, colour, Gaussian blur, normalisation. Colour, grey and
blur are those of `augment`, whose differences from torchvision are listed there.

A batch of ROIs of one side S and one mpp is `pixels` uint8 [b, S, S, 3], `points` float32 [b, n, 2]
(nuclei, continuous px of the ROI; rows past the count are NaN) and `counts` int64 [b].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lemon_muse.data import augment_draw
from lemon_muse.data import augment_ops as ops
from lemon_muse.data.roi_nuclei import cap, within
from lemon_muse.data.roi_place import Geometry, Params, check_rows, place
from lemon_muse.data.roi_resample import Windows, move, resample
from lemon_muse.data.roi_views_config import RoiViewConfig
from lemon_muse.errors import UserError

__all__ = ["Geometry", "RoiViewConfig", "View", "apply", "check", "draw", "follow", "make", "place"]

COLOUR = ("jitter", "order", "gray", "sigma")
# Pixels of views per pass: on the CPU what is made on the way should stay in the cache.
CPU_PIXELS = 32 * 64**2
DEVICE_PIXELS = 8192 * 64**2


@dataclass(frozen=True)
class View:
    """One view of every ROI.

    Attributes:
        images: float32 [b, 3, s, s], normalised.
        points: float32 [b, n, 2], the nuclei, continuous px of the view; those outside of it too.
        inside: bool [b, n], the nuclei to match: at least `margin` from the border, at most `cap`.
    """

    images: torch.Tensor
    points: torch.Tensor
    inside: torch.Tensor


def check(cfg: RoiViewConfig, side: int, mpp: float) -> None:
    """Refuse ROIs that are too small for the views.

    Args:
        cfg: the distribution of the views.
        side: of the ROIs, pixels.
        mpp: µm per pixel of the ROIs.

    Raises:
        UserError: a view does not fit into a ROI even at the finest mpp of its range.
    """
    for kind, view in (("global", 0), ("local", cfg.globals)):
        if view >= cfg.views:
            continue
        size, finest = cfg.size(view), cfg.mpp(view)[0]
        # A hair of tolerance: 224 px at 0.25 µm just fit into 112 px at 0.5 µm.
        if size * finest > side * mpp * (1 + 1e-6):
            raise UserError(
                f"A {kind} view of {size} px at {finest:g} µm per pixel shows {size * finest:g} µm,"
                f" but the ROIs are {side * mpp:g} µm wide ({side} px at {mpp:g}); make {kind}_size"
                f" at most {math.floor(side * mpp / finest + 1e-6)}, make the first number of "
                f"{kind}_mpp smaller, or prepare larger ROIs."
            )


def draw(cfg: RoiViewConfig, count: int, generator: torch.Generator) -> Params:
    """Draw the parameters of all views of `count` ROIs, on the CPU.

    They do not depend on the ROIs. Probabilities and ranges do not change how many random numbers
    are taken, and more local views leave the parameters of the others as they were.

    Args:
        cfg: the distribution.
        count: number of ROIs; the *global* batch, so that a rank can take its rows.
        generator: a CPU generator, the only source of randomness.

    Returns:
        One dict per view, global views first. First dimension `count`: `mpp` float32 (wanted; see
        `place`), `u_offset` float32 [count, 2] in 0..1, `turn` int64 in 0..7 (`Windows.turn`), and
        `jitter`, `order`, `gray`, `sigma` as `augment.draw`. The first dict also has `u_anchor`
        float32 in 0..1, which picks the anchor, and `priority_seed` int64, of the nuclei that the
        cap spares.
    """
    views: Params = []
    of_roi = {
        "u_anchor": torch.rand(count, generator=generator),
        "priority_seed": torch.randint(2**24, (count,), generator=generator),
    }
    for view in range(cfg.views):
        # Rows of random numbers: 0 mpp, 1-2 offset, 3 turn, 4-11 colour and blur.
        u = torch.rand(12, count, generator=generator)
        order = torch.rand(count, 4, generator=generator).argsort(1)
        low, high = cfg.mpp(view)
        colour = augment_draw.draw_colour(
            u[4:],
            order,
            strength=(cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue),
            jitter=cfg.jitter,
            gray=cfg.gray,
            blur=cfg.blur_probability(view),
            blur_sigma=cfg.blur_sigma,
        )
        views.append(
            {
                "mpp": low * (high / low) ** u[0],
                "u_offset": u[1:3].T.contiguous(),
                "turn": (u[3] * 8).long() * cfg.turns,
                **colour,
                **(of_roi if view == 0 else {}),
            }
        )
    return views


@torch.no_grad()
def make(
    batch: dict[str, Any],
    cfg: RoiViewConfig,
    *,
    mpp: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[list[View], list[Geometry]]:
    """All views of a batch: pixels on their device and blurred in autocast's dtype.

    Args:
        batch: 'pixels', 'points', 'counts' (see the module's docstring) and 'views', rows of what
            `draw` returned.
        cfg: the distribution that they come from.
        mpp: µm per pixel of the ROIs.
        mean: as for `apply`.
        std: as for `apply`.

    Returns:
        The views and where they lie, global ones first; nuclei and places on the CPU.
    """
    pixels, params = batch["pixels"], batch["views"]
    points, counts = batch["points"].cpu(), batch["counts"].cpu()
    found = place(cfg, params, points, counts, side=pixels.shape[1], mpp=mpp)
    dtype = ops.autocast_dtype(pixels.device)
    views = []
    for v in range(cfg.views):
        made = apply(pixels, points, params, found, cfg, v, mean=mean, std=std, dtype=dtype)
        # Matching runs on the CPU: there nobody waits for the device.
        views.append(View(made.images, *follow(points, params, found, cfg, v)))
    return views, found


@torch.no_grad()
def apply(
    pixels: torch.Tensor,
    points: torch.Tensor,
    params: Params,
    geometry: Sequence[Geometry],
    cfg: RoiViewConfig,
    view: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> View:
    """Make one view of every ROI, on the device of the pixels.

    On the CPU the result of a row depends on that row alone, bit for bit, however the batch is cut.

    Args:
        pixels: uint8 [b, S, S, 3], RGB.
        points: float32 [b, n, 2], as for `place`.
        params: rows of what `draw` returned.
        geometry: what `place` returned for them.
        cfg: the distribution that the parameters come from.
        view: which of the views, 0 for the first.
        mean: per channel, of pixels in 0..1; subtracted.
        std: per channel, of pixels in 0..1; divided by.
        dtype: torch.bfloat16 blurs in bfloat16: faster; off by up to 0.01, pixels in 0..1.

    Raises:
        ValueError: wrong kind or shape of pixels, or a number of rows that does not fit.
    """
    square = pixels.ndim == 4 and pixels.shape[1] == pixels.shape[2] and pixels.shape[3] == 3
    if pixels.dtype != torch.uint8 or not square or len(pixels) != len(points):
        raise ValueError(
            f"ROIs must be uint8 [b, S, S, 3] with as many rows as points ({len(points)}), not "
            f"{pixels.dtype} {list(pixels.shape)}"
        )
    check_rows(cfg, params, len(pixels))
    device, size = pixels.device, cfg.size(view)
    row, windows = _here(params, geometry, view, device)
    images = torch.empty(len(pixels), 3, size, size, device=device)
    norm = ops.normalisation(tuple(mean), tuple(std), device)
    with torch.autocast(device.type, enabled=False):
        _paint(pixels, windows, row, cfg, images, norm=norm, dtype=dtype)
    return View(images, *_follow(points.to(device, non_blocking=True), row, windows, cfg, size))


@torch.no_grad()
def follow(
    points: torch.Tensor,
    params: Params,
    geometry: Sequence[Geometry],
    cfg: RoiViewConfig,
    view: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nuclei of one view without its pixels: `points` and `inside` of a `View`.

    Arguments as for `apply`; on the device of the points.
    """
    row, windows = _here(params, geometry, view, points.device)
    return _follow(points, row, windows, cfg, cfg.size(view))


def _here(
    params: Params, geometry: Sequence[Geometry], view: int, device: torch.device
) -> tuple[dict[str, torch.Tensor], Windows]:
    """What one view needs, on the device, without making the CPU wait."""
    row = {name: params[view][name] for name in (*COLOUR, "turn")}
    row = ops.to_device({**row, "priority_seed": params[0]["priority_seed"]}, device)
    here = geometry[view]
    where = {"corner": here.corner, "extent": here.extent, "anchor": here.anchor}
    where = ops.to_device(where, device)
    windows = Windows(where["corner"], where["extent"], row["turn"], here.most)
    return {**row, "anchor": where["anchor"]}, windows


def _follow(
    points: torch.Tensor,
    row: dict[str, torch.Tensor],
    windows: Windows,
    cfg: RoiViewConfig,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    moved = move(points, windows, size=size)
    inside = within(moved, size=size, margin=cfg.margin)
    return moved, cap(inside, row["priority_seed"], row["anchor"], most=cfg.cap)


def _paint(
    pixels: torch.Tensor,
    windows: Windows,
    params: dict[str, torch.Tensor],
    cfg: RoiViewConfig,
    out: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Fill `out` chunk by chunk."""
    size = out.shape[-1]
    basis = ops.blur_basis(size, cfg.blur_radius, pixels.device)
    colour = ops.colour_matrices(params["jitter"], params["order"], params["gray"])
    kernels = ops.blur_kernels(params["sigma"], cfg.blur_radius)
    chunk = max(1, (CPU_PIXELS if pixels.is_cpu else DEVICE_PIXELS) // size**2)
    for start in range(0, len(pixels), chunk):
        at = slice(start, start + chunk)
        ops.finish(
            resample(pixels[at], windows.rows(at), size=size),
            out[at],
            colour=(colour[0][at], colour[1][at]),
            sigma=params["sigma"][at],
            kernels=kernels[at],
            basis=basis,
            norm=norm,
            dtype=dtype,
        )
