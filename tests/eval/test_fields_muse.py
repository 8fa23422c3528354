"""The squares of fields that are cut again are those of MUSE's evaluation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.benchmarks.fields import MARGIN_UM, Field, field_image
from eval.dense import windows_of
from lemon_muse.data.table import Table


@pytest.mark.parametrize("native", [0.25, 0.5, 0.2325, 0.16437])
def test_squares_are_those_of_muse(tmp_path: Path, native: float) -> None:
    """A ramp whose value says where on the slide a pixel lies, against a plain loop."""
    length, side, corner = 2600, 1000, np.array([803.0, 777.0])
    ramp = np.arange(length) * (200 / length) + 20
    image = np.full((length, length, 3), 128.0)
    image[..., 0], image[..., 1] = ramp[None], ramp[:, None]
    source = tmp_path / "slide.bmp"
    Image.fromarray(image.round().astype(np.uint8)).save(source)
    field = Field(source, *corner.tolist(), side, side, native, is_slide=False)
    path, where = field_image(tmp_path / "fields", "a", field)
    points = np.random.default_rng(0).uniform(0, side, (300, 2))
    table = table_of(path, points + where, native)
    for mpp, window in ((0.25, 224), (0.25, 512), (0.5, 224), (0.5, 512)):
        step = native / mpp
        # MUSE: squares of 224 px at the wanted mpp from the field's corner on, in wider windows.
        begin = np.floor(points * step / 224) * 224 - (window - 224) / 2
        # Within a pixel and a half of a square's border, rounding decides.
        far = np.abs(points * step - np.round(points * step / 224) * 224).min(1) > 1.5
        seen = 0
        for windows in windows_of(table, window=window, valid=224, mpp=mpp):
            found = points[windows.rows] * step - windows.points
            clear = far[windows.rows]
            apart = np.abs(found - begin[windows.rows])[clear]
            assert apart.max() <= step + 0.5
            for owner, row in zip(windows.owner[clear], windows.rows[clear], strict=True):
                # The middle row and the middle column of the window, in px of the slide.
                place = corner[:, None] + (begin[row][:, None] + np.arange(window)) / step
                shown = windows.pixels[owner]
                along = np.stack([shown[window // 2, :, 0], shown[:, window // 2, 1]])
                wanted = place * (200 / length) + 20
                inside = (place > 8) & (place < length - 8)
                assert np.abs(along - wanted)[inside].max() < 2.5
                seen += 1
        assert seen > 200


def table_of(image: Path, points: np.ndarray, mpp: float) -> Table:
    n = len(points)
    same = np.full(n, "a")
    return Table(
        image=np.full(n, str(image)),
        x=points[:, 0],
        y=points[:, 1],
        mpp=np.full(n, mpp),
        label=np.zeros(n, np.int64),
        patient=same,
        slide=same,
        split=same,
    )


def test_the_margin_holds_every_window_of_muse(tmp_path: Path) -> None:
    """No window of 512 px around a square of a field reaches the border of the PNG."""
    for native in (0.25, 0.2456, 0.5, 0.2325):
        for mpp in (0.25, 0.5):
            for side in range(800, 1100, 7):
                before, after = (um / mpp for um in MARGIN_UM)
                length = side * native / mpp
                last = np.ceil(length / 224) * 224
                assert before >= (512 - 224) / 2
                assert last + (512 - 224) / 2 <= length + after + 1e-6
    assert 112 / 0.5 % 224 == 0 and 112 / 0.25 % 224 == 0
