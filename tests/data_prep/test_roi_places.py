"""Places of ROIs against plain loops over squares and nuclei."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import roi_places
from data_prep.detector import THUMBNAIL, tissue_mask
from lemon_muse.data.slides import Slide, open_slide
from lemon_muse.errors import UserError
from lemon_muse.synthetic import write_slide

WIDE, HIGH = 1110, 940
PINK, GLASS = (220, 150, 190), (244, 244, 244)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    """Tissue on the left of x = 700 px, glass beyond."""
    pixels = np.full((HIGH, WIDE, 3), GLASS, np.uint8)
    pixels[:, :700] = PINK
    path = tmp_path_factory.mktemp("half") / "half.png"
    Image.fromarray(pixels).save(path)
    with open_slide(path, mpp=0.5) as slide:
        yield slide


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slide]:
    """Generated tissue in native tiles of 256 px."""
    path = write_slide(tmp_path_factory.mktemp("tiled") / "a.svs", side=1300, seed=4, mpp=0.5)
    with open_slide(path) as slide:
        yield slide


def clusters(wide: int, high: int, n: int = 900, seed: int = 0) -> np.ndarray:
    """Nuclei in a few clusters and on whole coordinates, where squares begin and end."""
    rng = np.random.default_rng(seed)
    middle = rng.uniform(0, 1, (9, 2)) * (wide, high)
    spread = middle[rng.integers(0, 9, n // 2)] + rng.normal(0, 60, (n // 2, 2))
    whole = rng.integers(0, (wide + 1, high + 1), (n - n // 2, 2)).astype(float)
    return np.concatenate([spread.clip(0, (wide, high)), whole])


def find(
    slide: Slide, xy: np.ndarray, side: float, sampling: str, **more: Any
) -> roi_places.Places:
    words: dict[str, Any] = {
        "min_nuclei": 5,
        "min_tissue": 0.3,
        "most": None,
        "rng": np.random.default_rng(0),
    }
    return roi_places.find(slide, xy, side=side, sampling=sampling, **(words | more))


def inside(xy: np.ndarray, corner: np.ndarray, side: float) -> list[int]:
    (x, y), end = corner, corner + side
    return [i for i, (a, b) in enumerate(xy) if x <= a < end[0] and y <= b < end[1]]


def check(places: roi_places.Places, slide: Slide, xy: np.ndarray, side: float) -> None:
    """What holds of any places."""
    corners = places.corners
    assert len(corners) == len(places.nuclei) == len(places.tissue) == len(places)
    assert corners.dtype == np.int64 and (corners >= 0).all()
    assert (corners + side <= (slide.width, slide.height)).all()
    assert corners.tolist() == sorted(corners.tolist(), key=lambda c: (c[1], c[0]))
    for i, a in enumerate(corners):
        for b in corners[:i]:
            assert (abs(a - b) >= side).any(), "squares overlap"
    for corner, rows in zip(corners, places.nuclei, strict=True):
        assert rows.dtype == np.int64 and rows.tolist() == inside(xy, corner, side)
    every = np.concatenate([*places.nuclei, np.zeros(0, np.int64)])
    assert len(np.unique(every)) == len(every), "a nucleus in two ROIs"


def by_area(mask: np.ndarray, slide: Slide, corner: np.ndarray, side: float) -> float:
    """Tissue in a square: each pixel of the mask weighted by its overlap with the square."""
    overlap = []
    for start, length, count in zip(
        corner, (slide.width, slide.height), mask.shape[::-1], strict=True
    ):
        edge = np.arange(count + 1) * length / count
        part = np.minimum(edge[1:], start + side) - np.maximum(edge[:-1], start)
        overlap.append(np.maximum(part, 0))
    return float((mask * np.outer(overlap[1], overlap[0])).sum() / side**2)


@pytest.mark.parametrize("side", [100, 150.3, 256.0])
@pytest.mark.parametrize("sampling", ["grid", "dense"])
def test_places_are_squares_with_their_nuclei(half: Slide, sampling: str, side: float) -> None:
    xy = clusters(WIDE, HIGH)
    places = find(half, xy, side, sampling)
    check(places, half, xy, side)
    assert len(places) > 3
    mask = tissue_mask(half.thumbnail(THUMBNAIL))
    for corner, share, rows in zip(places.corners, places.tissue, places.nuclei, strict=True):
        assert len(rows) >= 5 and share >= 0.3
        assert share == pytest.approx(by_area(mask, half, corner, side), abs=1e-9)


def test_grid_takes_every_square_that_is_good(half: Slide) -> None:
    xy, side = clusters(WIDE, HIGH), 130
    places = find(half, xy, side, "grid", min_nuclei=8, min_tissue=0.5)
    mask = tissue_mask(half.thumbnail(THUMBNAIL))
    left, top = (WIDE % side) // 2, (HIGH % side) // 2
    wanted, counts = [], {"border": 0, "few nuclei": 0, "little tissue": 0}
    for y in range(top - side, HIGH, side):
        for x in range(left - side, WIDE, side):
            corner = np.array([x, y])
            if x < 0 or y < 0 or x + side > WIDE or y + side > HIGH:
                counts["border"] += 1
            elif len(inside(xy, corner, side)) < 8:
                counts["few nuclei"] += 1
            elif mask[y : y + side, x : x + side].mean() < 0.5:
                counts["little tissue"] += 1
            else:
                wanted.append([x, y])
    assert places.corners.tolist() == wanted and places.rejected == counts
    assert all(counts.values()), "each reason occurs"


@pytest.mark.parametrize("side", [110, 187.5])
def test_dense_is_the_greedy_choice(half: Slide, side: float) -> None:
    """By the definition: at each turn recount the nuclei that are not covered yet."""
    xy, most, least = clusters(WIDE, HIGH, 400, seed=1), 6, 9
    mask = tissue_mask(half.thumbnail(THUMBNAIL))
    steps = []
    for length in (WIDE, HIGH):
        last, step = math.floor(length - side), side / 8
        axis = [math.floor(i * step) for i in range(200) if i * step < last]
        steps.append([a for a in axis if a < last] + [last])
    candidates = [np.array([x, y]) for y in steps[1] for x in steps[0]]
    members = [inside(xy, c, side) for c in candidates]
    good = [
        len(m) >= least and by_area(mask, half, c, side) >= 0.4
        for m, c in zip(members, candidates, strict=True)
    ]
    covered: set[int] = set()
    taken: list[np.ndarray] = []
    while len(taken) < most:
        free = [
            (len(set(members[i]) - covered), -i)
            for i, c in enumerate(candidates)
            if good[i] and all((abs(c - t) >= side).any() for t in taken)
        ]
        if not free or max(free)[0] < least:
            break
        best = -max(free)[1]
        taken.append(candidates[best])
        covered |= set(members[best])
    places = find(half, xy, side, "dense", min_nuclei=least, min_tissue=0.4, most=most)
    assert len(taken) > 2
    assert places.corners.tolist() == sorted((t.tolist() for t in taken), key=lambda c: c[::-1])
    few = sum(len(m) < least for m in members)
    assert places.rejected == {
        "border": 0,
        "few nuclei": few,
        "little tissue": len(candidates) - few - sum(good),
    }


def test_dense_has_more_nuclei_than_the_grid(half: Slide) -> None:
    for seed in range(3):
        xy = clusters(WIDE, HIGH, seed=seed)
        for most in (1, 5):
            grid = find(half, xy, 120, "grid", min_tissue=0, most=most)
            dense = find(half, xy, 120, "dense", min_tissue=0, most=most)
            assert len(grid) == len(dense) == most
            assert sum(map(len, dense.nuclei)) >= sum(map(len, grid.nuclei))


def test_dense_squares_may_touch(half: Slide) -> None:
    """Where all squares are equally full they lie side by side from the first corner on."""
    x, y = np.meshgrid(np.arange(5, WIDE, 10), np.arange(5, HIGH, 10))
    places = find(half, np.stack([x.ravel(), y.ravel()], 1), 100, "dense", min_tissue=0)
    assert places.corners.tolist() == [[i * 100, j * 100] for j in range(9) for i in range(11)]

    # and the fuller one may be the second: only the corners 0 and 100 hold these two groups
    xy = np.array([[5.0, 5], [5, 6], [105, 5], [105, 6], [195, 5]])
    places = find(half, xy, 100, "dense", min_nuclei=2, min_tissue=0)
    assert [(c[0], len(n)) for c, n in zip(places.corners, places.nuclei, strict=True)] == [
        (0, 2),
        (100, 3),
    ]


def test_one_square_on_a_plain_image(half: Slide) -> None:
    """Such an image is one tile wide, which is no reason to leave its middle."""
    places = find(half, clusters(WIDE, HIGH), 800, "grid")
    assert places.corners[:, 0].tolist() == [155]


def test_grid_keeps_to_native_tiles_where_that_costs_nothing(tiled: Slide) -> None:
    xy = clusters(1300, 1300)
    for side, count in ((256, 5), (250, 5), (300, 4), (1300, 1)):
        places = find(tiled, xy, side, "grid", min_nuclei=0, min_tissue=0)
        check(places, tiled, xy, side)
        assert len(places) == count**2
        first, last = places.corners[0], places.corners[-1] + side
        if side in (256, 250):
            assert not (places.corners % 256).any()
        else:  # 4 squares of 300 px on tiles would need 1836 px
            assert (abs(first - (1300 - last)) <= 1).all(), "centred"


def test_grid_of_a_real_slide(shared_data: Path) -> None:
    path = shared_data / "wsi" / "tcga-cr-7395-01a-01-ts1.svs"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with open_slide(path, mpp=1.0) as slide:
        xy = clusters(slide.width, slide.height, 3000)
        places = find(slide, xy, 512, "grid", min_nuclei=1, min_tissue=0.2)
        check(places, slide, xy, 512)
        assert not (places.corners % 256).any() and 10 < len(places) < 48
        mask = tissue_mask(slide.thumbnail(THUMBNAIL))
        for i in (0, len(places) // 2):
            share = by_area(mask, slide, places.corners[i], 512)
            assert places.tissue[i] == pytest.approx(share, abs=1e-9)


def test_the_choice_is_a_function_of_the_seed(half: Slide) -> None:
    xy = clusters(WIDE, HIGH)
    every = {tuple(c) for c in find(half, xy, 100, "grid").corners.tolist()}
    chosen = [
        find(half, xy, 100, "grid", most=9, rng=np.random.default_rng(s)).corners.tolist()
        for s in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(len(c) == 9 and {tuple(x) for x in c} <= every for c in chosen)
    assert len(find(half, xy, 100, "grid", most=10_000)) == len(every)
    dense = [find(half, xy, 100, "dense", rng=np.random.default_rng(s)) for s in (0, 1)]
    assert dense[0].corners.tolist() == dense[1].corners.tolist()


def test_a_nucleus_on_an_edge_belongs_to_one_square(half: Slide) -> None:
    left = (WIDE % 100) // 2
    xy = np.array([[left + 100.0, 300.0], [np.nextafter(left + 100.0, 0), 300.0]])
    places = find(half, xy, 100, "grid", min_nuclei=1, min_tissue=0)
    assert [n.tolist() for n in places.nuclei] == [[1], [0]]
    assert places.corners[:, 0].tolist() == [left, left + 100]


def test_no_nuclei_no_places(half: Slide, caplog: pytest.LogCaptureFixture) -> None:
    for sampling in ("grid", "dense"):
        places = find(half, np.zeros((0, 2)), 100, sampling)
        assert places.corners.shape == (0, 2) and places.nuclei == [] and not len(places.tissue)
        assert "no ROI" in caplog.text
        caplog.clear()
    assert places.rejected["little tissue"] == 0 < places.rejected["few nuclei"]


def test_bad_input_is_named(half: Slide) -> None:
    xy = clusters(WIDE, HIGH)
    with pytest.raises(UserError, match=r"half\.png is 555 x 470 µm.* at most 470 µm a side"):
        find(half, xy, 941, "grid")
    assert len(find(half, xy, 940, "dense")) == 1
    for wrong in ([WIDE + 1.0, 5.0], [5.0, -0.1], [np.nan, 5.0]):
        with pytest.raises(UserError, match=r"1 of 901 nuclei lie outside the slide .*half\.png"):
            find(half, np.concatenate([xy, [wrong]]), 100, "grid")
    for words in ({"sampling": "dens"}, {"side": 0.0}, {"most": 0}):
        with pytest.raises(ValueError, match="must be"):
            find(half, xy, **({"side": 100, "sampling": "grid"} | words))
