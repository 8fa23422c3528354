"""The built-in detector: F1 on real and generated tissue, no seams, nothing on glass."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import detector
from data_prep.nuclei_formats.record import Nuclei
from lemon_muse.data import geometry
from lemon_muse.data.layouts import brcam2c
from lemon_muse.data.table import read_image
from lemon_muse.synthetic import tissue

RADIUS = 3.0  # µm


def hits(found: np.ndarray, truth: np.ndarray, radius: float) -> int:
    """Greedy one-to-one matching, nearest pair first."""
    distance = np.hypot(*(found[:, None] - truth[None]).transpose(2, 0, 1))
    rows, columns = np.nonzero(distance <= radius)
    used: tuple[set[int], set[int]] = (set(), set())
    for k in np.argsort(distance[rows, columns], kind="stable"):
        if rows[k] not in used[0] and columns[k] not in used[1]:
            used[0].add(rows[k])
            used[1].add(columns[k])
    return len(used[0])


def points(found: Nuclei) -> np.ndarray:
    return np.stack([found.x, found.y], 1)


def f1(pairs: list[tuple[np.ndarray, np.ndarray]], mpp: float) -> float:
    true = sum(hits(found, truth, RADIUS / mpp) for found, truth in pairs)
    return 2 * true / sum(len(found) + len(truth) for found, truth in pairs)


def test_f1_on_real_nuclei(shared_data: Path) -> None:
    root = shared_data / "brca-m2c"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    table = brcam2c.read(root)
    pairs = []
    for image in np.unique(table.image[np.isin(table.split, ["val", "test"])]):
        rows = table.image == image
        found = detector.detect(read_image(Path(image)), brcam2c.MPP)
        assert not found.type.any() and (found.area >= 0).all()
        pairs.append((points(found), np.stack([table.x[rows], table.y[rows]], 1)))
    assert f1(pairs, brcam2c.MPP) > 0.74  # measured: 0.771


@pytest.mark.parametrize(("mpp", "least"), [(0.5, 0.84), (0.25, 0.8)])
def test_f1_on_generated_tissue(mpp: float, least: float) -> None:
    pairs = []
    for i in range(3):
        field = tissue(100 + i, side=round(250 / mpp), mpp=mpp, slide=i, scanner=i)
        pairs.append((points(detector.detect(field.image, mpp)), field.xy))
    assert f1(pairs, mpp) > least
    # the measure itself: points that do not belong to the image are found out
    assert f1([(found, pairs[i - 1][1]) for i, (found, _) in enumerate(pairs)], mpp) < 0.4


def test_coordinates_and_areas_are_in_the_pixels_of_the_image() -> None:
    mpp = 0.25
    image = np.full((400, 600, 3), (225, 190, 215), np.uint8)
    y, x = np.mgrid[:400, :600] + 0.5
    truth = [(100.0, 80.0), (300.0, 200.0), (512.0, 333.0), (200.0, 350.0)]
    for cx, cy in truth:
        image[np.hypot(x - cx, y - cy) < 14] = (90, 60, 140)
    found = detector.detect(image, mpp)
    order = np.lexsort((found.x,))
    np.testing.assert_allclose(points(found)[order], sorted(truth), atol=2)
    np.testing.assert_allclose(found.area, np.pi * (14 * mpp) ** 2, rtol=0.25)


def test_nothing_on_glass() -> None:
    rng = np.random.default_rng(0)
    glass = rng.integers(228, 250, (300, 300, 3)).astype(np.uint8)
    flat = np.full((300, 300, 3), 243, np.uint8)
    assert len(detector.detect(glass, 0.5)) == len(detector.detect(flat, 0.5)) == 0
    assert not detector.tissue_mask(flat).any()


def test_deconvolution_against_scikit_image() -> None:
    from skimage.color import rgb2hed

    rng = np.random.default_rng(0)
    image = rng.integers(60, 250, (40, 40, 3)).astype(np.uint8)
    # rgb2hed clips at zero and has its own logarithm: equal up to one factor where positive
    theirs = rgb2hed(image)[..., 0]
    ours = detector.hematoxylin(image)
    positive = theirs > 0.02
    assert np.corrcoef(theirs[positive], ours[positive])[0, 1] > 0.9999


class Picture:
    """A slide that is an image in memory."""

    def __init__(self, image: np.ndarray, mpp: float) -> None:
        self.image, self.mpp, self.path = image, mpp, Path("memory")
        self.height, self.width = image.shape[:2]

    def region(self, x: float, y: float, width: float, height: float, *, mpp: float) -> np.ndarray:
        assert abs(mpp / self.mpp - 1) < 0.02
        x, y, width, height = (round(v) for v in (x, y, width, height))
        out = np.full((height, width, 3), 255, np.uint8)
        x0, y0 = max(0, x), max(0, y)
        part = self.image[y0 : max(y0, y + height), x0 : max(x0, x + width)]
        out[y0 - y : y0 - y + part.shape[0], x0 - x : x0 - x + part.shape[1]] = part
        return out

    def thumbnail(self, max_side: int) -> np.ndarray:
        scale = max(self.width, self.height) / max_side
        small, _ = geometry.resample(self.image, source_mpp=self.mpp, mpp=self.mpp * max(1, scale))
        return small


def test_tiles_have_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    field = tissue(3, side=900, mpp=0.5, slide=2)
    image = np.full((900, 1300, 3), 245, np.uint8)
    image[:, :900] = field.image
    slide = Picture(image, 0.5)
    whole = detector.detect_slide(slide)  # type: ignore[arg-type]
    monkeypatch.setattr(detector, "TILE", 256)
    tiles = detector.detect_slide(slide)  # type: ignore[arg-type]
    threads = detector.detect_slide(slide, workers=3)  # type: ignore[arg-type]
    for ours, theirs in zip(tiles.columns(), threads.columns(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(points(tiles), axis=0)) == len(tiles)
    a, b = set(map(tuple, points(whole))), set(map(tuple, points(tiles)))
    assert len(a ^ b) <= 0.01 * len(a)
    assert f1([(points(tiles), field.xy)], 0.5) > 0.8
    assert (tiles.x < 910).all()  # nothing on the glass


def test_a_slide_without_tissue_has_no_nuclei() -> None:
    assert len(detector.detect_slide(Picture(np.full((500, 500, 3), 244, np.uint8), 0.5))) == 0  # type: ignore[arg-type]
