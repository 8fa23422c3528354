"""Placement of views and the nuclei in them: painted dots, plain loops, shares of empty pairs."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from lemon_muse.data import roi_nuclei, roi_views
from lemon_muse.data.roi_views import RoiViewConfig
from tests.data.roi_reference import (
    PLAIN,
    UNIT,
    generator,
    nuclei,
    seen,
)

# Placement --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "mpp"), [(456, 0.5), (2048, 0.25), (130, 0.5)])
@pytest.mark.parametrize("placement", ["anchored", "independent"])
def test_views_lie_in_their_roi_and_hold_the_anchor(side: int, mpp: float, placement: Any) -> None:
    cfg = RoiViewConfig(placement=placement)
    points, counts = nuclei([0, 1, 400, 7] * 50, side)
    views, found = seen(cfg, points, counts, side=side, mpp=mpp, seed=3)
    for view, here in zip(views, found, strict=True):
        assert (here.corner >= 0).all()
        assert (here.corner + here.extent[:, None] <= side * (1 + 1e-6)).all()
        assert (here.extent <= here.most * (1 + 1e-6)).all()
        assert torch.equal(here.anchor, found[0].anchor)
        assert view.inside.sum(1).max() <= cfg.cap
    anchor = found[0].anchor
    if placement == "independent":
        assert (anchor == -1).all()
        return
    assert (anchor[counts == 0] == -1).all() and (anchor[counts > 0] >= 0).all()
    for i in range(200):
        if counts[i] == 0:
            continue
        x, y = points[i, anchor[i]].tolist()
        deepest = min(x, y, side - x, side - y)
        need = max(4.0 * float(h.extent[i]) / cfg.size(v) for v, h in enumerate(found))
        held = [bool(view.inside[i, anchor[i]]) for view in views]
        if deepest > need + 0.05:
            assert all(held)
        else:  # then no nucleus of this ROI was in reach of all views
            others = torch.minimum(points[i, : counts[i]], side - points[i, : counts[i]]).amin(1)
            assert others.max() <= need + 0.05


def test_the_anchor_is_any_nucleus_anywhere_in_the_middle() -> None:
    side, count = 2048, 4000
    cfg = RoiViewConfig(locals=1)
    points, counts = nuclei([5] * count, side, rim=448)
    points = points[:1].expand(count, -1, -1).contiguous()
    views, found = seen(cfg, points, counts, side=side, mpp=0.25, seed=0)
    share = torch.bincount(found[0].anchor, minlength=5) / count
    assert (share - 0.2).abs().max() < 0.03
    cuts = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    for v, view in enumerate(views):
        at = view.points[torch.arange(count), found[0].anchor] / cfg.size(v)
        for axis in (0, 1):
            wanted = 0.1 + 0.8 * cuts
            assert (at[:, axis].quantile(cuts) - wanted).abs().max() < 0.03
        ratio = (found[v].mpp / 0.25).log2()
        assert (ratio.quantile(cuts) - cuts).abs().max() < 0.03, "log-uniform"
    # Views of one ROI are placed independently about their anchor.
    pair = torch.stack([v.points[torch.arange(count), found[0].anchor][:, 0] for v in views])
    assert (torch.corrcoef(pair) - torch.eye(3)).abs().max() < 0.06


def test_no_pair_is_empty_where_a_nucleus_is_in_reach() -> None:
    """Also with one nucleus, a cap of one, a wide margin, odd sizes and crowded ROIs."""
    for side, mpp, changes in (
        (2048, 0.25, {}),
        (456, 0.5, {}),
        (2048, 0.25, {"cap": 1}),
        (600, 0.25, {"global_size": 112, "local_size": 37, "margin": 9.25, "cap": 3}),
        (300, 0.3, {"global_size": 208, "local_size": 96, "local_mpp": (0.2, 1.0)}),
    ):
        cfg = RoiViewConfig.model_validate(changes)
        rim = max(cfg.margin * cfg.mpp(v)[1] / mpp for v in (0, cfg.globals)) + 1
        points, counts = nuclei([1, 2, 30, 700] * 50, side, rim=rim)
        views, _ = seen(cfg, points, counts, side=side, mpp=mpp, seed=1)
        assert roi_nuclei.empty_share(views, cfg.globals) == 0
        assert all(view.inside.sum(1).max() <= cfg.cap for view in views)
        loose = cfg.model_copy(update={"placement": "independent"})
        views, _ = seen(loose, points, counts, side=side, mpp=mpp, seed=1)
        assert roi_nuclei.empty_share(views, cfg.globals) > 0.05, "or the test would be void"


def test_empty_pairs_of_independent_views_in_large_rois() -> None:
    """MUSE's 2048 px at 0.25: most independent pairs share nothing, whatever the density."""
    cfg = RoiViewConfig(placement="independent", locals=2)
    points, counts = nuclei([262] * 400, 2048)  # 1000 nuclei per mm²
    views, _ = seen(cfg, points, counts, side=2048, mpp=0.25, seed=0)
    empty = [[], []]
    for _, s, both in roi_nuclei.matched(views, 2):
        empty[s >= 2].append(float((~both.any(1)).float().mean()))
    assert 0.8 < np.mean(empty[0]) < 0.93, "two global views"
    assert 0.92 < np.mean(empty[1]) < 0.98, "a global and a local view"


# Nuclei travel with the pixels ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_size", "local_size", "side", "mpp"),
    [(224, 96, 456, 0.5), (512, 208, 700, 0.25), (112, 37, 300, 0.35)],
)
def test_painted_dots_land_where_the_coordinates_say(
    global_size: int, local_size: int, side: int, mpp: float
) -> None:
    cfg = RoiViewConfig.model_validate(
        {**PLAIN, "global_size": global_size, "local_size": local_size, "locals": 6}
    )
    count, grid = 12, 24.0
    # One dot in each cell of a grid, so that none touches another.
    line = (torch.arange(int(side // grid)) + 0.5) * grid
    middle = torch.cartesian_prod(line, line)
    points = middle + (torch.rand(count, len(middle), 2, generator=generator()) - 0.5) * (grid - 16)
    counts = torch.full((count,), len(middle))
    pixels = torch.stack([paint(row.numpy(), side) for row in points])
    params = roi_views.draw(cfg, count, generator())
    for v, row in enumerate(params):
        row["turn"] = (torch.arange(count) * 3 + v) % 8
    found = roi_views.place(cfg, params, points, counts, side=side, mpp=mpp)
    checked = 0
    for v in range(cfg.views):
        view = roi_views.apply(pixels, points, params, found, cfg, v, **UNIT)
        for i in range(count):
            scale = mpp / float(found[v].mpp[i])  # px of the view per px of the ROI
            half = math.floor(7 * scale)
            for x, y in view.points[i].tolist():
                if not half + 1 <= min(x, y) <= max(x, y) <= cfg.size(v) - half - 1:
                    continue
                x0, y0 = round(x) - half, round(y) - half
                dark = 1 - view.images[i, 0, y0 : y0 + 2 * half, x0 : x0 + 2 * half].double()
                at = torch.arange(2 * half) + 0.5
                cx = float((dark.sum(0) * at).sum() / dark.sum()) + x0
                cy = float((dark.sum(1) * at).sum() / dark.sum()) + y0
                assert math.hypot(cx - x, cy - y) < 0.1
                checked += 1
    assert checked > 300


def paint(points: np.ndarray, side: int) -> torch.Tensor:
    """Black discs of 3 px across on white, each pixel the mean of 8 x 8 samples."""
    fine = np.ones((side, side))
    sample = (np.arange(8) + 0.5) / 8
    for x, y in points:
        x0, y0 = int(x) - 3, int(y) - 3
        sx = (x0 + np.arange(7)[:, None] + sample).ravel() - x
        sy = (y0 + np.arange(7)[:, None] + sample).ravel() - y
        disc = (sy[:, None] ** 2 + sx**2) < 1.5**2
        fine[y0 : y0 + 7, x0 : x0 + 7] -= disc.reshape(7, 8, 7, 8).mean((1, 3))
    grey = torch.from_numpy((fine * 255).round().astype(np.uint8))
    return grey[..., None].expand(-1, -1, 3).contiguous()


def test_what_is_inside_equals_a_plain_loop() -> None:
    cfg = RoiViewConfig(cap=12, locals=3)
    points, counts = nuclei([0, 3, 90, 250, 40], 500)
    views, found = seen(cfg, points, counts, side=500, mpp=0.25, seed=5)
    number = views[0].inside.shape[1]
    for v, (view, here) in enumerate(zip(views, found, strict=True)):
        size = cfg.size(v)
        for i in range(5):
            x0, y0 = here.corner[i].tolist()
            scale = size / float(here.extent[i])
            near = [
                j
                for j in range(int(counts[i]))
                if 4 <= (float(points[i, j, 0]) - x0) * scale <= size - 4
                and 4 <= (float(points[i, j, 1]) - y0) * scale <= size - 4
            ]
            kept = view.inside[i].nonzero()[:, 0].tolist()
            assert set(kept) <= set(near) and len(kept) == min(len(near), 12)
            assert len(near) <= 12 or int(here.anchor[i]) in kept
        keys, where, rows = roi_nuclei.keys(view, row_offset=7)
        pairs = [(i, j) for i in range(5) for j in range(number) if view.inside[i, j]]
        assert keys.tolist() == [(i + 7) * number + j for i, j in pairs]
        assert rows.tolist() == [i for i, _ in pairs]
        wanted = torch.stack([view.points[i, j] for i, j in pairs])
        assert torch.equal(where, wanted) and not where.isnan().any()


def test_the_cap_prefers_the_same_nuclei_in_all_views() -> None:
    """Two capped views share min(cap, shared) where they show the same; far more than by chance."""
    cfg = RoiViewConfig(cap=40, locals=0)
    points, counts = nuclei([3000] * 40, 600)
    views, _ = seen(cfg, points, counts, side=600, mpp=0.25, seed=2)
    loose, _ = seen(
        cfg.model_copy(update={"cap": 3000}), points, counts, side=600, mpp=0.25, seed=2
    )
    both = (views[0].inside & views[1].inside).sum(1).double()
    shared = (loose[0].inside & loose[1].inside).sum(1).double()
    most = torch.stack([view.inside.sum(1) for view in loose]).amax(0)
    assert all((view.inside.sum(1) == 40).all() for view in views)
    # A shared nucleus is kept by both if it is among the first 40 of the view that holds more.
    assert (both / (40 * shared / most)).mean() > 0.9
    by_chance = 40 * 40 * shared / (loose[0].inside.sum(1) * loose[1].inside.sum(1))
    assert both.mean() > 10 * by_chance.mean()
    whole = torch.ones(40, 3000, dtype=torch.bool)
    one = roi_nuclei.cap(whole, torch.arange(40), torch.full((40,), -1), most=500)
    assert (one.sum(1) == 500).all()
    assert abs(one.double().mean(0).std() - (1 / 6 * 5 / 6 / 40) ** 0.5) < 0.01, "no index is liked"
    for ours, theirs in ((one[:-1], one[1:]), (one[:-1, 1:], one[1:, :-1])):
        joint = (ours & theirs).double().mean()
        assert abs(joint - 1 / 36) < 0.003, "and seeds that follow each other are independent"
