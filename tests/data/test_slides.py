"""Slides against OpenSlide, the library's own resampling and plain loops."""

import pickle
import shutil
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from lemon_muse.data import geometry
from lemon_muse.data.slides import MppError, Slide, open_slide, read_facts
from lemon_muse.data.slides_tiff import TiffTiles
from lemon_muse.data.slides_tiles import OpenSlideTiles
from lemon_muse.errors import UserError
from lemon_muse.synthetic import tissue


def by_openslide(path: Path, level: int, x: int, y: int, side: int) -> np.ndarray:
    """RGB over white; x and y in level-0 px."""
    with openslide.OpenSlide(path) as other:
        image = other.read_region((x, y), level, (side, side))
    ground = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(ground, image).convert("RGB"))


def test_every_level_has_the_pixels_of_openslide(slide: Slide) -> None:
    assert isinstance(slide._tiles, TiffTiles) and slide._tiles.is_fast(0)
    with openslide.OpenSlide(slide.path) as other:
        assert [lv[:2] for lv in slide.levels] == list(other.level_dimensions)
    rng, seen = np.random.default_rng(0), 0
    for x, y in rng.uniform(0, 1, (12, 2)) * (slide.width - 300, slide.height - 300):
        wanted = by_openslide(slide.path, 0, int(x), int(y), 300)
        seen += wanted.std() > 5
        assert np.array_equal(slide.read(0, int(x), int(y), 300, 300), wanted)
    assert seen > 3, "tissue, not only glass"
    for level in range(1, len(slide.levels)):
        assert slide._tiles.is_fast(level)
        wanted = by_openslide(slide.path, level, 0, 0, 290)
        assert np.array_equal(slide.read(level, 0, 0, 290, 290), wanted)


def test_beyond_the_slide_is_white(slide: Slide) -> None:
    x, y = slide.width - 40, slide.height - 30
    for tiles in (slide._tiles, slide._tiles.slow):  # type: ignore[attr-defined]
        corner = tiles.read(0, x, y, 100, 100)
        assert (corner[30:] == 255).all() and (corner[:, 40:] == 255).all()
        assert np.array_equal(corner[:30, :40], slide.read(0, x, y, 40, 30))
        before = tiles.read(0, -10, -20, 50, 50)
        assert (before[:20] == 255).all() and (before[:, :10] == 255).all()
        assert np.array_equal(before[20:, 10:], slide.read(0, 0, 0, 40, 30))
        assert (tiles.read(0, -500, -500, 20, 20) == 255).all()
    half = slide.region(-100, -100, 200, 200, mpp=slide.mpp / 2)
    assert half.shape == (400, 400, 3)
    assert (half[:200] == 255).all() and (half[:, :200] == 255).all()
    inside = slide.region(0, 0, 100, 100, mpp=slide.mpp / 2)
    assert np.array_equal(half[200:, 200:], inside), "white does not bleed into the slide"
    assert (slide.region(-300, 0, 200, 200, mpp=slide.mpp * 3) == 255).all()


def test_a_region_is_a_part_of_the_resampled_whole(slide: Slide) -> None:
    whole = slide.read(0, 0, 0, slide.width, slide.height)
    for factor in (0.5, 1.25):
        # Extents chosen so that the part lies on the raster of the whole.
        side = {0.5: 200, 1.25: 250}[factor]
        crop = whole[: side * 4, : side * 4]
        wanted, _ = geometry.resample(crop, source_mpp=slide.mpp, mpp=slide.mpp * factor)
        found = slide.region(side, side, side, side, mpp=slide.mpp * factor)
        n = round(side / factor)
        assert found.shape == (n, n, 3)
        difference = np.abs(found.astype(int) - wanted[n : 2 * n, n : 2 * n])
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    copied = slide.region(70, 90, 100, 50, mpp=slide.mpp * 1.01)
    assert np.array_equal(copied, whole[90:140, 70:170])


def test_the_nearest_finer_level_is_taken(made: Path) -> None:
    with open_slide(made) as slide:
        assert [round(lv[2]) for lv in slide.levels] == [1, 2, 4, 8]
        levels = {m: slide.level_for(m) for m in (0.1, 0.25, 0.4, 0.495, 0.5, 0.9, 1.0, 9.0)}
        assert levels == {0.1: 0, 0.25: 0, 0.4: 0, 0.495: 1, 0.5: 1, 0.9: 1, 1.0: 2, 9.0: 3}
        half = slide.region(256, 512, 300, 200, mpp=0.5)
        assert np.array_equal(half, slide.read(1, 128, 256, 150, 100))
        small = slide.thumbnail(100)
        assert small.shape == (100, 100, 3)
        blocks = slide.read(0, 0, 0, 1200, 1200).reshape(100, 12, 100, 12, 3).mean((1, 3))
        assert np.abs(small - blocks).mean() < 5
        assert slide.thumbnail(5000).shape == (1200, 1200, 3)


def test_a_wrong_fast_path_is_noticed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TiffTiles.decode

    def swapped(self: TiffTiles, level: int, row: int, column: int) -> np.ndarray:
        return plain(self, level, row, column)[..., ::-1]

    monkeypatch.setattr(TiffTiles, "decode", swapped)
    with open_slide(made) as slide:
        assert isinstance(slide._tiles, OpenSlideTiles)
        assert np.array_equal(slide.read(0, 0, 0, 300, 300), by_openslide(made, 0, 0, 0, 300))


@pytest.mark.parametrize("coding", [33003, 33005])
def test_jpeg_2000_has_the_right_colours(tmp_path: Path, coding: int) -> None:
    """33003 stores YCbCr, 33005 RGB: decoders that mix them up raise no error."""
    image = tissue(0, side=512, mpp=0.5).image
    stored = image
    if coding == 33003:
        stored = np.asarray(Image.fromarray(image).convert("YCbCr"))
    tiles = (
        imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(stored[y : y + 256, x : x + 256]),
            codecformat="j2k",
            reversible=True,
            mct=False,
        )
        for y in (0, 256)
        for x in (0, 256)
    )
    path = tmp_path / "a.svs"
    about = "Aperio Image Library v12\r\n512x512 (256x256) J2K/KDU Q=70|AppMag = 20|MPP = 0.5000"
    options = {"compression": coding, "photometric": "rgb", "metadata": None}
    shape = {"shape": image.shape, "dtype": np.uint8, "tile": (256, 256)}
    tifffile.imwrite(path, tiles, description=about, **shape, **options)  # type: ignore[arg-type]
    with open_slide(path) as slide:
        assert slide._tiles.is_fast(0), "fast"  # type: ignore[attr-defined]
        found = slide.read(0, 0, 0, 512, 512)
        assert np.abs(found.astype(int) - image).max() <= (0 if coding == 33005 else 3)
        assert np.array_equal(found, by_openslide(path, 0, 0, 0, 512))


def test_missing_tiles_are_white(tmp_path: Path) -> None:
    image = tissue(0, side=512, mpp=0.5).image
    path = tmp_path / "a.svs"
    about = "Aperio Image Library v12\r\n512x512 (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5000"
    options = {"compression": "jpeg", "photometric": "rgb", "metadata": None, "tile": (256, 256)}
    tifffile.imwrite(path, image, description=about, **options)  # type: ignore[arg-type]
    with tifffile.TiffFile(path, mode="r+") as file:
        tag = file.pages.first.tags["TileByteCounts"]
        tag.overwrite([0, *tag.value[1:]])
    with open_slide(path) as slide:
        assert slide._tiles.is_fast(0)  # type: ignore[attr-defined]
        found = slide.read(0, 0, 0, 512, 512)
    assert (found[:256, :256] == 255).all() and found[256:].std() > 5
    assert np.array_equal(found, by_openslide(path, 0, 0, 0, 512))


def test_mpp_is_never_guessed(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "wsi" / "tcga-cr-7395-01a-01-ts1.svs"
    with pytest.raises(MppError, match="does not state its resolution; give mpp="):
        open_slide(path)
    with open_slide(path, mpp=1.0) as slide:
        assert (slide.mpp, slide.mpp_source) == (1.0, "given")
        assert slide.levels[1][2] == 2.0
    assert read_facts(path).mpp is None
    with pytest.raises(MppError, match="outside"):
        open_slide(path, mpp=20)
    with open_slide(shared_data / "wsi" / "cmu-1-small-region.svs") as slide:
        assert (slide.mpp, slide.mpp_source) == (0.499, "file")
    dpi = tmp_path / "dpi.tiff"
    tile = {"tile": (256, 256), "photometric": "rgb"}
    image = np.zeros((512, 512, 3), np.uint8)
    tifffile.imwrite(dpi, image, resolution=(96, 96), resolutionunit="inch", **tile)  # type: ignore[arg-type]
    with pytest.raises(MppError, match=r"264\.583 µm per pixel"):
        open_slide(dpi)


def test_plain_images(tmp_path: Path) -> None:
    image = tissue(3, side=300, mpp=0.5).image[:200]
    for name in ("a.png", "a.tif"):
        Image.fromarray(image).save(tmp_path / name)
        with pytest.raises(MppError, match="give mpp="):
            open_slide(tmp_path / name)
        with open_slide(tmp_path / name, mpp=0.5) as slide:
            assert (slide.width, slide.height, slide.vendor) == (300, 200, "image")
            assert slide.levels == [(300, 200, 1.0)] and slide.bounds == (0, 0)
            assert np.array_equal(slide.read(0, -5, 0, 305, 200)[:, 5:], image)
            centres = np.random.default_rng(0).uniform(0, 200, (50, 2))
            wanted, _ = geometry.crop(image, centres, size=32)
            for rows, pixels in slide.bands(centres, 32, mpp=0.5, band=64):
                assert np.array_equal(pixels, wanted[rows])
    clear = np.dstack([image, np.zeros(image.shape[:2], np.uint8)])
    clear[:100, :, 3] = 255
    Image.fromarray(clear).save(tmp_path / "b.png")
    with open_slide(tmp_path / "b.png", mpp=0.5) as slide:
        found = slide.read(0, 0, 0, 300, 200)
    assert np.array_equal(found[:100], image[:100]) and (found[100:] == 255).all()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="8 bits"):
        open_slide(tmp_path / "deep.png", mpp=0.5)


def test_pickled_by_path(made: Path) -> None:
    for mpp, source in ((None, "file"), (0.3, "given")):
        with open_slide(made, mpp=mpp) as slide, pickle.loads(pickle.dumps(slide)) as copy:
            assert (copy.mpp, copy.mpp_source) == (slide.mpp, source)
            assert np.array_equal(copy.read(0, 5, 5, 90, 90), slide.read(0, 5, 5, 90, 90))


def test_damaged_files(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no slide"):
        open_slide(tmp_path / "none.svs")
    (tmp_path / "text.svs").write_text("not a slide")
    (tmp_path / "empty.svs").touch()
    whole = made.read_bytes()
    for share in (0.02, 0.5, 0.98):
        (tmp_path / f"cut{share}.svs").write_bytes(whole[: int(len(whole) * share)])
    for path in tmp_path.glob("*.svs"):
        with pytest.raises(UserError, match="cannot be read"):
            open_slide(path, mpp=0.25)
    noise = tmp_path / "noise.svs"
    shutil.copy(made, noise)
    with tifffile.TiffFile(made) as file:
        page = file.pages.first
        # Not the tile with most bytes: opening looks at that one already.
        index = int(np.argsort(page.databytecounts)[3])  # type: ignore[union-attr]
        start, count = page.dataoffsets[index], page.databytecounts[index]  # type: ignore[union-attr]
    with noise.open("r+b") as file:
        file.seek(start)
        file.write(np.random.default_rng(0).bytes(count))
    with open_slide(noise) as slide, pytest.raises(UserError, match="cannot be read"):
        slide.read(0, 0, 0, 1200, 1200)
