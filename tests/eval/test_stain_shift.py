"""Stained copies of images against images that are put together in other stains at once."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import stain_shift
from eval.stain_shift import draw, plausible, restained, stain_vectors, stained_table
from lemon_muse.data import stain
from lemon_muse.data.table import Table, read_image

HEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.22, 0.85, 0.48)


def unit(vectors: object) -> np.ndarray:
    array = np.asarray(vectors, np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def turned(seed: int, *, by: float = 0.06) -> np.ndarray:
    """The two stains of another laboratory."""
    moved = unit([HEMATOXYLIN, EOSIN]) + np.random.default_rng(seed).uniform(-by, by, (2, 3))
    return unit(moved)


def amounts(seed: int, *, side: int = 120) -> np.ndarray:
    """Hematoxylin and eosin [side, side, 2] of nuclei on a grid, with a strip of glass."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    far = np.hypot((x % 12) - 6, (y % 12) - 6)
    h = np.where(far < 4.5, generator.uniform(1.0, 1.8), 0.1) + generator.uniform(0, 0.1, x.shape)
    e = np.where(far < 4.5, 0.15, generator.uniform(0.5, 1.0)) + generator.uniform(0, 0.2, x.shape)
    glass = y < 8
    return np.stack([np.where(glass, 0, h), np.where(glass, 0, e)], -1)


def picture(amount: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Beer-Lambert written out: uint8 [side, side, 3]."""
    return np.clip(np.rint(256 * np.exp(-(amount @ vectors)) - 1), 0, 255).astype(np.uint8)


def stained_images(folder: Path, *, count: int) -> list[Path]:
    """Images of the same kind of tissue, each in stains of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"slide{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(picture(amounts(i), turned(i))).save(path)
    return paths


def table_of(paths: list[Path], *, per_image: int = 10) -> Table:
    image = np.repeat([str(p) for p in paths], per_image)
    slide = np.array([Path(p).stem for p in image.tolist()])
    n = len(image)
    place = np.random.default_rng(0).uniform(10, 110, (n, 2))
    return Table(
        image,
        place[:, 0],
        place[:, 1],
        np.full(n, 0.25),
        np.arange(n) % 2,
        slide,
        slide,
        np.full(n, "all"),
        classes=("t", "l"),
        groups={"site": slide},
    )


def test_an_image_in_other_stains_is_the_one_that_was_stained_so() -> None:
    amount, own, new = amounts(0), turned(1), turned(2)
    factors = np.array([0.85, 1.15])
    found = restained(picture(amount, own), own, new, factors).astype(int)
    expected = picture(amount * factors, new).astype(int)
    # Dark pixels are rounded coarsely before their density is taken: 1 grey level there is 3 %.
    assert np.abs(found - expected).max() <= 4 and np.abs(found - expected).mean() < 0.5
    assert np.abs(picture(amount, own).astype(int) - expected).mean() > 5


def test_own_vectors_and_factors_of_one_change_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3)).astype(np.uint8)
    np.testing.assert_array_equal(restained(image, turned(1), turned(1), np.ones(2)), image)
    white = np.full((4, 4, 3), 255, np.uint8)
    np.testing.assert_array_equal(restained(white, turned(1), turned(2), np.ones(2)), white)


def test_real_images_come_back_from_their_stains(shared_data: Path) -> None:
    paths = sorted((shared_data / "brca-m2c" / "images").glob("*.png"))[:3]
    vectors = [stain_vectors(read_image(path)) for path in paths]
    for path, own in zip(paths, vectors, strict=True):
        image = read_image(path)
        assert own is not None
        there = restained(image, own, turned(3), np.array([0.8, 1.2]))
        assert np.abs(there.astype(int) - image).mean() > 4
        # And back: what is lost is rounding, and what became too bright or too dark for 8 bits.
        back = restained(there, turned(3), own, 1 / np.array([0.8, 1.2])).astype(int)
        assert np.percentile(np.abs(back - image), 99) <= 4
        # Hematoxylin and eosin alone give the image up to a few grey levels.
        flat = image.reshape(-1, 3)
        again = stain.compose(stain.concentrations(flat, own), own).astype(int)
        assert np.abs(again - flat).mean() < 8


def test_vectors_are_found_also_in_a_sample_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(amounts(4), turned(4))
    for sample in (1_000_000, 3000):
        monkeypatch.setattr(stain_shift, "SAMPLE", sample)
        found = stain_vectors(image)
        assert found is not None
        apart = np.degrees(np.arccos(np.clip((found * turned(4)).sum(1), -1, 1)))
        assert apart.max() < 8
    assert stain_vectors(np.full((80, 80, 3), 250, np.uint8)) is None


def test_copies_stand_in_the_stains_of_other_slides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = stained_images(tmp_path / "images", count=5)
    glass = tmp_path / "images" / "glass.png"
    Image.fromarray(np.full((120, 120, 3), 250, np.uint8)).save(glass)
    table = table_of([*paths, glass])
    before = {p.name: p.read_bytes() for p in [*paths, glass]}
    rows = np.arange(3, len(table))[::2]
    (tmp_path / "copies").mkdir()
    with caplog.at_level(logging.WARNING):
        found, kept = stained_table(table, rows, tmp_path / "copies", seed=1)
    assert "1 images show no two stains" in caplog.text
    assert kept.tolist() == [row for row in rows.tolist() if table.image[row] != str(glass)]
    np.testing.assert_array_equal(found.x, table.x[kept])
    np.testing.assert_array_equal(found.label, table.label[kept])
    np.testing.assert_array_equal(found.groups["site"], table.groups["site"][kept])
    assert {p.name: p.read_bytes() for p in [*paths, glass]} == before
    own = {str(p): stain_vectors(read_image(p)) for p in paths}
    for original, copy in {(a, b) for a, b in zip(table.image[kept], found.image, strict=True)}:
        vectors = stain_vectors(read_image(Path(copy)))
        assert vectors is not None
        # What the copy's vectors are nearest to is another slide's, not its own.
        nearness = {n: float((v * vectors).sum(1).min()) for n, v in own.items() if v is not None}
        assert max(nearness, key=lambda n: nearness[n]) != original
        assert max(nearness.values()) > np.cos(np.radians(4))
    nothing, none = stained_table(table, rows[:0], tmp_path / "copies")
    assert len(nothing) == len(none) == 0
    (tmp_path / "again").mkdir()
    again, _ = stained_table(table, rows, tmp_path / "again", seed=1)
    other, _ = stained_table(table, rows, tmp_path / "copies", seed=2)
    assert Path(again.image[0]).read_bytes() != Path(other.image[0]).read_bytes()
    pixels = [t.crops(16, 0.25, np.arange(4)) for t in (again, other)]
    assert not np.array_equal(*pixels)


def test_vectors_that_are_no_stain_are_not_given_to_others() -> None:
    vectors = {f"s{i}": turned(i, by=0.02) for i in range(9)}
    vectors["pigment"] = unit([HEMATOXYLIN, (0.30, 0.57, 0.76)])
    found = plausible(vectors)
    assert len(found) == 6 and "pigment" not in found
    assert plausible({}) == [] and plausible({"a": turned(0)}) == ["a"]


def test_draws_are_of_few_images_and_of_none_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = stained_images(tmp_path, count=6)
    large = tmp_path / "large.tif"
    Image.new("RGB", (4100, 4100), "white").save(large, compression="tiff_deflate")
    table = table_of([*paths, large], per_image=30)
    used = np.flatnonzero(np.arange(len(table)) % 5 > 0)
    with caplog.at_level(logging.WARNING):
        rows = draw(table, used, seed=0)
    assert f"1 images are too large for a stained copy, as {large}" in caplog.text
    assert set(table.image[rows]) == {str(p) for p in paths}
    assert np.isin(rows, used).all() and len(rows) == 6 * 24
    assert not len(draw(table, np.flatnonzero(table.image == str(large)), seed=0))
    monkeypatch.setattr(stain_shift, "IMAGES", 3)
    monkeypatch.setattr(stain_shift, "MOST", 20)
    few = draw(table, used, seed=0)
    assert len(set(table.image[few])) == 3 and np.bincount(table.label[few]).tolist() == [10, 10]
    monkeypatch.setattr(stain_shift, "PIXELS", 2 * 120 * 120)
    assert len(set(table.image[draw(table, used, seed=0)])) == 2
