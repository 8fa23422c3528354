"""ROIs, nuclei and parameters to test views of ROIs with."""

from typing import Any

import torch

from lemon_muse.data import roi_views
from lemon_muse.data.roi_views import Geometry, RoiViewConfig, View

NORM: dict[str, Any] = {"mean": (0.6, 0.35, 0.55), "std": (0.25, 0.2, 0.19)}
UNIT: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
PLAIN: dict[str, Any] = {"jitter": 0.0, "gray": 0.0, "blur": (0.0, 0.0, 0.0)}
Params = list[dict[str, torch.Tensor]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nuclei(
    counts: list[int], side: int, *, seed: int = 0, rim: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Anywhere, `rim` px away from the border of the ROI: points with NaN, and counts."""
    u = torch.rand(len(counts), max(counts), 2, generator=generator(seed))
    points = rim + u * (side - 2 * rim)
    number = torch.tensor(counts)
    points[torch.arange(max(counts)) >= number[:, None]] = torch.nan
    return points, number


def cut(params: Params, at: slice) -> Params:
    return [{name: value[at] for name, value in row.items()} for row in params]


def seen(
    cfg: RoiViewConfig,
    points: torch.Tensor,
    counts: torch.Tensor,
    *,
    side: int,
    mpp: float,
    seed: int,
) -> tuple[list[View], list[Geometry]]:
    """The nuclei of all views of ROIs, without their pixels."""
    params = roi_views.draw(cfg, len(points), generator(seed))
    found = roi_views.place(cfg, params, points, counts, side=side, mpp=mpp)
    none = torch.empty(0)
    return [
        View(none, *roi_views.follow(points, params, found, cfg, view)) for view in range(cfg.views)
    ], found


def neutral(params: Params) -> Params:
    count = len(params[0]["mpp"])
    off = {
        "jitter": torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(count, 1),
        "gray": torch.zeros(count),
        "sigma": torch.zeros(count),
    }
    return [{**row, **off} for row in params]


def tissue(count: int, side: int) -> torch.Tensor:
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=generator(9))
    fine = torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1) * 255
    return fine.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
