"""Crops out of ROIs against loops over nuclei and the one definition of a crop."""

import numpy as np
import pytest
import torch

from lemon_muse.data import geometry
from lemon_muse.data.roi_crops import choose, cut, window_px


def some_rois(count: int, side: int, room: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    points = rng.uniform(0, side, (count, room, 2)).astype(np.float32)
    return torch.from_numpy(pixels), torch.from_numpy(points)


def all_of(count: int, room: int, most: int) -> tuple[torch.Tensor, ...]:
    """Arguments of `choose`: every nucleus is seen."""
    counts = torch.full((count,), room)
    return torch.ones(count, room, dtype=torch.bool), counts, torch.arange(count), counts * 0 - 1


@pytest.mark.parametrize("size", [16, 17, 100])
def test_crops_are_those_of_geometry_also_at_and_beyond_the_border(size: int) -> None:
    pixels, points = some_rois(3, 48, 12, seed=1)
    points[:, 0] = torch.tensor([0.0, 47.999])
    points[:, 1] = torch.tensor([24.5, 0.5])
    chosen = choose(*all_of(3, 12, 12), most=12)
    found = cut(pixels, points, chosen, size=size, mpp=0.25, wanted=0.252).numpy()
    assert found.shape == (36, size, size, 3) and chosen.real.all()
    for roi in range(3):
        expected, _ = geometry.crop(pixels[roi].numpy(), points[roi].numpy(), size=size)
        np.testing.assert_array_equal(found[roi * 12 : roi * 12 + 12], expected)


def test_another_mpp_is_that_of_the_whole_roi_resampled() -> None:
    """At whole pixels both grids agree; near a crop's border the filter lacks what is outside."""
    pixels, _ = some_rois(1, 64, 1, seed=2)
    points = torch.tensor([[[20.0, 30.0], [40.0, 33.0], [32.0, 32.0]]])
    chosen = choose(*all_of(1, 3, 3), most=3)
    for wanted, size in ((0.25, 32), (1.0, 12)):
        found = cut(pixels, points, chosen, size=size, mpp=0.5, wanted=wanted).numpy()
        whole, scale = geometry.resample(pixels[0].numpy(), source_mpp=0.5, mpp=wanted)
        expected, _ = geometry.crop(whole, points[0].numpy() * scale, size=size)
        inner = slice(3, -3)
        apart = np.abs(found[:, inner, inner].astype(int) - expected[:, inner, inner])
        if wanted < 0.5:
            assert apart.max() <= 1
        else:  # the third point alone lies on a pixel's corner of the coarser grid
            assert apart[2].max() <= 1
    assert window_px(64, mpp=0.5, wanted=0.25) == 32
    assert window_px(64, mpp=0.254, wanted=0.25) == 64


def test_the_choice_takes_those_seen_first_and_each_alike() -> None:
    rng = np.random.default_rng(0)
    counts = np.array([0, 1, 3, 4, 9, 12, 12])
    rows, room, most = len(counts), 12, 4
    taken_by = np.zeros((rows, room))
    for seed in range(400):
        seen = (rng.random((rows, room)) < 0.5) & (np.arange(room) < counts[:, None])
        seen[6] = np.arange(room) < 8
        seeds, nobody = torch.arange(rows) + 1000 * seed, torch.full((rows,), -1)
        known = torch.from_numpy(seen), torch.from_numpy(counts)
        chosen = choose(*known, seeds, nobody, most=most)
        keys = chosen.keys(room).tolist()
        assert keys == sorted(set(keys))
        for row, count in enumerate(counts.tolist()):
            index, real = chosen.index[row].tolist(), chosen.real[row].tolist()
            held = min(count, most)
            assert real == [slot < held for slot in range(most)]
            mine = index[:held]
            assert mine == sorted(set(mine)) and all(n < count for n in mine)
            assert index[held:] == [(mine or [0])[i % max(held, 1)] for i in range(held, most)]
            assert [k % room for k in keys if k // room == row] == mine
            few = int(seen[row].sum()) < held
            shown = {n for n in range(room) if seen[row, n]}
            assert shown <= set(mine) if few else set(mine) <= shown
            taken_by[row, mine] += 1
    assert (taken_by[6, :8] > 150).all() and not taken_by[6, 8:].any()  # 200 each


def test_the_choice_depends_on_the_roi_s_seed_alone_and_begins_with_the_first() -> None:
    seen, counts, seeds, _ = all_of(6, 30, 5)
    first = torch.full((6,), 17)
    whole = choose(seen, counts, seeds, first, most=5)
    part = choose(seen[3:], counts[3:], seeds[3:], first[3:], most=5)
    assert torch.equal(whole.index[3:], part.index)
    assert (whole.index == 17).any(1).all()
    assert len({tuple(row) for row in whole.index.tolist()}) == 6


def test_without_any_nucleus_the_middle_is_cut() -> None:
    pixels, points = some_rois(2, 40, 0, seed=3)
    chosen = choose(*all_of(2, 0, 3), most=3)
    assert not chosen.real.any() and not len(chosen.keys(1))
    found = cut(pixels, points, chosen, size=10, mpp=0.25, wanted=0.25)
    assert torch.equal(found.view(2, 3, 10, 10, 3)[:, 1], pixels[:, 15:25, 15:25])
