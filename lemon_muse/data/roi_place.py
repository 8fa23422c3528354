"""Which square of its ROI every view shows, so that the views of a ROI share nuclei.

Two views placed anywhere in MUSE's ROIs of 2048 px at 0.25 µm mostly share no nucleus (two global
views in 90 to 93 % of cases, a global and a local one in 96 to 98 %, at 5000 to 1000 nuclei per
mm²; measured), and then the loss over
nuclei has nothing to work with. Anchored views all contain one nucleus of their ROI.
"""

from dataclasses import dataclass

import torch

from lemon_muse.data.augment_ops import to_device
from lemon_muse.data.roi_views_config import RoiViewConfig

DRAWN = ("mpp", "u_offset")
INNER = 0.8  # the anchor lies in this middle part of a view, fraction of its side
SLACK = 0.01  # px of the view: more than rounding can move a nucleus at the margin

Params = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Geometry:
    """Which square of its ROI one view shows, for every ROI.

    Attributes:
        corner: float32 [b, 2], x and y of its top-left corner, continuous px of the ROI.
        extent: float32 [b], its side, px of the ROI.
        mpp: float32 [b], µm per pixel of the view.
        anchor: int64 [b], the nucleus (row of `points`) that all views contain; -1 for none.
        most: largest extent that is possible, px of the ROI.
    """

    corner: torch.Tensor
    extent: torch.Tensor
    mpp: torch.Tensor
    anchor: torch.Tensor
    most: float


@torch.no_grad()
def place(
    cfg: RoiViewConfig,
    params: Params,
    points: torch.Tensor,
    counts: torch.Tensor,
    *,
    side: int,
    mpp: float,
) -> list[Geometry]:
    """Decide which square of its ROI every view shows; all of it lies in the ROI.

    Where a ROI is smaller than the view at the drawn mpp, the view shows the whole ROI at the mpp
    that this takes: finer than drawn.

    Anchored: one nucleus of the ROI, any with equal chance, lies in all views, evenly spread over
    their middle 80 % as far as the border of the ROI allows. Nuclei so near that border that a view
    would hold them in its margin are taken only where there are no others. A ROI without nuclei,
    and every ROI if `placement` is independent, gets views anywhere, evenly spread.

    Args:
        cfg: the distribution that the parameters come from.
        params: rows of what `draw` returned.
        points: float32 [b, n, 2], nuclei, continuous px of the ROI; NaN past the count.
        counts: int64 [b], nuclei of each ROI, on the device of the points.
        side: of the ROIs, pixels.
        mpp: µm per pixel of the ROIs.

    Returns:
        One `Geometry` per view, on the device of the points.

    Raises:
        ValueError: as many views or rows of parameters as `cfg` and the points need are not there.
    """
    check_rows(cfg, params, len(points))
    device = points.device
    wanted = {f"{name}{v}": params[v][name] for v in range(cfg.views) for name in DRAWN}
    u = to_device({**wanted, "u_anchor": params[0]["u_anchor"]}, device)
    extents = [(cfg.size(v) / mpp * u[f"mpp{v}"]).clamp(max=side) for v in range(cfg.views)]
    # How far from the ROI's border a nucleus must lie so that each view can hold it in its inside.
    reach = torch.stack(
        [extent * ((cfg.margin + SLACK) / cfg.size(v)) for v, extent in enumerate(extents)]
    ).amax(0)
    anchor = torch.full((len(points),), -1, dtype=torch.int64, device=device)
    if cfg.placement == "anchored" and points.shape[1]:
        anchor = _pick(points, counts, reach, u["u_anchor"], side=side)
    there = anchor.clamp(min=0)[:, None, None].expand(-1, 1, 2)
    target = points.gather(1, there)[:, 0] if points.shape[1] else points.new_zeros(len(points), 2)
    found = []
    for view, extent in enumerate(extents):
        size, offset = cfg.size(view), u[f"u_offset{view}"]
        free = (side - extent)[:, None]
        rim = max((1 - INNER) / 2, (cfg.margin + SLACK) / size)
        about = target - (rim + (1 - 2 * rim) * offset) * extent[:, None]
        corner = torch.where((anchor >= 0)[:, None], about, offset * free)
        corner = torch.minimum(corner.clamp(min=0), free)
        most = min(size * cfg.mpp(view)[1] / mpp, float(side))
        found.append(Geometry(corner, extent, extent * (mpp / size), anchor, most))
    return found


def _pick(
    points: torch.Tensor,
    counts: torch.Tensor,
    reach: torch.Tensor,
    u: torch.Tensor,
    *,
    side: int,
) -> torch.Tensor:
    """Pick one nucleus of every ROI: evenly among those away from the border, else among all.

    Args:
        points: float32 [b, n, 2], continuous px of the ROI, n >= 1.
        counts: int64 [b], nuclei of each ROI.
        reach: float32 [b], what counts as away from the border, px of the ROI.
        u: float32 [b], uniform numbers.
        side: of the ROIs, pixels.

    Returns:
        int64 [b], rows of `points`; -1 for ROIs without nuclei.
    """
    valid = torch.arange(points.shape[1], device=points.device) < counts[:, None]
    deep = torch.minimum(points, side - points).amin(2) >= reach[:, None]
    good = valid & deep
    good = torch.where(good.any(1, keepdim=True), good, valid)
    number = good.sum(1)
    # u < 1, but in float32 u * number can round up to number
    wanted = torch.minimum((u * number).long(), number - 1)
    picked = (good.cumsum(1) > wanted[:, None]).to(torch.uint8).argmax(1)
    return torch.where(number > 0, picked, -1)


def check_rows(cfg: RoiViewConfig, params: Params, count: int) -> None:
    """Raise ValueError unless there are parameters of all views for `count` ROIs."""
    rows = {len(value) for row in params for value in row.values()}
    if len(params) != cfg.views or rows != {count}:
        raise ValueError(
            f"{count} ROIs need {cfg.views} views of {count} rows of parameters, not "
            f"{len(params)} views of {sorted(rows)}"
        )
