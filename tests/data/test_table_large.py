"""Large images are read part by part: the same crops and windows as of the whole image."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from eval.dense import cut, windows_of
from lemon_muse.data import geometry
from lemon_muse.data import table as tables
from lemon_muse.data.table import Table, image_size, is_large


@pytest.fixture(params=["flat", "tiled"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Table, np.ndarray]:
    """A flat TIFF and a tiled one of smooth noise, with nuclei up to the border."""
    rng = np.random.default_rng(5)
    small = rng.uniform(0, 255, (50, 70, 3))
    image = np.kron(small, np.ones((12, 12, 1))).clip(0, 255).astype(np.uint8)
    path = tmp_path / "large.tif"
    options = {"tile": (128, 128)} if request.param == "tiled" else {}
    tifffile.imwrite(path, image, photometric="rgb", **options)
    n = 80
    made = Table(
        image=np.full(n, str(path)),
        x=rng.uniform(0.1, image.shape[1] - 0.1, n),
        y=rng.uniform(0.1, image.shape[0] - 0.1, n),
        mpp=np.full(n, 0.25),
        label=np.zeros(n, np.int64),
        patient=np.full(n, "p"),
        slide=np.full(n, "s"),
        split=np.full(n, "all"),
        classes=("a",),
    )
    return made, image


def whole(table: Table, image: np.ndarray, size: int, mpp: float) -> np.ndarray:
    scaled, scale = geometry.resample(image, source_mpp=0.25, mpp=mpp)
    return geometry.crop(scaled, np.stack([table.x, table.y], 1) * scale, size=size)[0]


@pytest.mark.parametrize("mpp", [0.25, 0.4])
def test_crops_equal_those_of_the_whole_image(
    table: tuple[Table, np.ndarray], mpp: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    nuclei, image = table
    path = Path(nuclei.image[0])
    assert image_size(path) == (image.shape[1], image.shape[0]) and not is_large(path)
    is_large.cache_clear()
    monkeypatch.setattr(tables, "LARGE", 1000)
    monkeypatch.setattr(tables, "HELD", 3 * 40 * 40 * 7)  # seven crops at once
    assert is_large(path)
    rows = np.arange(3, 80)
    found = nuclei.crops(40, mpp, rows)
    expected = whole(nuclei, image, 40, mpp)[rows]
    assert np.abs(found.astype(int) - expected).max() <= (0 if mpp == 0.25 else 1)
    is_large.cache_clear()


@pytest.mark.parametrize(("mpp", "window", "valid"), [(0.25, 96, 64), (0.5, 64, 64), (0.3, 70, 50)])
def test_windows_equal_those_of_the_whole_image(
    table: tuple[Table, np.ndarray],
    mpp: float,
    window: int,
    valid: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nuclei, image = table
    scaled, scale = geometry.resample(image, source_mpp=0.25, mpp=mpp)
    points = np.stack([nuclei.x, nuclei.y], 1) * scale
    expected = cut(scaled, points, np.arange(80), window=window, valid=valid)
    is_large.cache_clear()
    monkeypatch.setattr(tables, "LARGE", 1000)
    monkeypatch.setattr("eval.dense.HELD", 5)
    seen = 0
    for part in windows_of(nuclei, window=window, valid=valid, mpp=mpp):
        for i in range(len(part)):
            row = part.rows[part.owner == i][0]
            other = expected.owner[expected.rows == row][0]
            apart = part.pixels[i].astype(int) - expected.pixels[other]
            assert np.abs(apart).max() <= (0 if mpp == 0.25 else 1)
        for row, point in zip(part.rows, part.points, strict=True):
            np.testing.assert_allclose(point, expected.points[expected.rows == row][0], atol=2e-3)
        seen += len(part.rows)
    assert seen == 80
    is_large.cache_clear()
