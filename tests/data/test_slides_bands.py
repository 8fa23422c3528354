"""Crops in bands: those of a plain loop over the whole image, and every tile decoded once."""

from pathlib import Path

import numpy as np
import pytest

from lemon_muse.data import geometry, slides_bands
from lemon_muse.data.slides import Slide, open_slide
from lemon_muse.data.slides_tiff import TiffTiles
from lemon_muse.data.slides_tiles import OpenSlideTiles
from lemon_muse.errors import UserError


def test_copied_bands_are_the_plain_crops(slide: Slide) -> None:
    check_bands(slide, 1.0)


@pytest.mark.parametrize("factor", [0.5, 0.501, 0.985, 1.3])
def test_resampled_bands_are_the_plain_crops(made: Path, factor: float) -> None:
    with open_slide(made) as slide:
        check_bands(slide, factor)


def test_bands_of_a_real_slide_at_another_mpp(shared_data: Path) -> None:
    with open_slide(shared_data / "wsi" / "cmu-1-small-region.svs") as slide:
        check_bands(slide, 0.25 / 0.499)


def check_bands(slide: Slide, factor: float) -> None:
    """Each nucleus once, with the pixels of resampling and cropping the whole slide."""
    rng = np.random.default_rng(0)
    ends = np.array([slide.width, slide.height])
    # Some close together, some lonely; some on the borders and corners.
    centres = rng.uniform(0, 1, (400, 2)) * np.where(np.arange(400)[:, None] % 2, ends, 700)
    centres[200:] = rng.uniform(300, 420, (200, 2))  # and a crowd
    centres[:4] = np.array([[0, 0], [*ends], [0, ends[1] / 2], [ends[0] - 0.5, 3]])
    mpp = slide.mpp * factor
    image = slide.read(0, 0, 0, slide.width, slide.height)
    image, scale = geometry.resample(image, source_mpp=slide.mpp, mpp=mpp)
    for edge, band in (("reflect", 64), ("reflect", 1024), ("drop", 300)):
        wanted, kept = geometry.crop(image, centres * scale, size=64, edge=edge)
        seen = np.zeros(len(centres), int)
        found = np.zeros((len(centres), 64, 64, 3), np.uint8)
        for rows, pixels in slide.bands(centres, 64, mpp=mpp, band=band, edge=edge):
            found[rows] = pixels
            seen[rows] += 1
        assert np.array_equal(np.flatnonzero(seen), kept) and seen.max() == 1
        difference = np.abs(found[kept].astype(int) - wanted)
        assert difference.max() <= (0 if abs(factor - 1) < 0.02 else 1)
        assert (difference > 0).mean() < 0.01


def test_bands_of_a_coarse_level(made: Path) -> None:
    with open_slide(made) as slide:
        centres = np.random.default_rng(0).uniform(0, 1200, (100, 2))
        image, scale = geometry.resample(
            slide.read(1, 0, 0, 600, 600), source_mpp=slide.mpp * 2, mpp=0.7
        )
        wanted, _ = geometry.crop(image, centres / 2 * scale, size=40)
        for rows, pixels in slide.bands(centres, 40, mpp=0.7):
            assert np.abs(pixels.astype(int) - wanted[rows]).max() <= 1


def test_each_tile_is_decoded_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    plain = TiffTiles.decode

    def counted(self: TiffTiles, level: int, row: int, column: int) -> np.ndarray:
        calls.append((level, row, column))
        return plain(self, level, row, column)

    with open_slide(made) as slide:
        monkeypatch.setattr(TiffTiles, "decode", counted)
        centres = np.random.default_rng(0).uniform(0, 1200, (3000, 2))
        assert sum(len(r) for r, _ in slide.bands(centres, 64, mpp=0.25, band=256)) == 3000
        assert len(calls) == len(set(calls)) == 25, "5 x 5 tiles of 256 px"
        calls.clear()
        assert len(list(slide.bands(np.array([[300.0, 300.0]]), 64, mpp=0.25))) == 1
        assert sorted(calls) == [(0, 1, 1)], "and only those that a window touches, with margin 0"
        assert list(slide.bands(np.zeros((0, 2)), 64, mpp=0.25)) == []


def test_bands_without_native_tiles_are_the_same(slide: Slide) -> None:
    centres = np.random.default_rng(1).uniform(0, 1, (200, 2)) * (slide.width, slide.height)
    tiles = OpenSlideTiles(slide.path)
    slow = Slide(slide.path, tiles, mpp=slide.mpp, mpp_source="given")
    for mpp in (slide.mpp, slide.mpp * 0.7):
        crops = [np.zeros((200, 48, 48, 3), np.uint8) for _ in range(2)]
        for out, source in zip(crops, (slide, slow), strict=True):
            for rows, pixels in source.bands(centres, 48, mpp=mpp):
                out[rows] = pixels
        assert np.array_equal(crops[0], crops[1]) and crops[0].any()
    slow.close()


def test_nuclei_outside_are_refused(made: Path) -> None:
    with open_slide(made) as slide:
        with pytest.raises(UserError, match="1 of 2 nuclei lie outside"):
            list(slide.bands(np.array([[5, 5], [5, 1300.0]]), 64, mpp=0.25))
        with pytest.raises(ValueError, match="edge"):
            list(slide.bands(np.array([[5, 5.0]]), 64, mpp=0.25, edge="wrap"))


def test_parts_resample_as_the_whole() -> None:
    """Any part, at its own sampling positions, equals the same part of torch's whole."""
    image = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    for mpp in (0.13, 0.31, 0.9, 2.1):
        wanted, _ = geometry.resample(image, source_mpp=0.3, mpp=mpp)
        grid = slides_bands.level_grid((131, 97), level_mpp=0.3, mpp=mpp)
        assert (grid.height, grid.width) == wanted.shape[:2]
        h, w = grid.height, grid.width
        if grid.is_native:
            continue
        for y0, y1, x0, x1 in ((0, h, 0, w), (h // 3, h // 2 + 1, w // 4, w)):
            a, b, across = slides_bands.taps(
                (np.arange(x0, x1) + 0.5) * grid.step[0], grid.step[0], 131
            )
            c, d, down = slides_bands.taps(
                (np.arange(y0, y1) + 0.5) * grid.step[1], grid.step[1], 97
            )
            part = slides_bands.weigh(image[c:d, a:b], across, down)
            assert np.abs(part.astype(int) - wanted[y0:y1, x0:x1]).max() <= 1
