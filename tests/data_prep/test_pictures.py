"""Pictures: what is drawn stands where it should, and nothing else is touched."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import pictures

PINK = (220, 150, 190)


def load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def alone(path: Path) -> bool:
    """No temporary file is left beside it."""
    return [p.name for p in path.parent.iterdir()] == [path.name]


def test_contact_sheet(tmp_path: Path) -> None:
    crops = np.random.default_rng(0).integers(0, 250, (7, 12, 12, 3)).astype(np.uint8)
    path = tmp_path / "sheet.png"
    pictures.contact_sheet(crops, path, columns=3)
    sheet = load(path)
    assert alone(path) and sheet.shape == (3 * 14, 3 * 14, 3)
    left = sheet.copy()
    for i, crop in enumerate(crops):
        y, x = i // 3 * 14, i % 3 * 14
        assert np.array_equal(sheet[y : y + 12, x : x + 12], crop)
        left[y : y + 12, x : x + 12] = 255
    assert (left == 255).all(), "the rest is white"
    for wrong in (crops[:0], crops[0]):
        with pytest.raises(ValueError, match="crops must be"):
            pictures.contact_sheet(wrong, path)


def test_overlay_draws_circles_of_3_um(tmp_path: Path) -> None:
    mpp, path = 0.25, tmp_path / "roi.png"
    image = np.random.default_rng(1).integers(140, 200, (500, 600, 3)).astype(np.uint8)
    xy = np.array([[100.0, 80.0], [300.5, 220.25], [470.0, 400.0]])
    pictures.roi_overlay(image, xy, path, mpp=mpp)
    drawn = load(path)
    assert alone(path) and drawn.shape == image.shape
    changed = (drawn != image).any(-1)
    y, x = np.mgrid[:500, :600] + 0.5
    bar = (y > 500 - 60) & (x > 600 - 240)
    distance = np.min([np.hypot(x - a, y - b) for a, b in xy], axis=0)
    radius = 3 / mpp
    assert not (changed & ~bar & (abs(distance - radius) > 2.5)).any()
    for a, b in xy:
        for angle in np.linspace(0, 2 * np.pi, 16):
            column = int(a + (radius - 0.75) * np.cos(angle))
            row = int(b + (radius - 0.75) * np.sin(angle))
            assert changed[row, column]
        ring = changed & (np.hypot(x - a, y - b) < radius + 3)
        middle = np.argwhere(ring).mean(0)[::-1] + 0.5
        assert np.allclose(middle, (a, b), atol=0.6)
    # 50 µm are 200 px: the longest dark run of the bar's rows
    dark = (drawn[..., :3].max(-1) < 40) & bar
    assert int(dark.sum(1).max()) == 200


def test_large_rois_are_made_smaller(tmp_path: Path) -> None:
    image = np.full((1000, 2800, 3), PINK, np.uint8)
    pictures.roi_overlay(image, np.array([[2000.0, 600.0]]), tmp_path / "a.png", mpp=0.25)
    drawn = load(tmp_path / "a.png")
    assert drawn.shape == (500, 1400, 3)
    yellow = (drawn[..., 0] > 230) & (drawn[..., 2] < 90)
    y, x = np.argwhere(yellow).mean(0) + 0.5
    assert (x, y) == pytest.approx((1000, 300), abs=0.6)
    assert np.ptp(np.argwhere(yellow)[:, 1]) == pytest.approx(2 * 3 / 0.5, abs=2)


def test_types_have_colours_and_a_legend(tmp_path: Path) -> None:
    image = np.full((400, 500, 3), PINK, np.uint8)
    xy = np.array([[300.0, 100.0], [300.0, 200.0], [300.0, 300.0], [400.0, 100.0], [400.0, 200.0]])
    types = np.array(["tumour", "tumour", "immune", "", "tumour"])
    pictures.roi_overlay(image, xy, tmp_path / "a.png", types, mpp=0.25)
    drawn = load(tmp_path / "a.png").astype(int)
    first, second = np.array(pictures.COLOURS[:2])
    for (x, y), colour in zip(xy, [first, first, second, pictures.OTHER, first], strict=True):
        window = drawn[int(y) - 14 : int(y) + 14, int(x) - 14 : int(x) + 14]
        assert (abs(window - colour).max(-1) <= 20).sum() > 20
    corner = drawn[:80, :200]
    assert all((abs(corner - c).max(-1) < 10).any() for c in (first, second, pictures.OTHER))
    pictures.roi_overlay(image, xy, tmp_path / "b.png", np.full(5, ""), mpp=0.25)
    assert (load(tmp_path / "b.png")[:80, :200] == PINK).all(), "no types, no legend"
    many = np.array([f"kind {i}" for i in range(12)])
    pictures.roi_overlay(image, np.full((12, 2), 200.0), tmp_path / "c.png", many, mpp=0.25)
    legend = load(tmp_path / "c.png")[:230, :120].astype(int)
    for colour in (*pictures.COLOURS, pictures.OTHER):  # 8 types, and one entry for the other 4
        assert (abs(legend - colour).max(-1) < 10).any()
    with pytest.raises(ValueError, match="5 nuclei have 4 types"):
        pictures.roi_overlay(image, xy, tmp_path / "d.png", types[:4], mpp=0.25)
    assert not (tmp_path / "d.png").exists()


def test_a_roi_without_nuclei_and_a_tiny_one(tmp_path: Path) -> None:
    image = np.full((40, 50, 3), PINK, np.uint8)
    pictures.roi_overlay(image, np.zeros((0, 2)), tmp_path / "a.png", mpp=0.5)
    assert np.array_equal(load(tmp_path / "a.png"), image), "no room for a bar of 100 px"


def test_histograms(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    panels = [
        ("nuclei per ROI", rng.poisson(80, 300), "nuclei"),
        ("density", rng.normal(4000, 800, 300), "nuclei per mm²"),
        ("mpp", np.full(20, 0.25), "µm per pixel"),
        ("score", np.full(20, np.nan), ""),
        ("intensity", np.array([3.0, np.inf, 5.0]), "grey levels"),
    ]
    path = tmp_path / "a.png"
    pictures.histograms(path, panels)
    assert alone(path)
    first = load(path)
    assert first.shape[1] > first.shape[0] > 400 and first.std() > 20
    pictures.histograms(path, panels)
    assert np.array_equal(load(path), first), "the same picture for the same values"
    pictures.histograms(path, [("nuclei per ROI", rng.poisson(20, 300), "nuclei"), *panels[1:]])
    assert not np.array_equal(load(path), first)
    pictures.histograms(path, panels[:1])
    assert load(path).shape[1] < first.shape[1] / 2
    with pytest.raises(ValueError, match="at least one panel"):
        pictures.histograms(path, [])


def test_nothing_half_written(tmp_path: Path) -> None:
    crops = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(FileNotFoundError, match=re.escape("missing")):
        pictures.contact_sheet(crops, tmp_path / "missing" / "a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        pictures.contact_sheet(crops, tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
