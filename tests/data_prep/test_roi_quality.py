"""What is called blurred, inked or empty: generated and real fields, spoilt on purpose."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from data_prep import roi_quality
from data_prep.detector import tissue_mask
from lemon_muse.data.slides import open_slide
from lemon_muse.data.table import read_image
from lemon_muse.errors import UserError
from lemon_muse.synthetic import tissue

INKS = {
    "green": (20, 130, 60),
    "blue": (20, 40, 180),
    "black": (25, 25, 30),
    "red": (210, 25, 35),
}


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    soft = gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))
    return soft.round().astype(np.uint8)


def inked(
    image: np.ndarray, colour: tuple[int, int, int], alpha: float, share: float
) -> np.ndarray:
    """A slanting stroke over about `share` of the image."""
    high, wide, _ = image.shape
    stroke = Image.new("L", (wide, high))
    line = [(0, 0.4 * high), (wide, 0.6 * high)]
    ImageDraw.Draw(stroke).line(line, fill=255, width=round(share * high))
    weight = np.asarray(stroke)[..., None] / 255 * alpha
    return (image * (1 - weight) + np.array(colour) * weight).round().astype(np.uint8)


@pytest.fixture(scope="module")
def fields() -> list[np.ndarray]:
    """One field of 256 µm from each of the four scanners, 0.25 mpp."""
    return [tissue(40 + i, side=1024, mpp=0.25, slide=20 + i, scanner=i).image for i in range(4)]


@pytest.fixture(scope="module")
def real(shared_data: Path) -> list[np.ndarray]:
    paths = sorted((shared_data / "brca-m2c" / "images").glob("*.png"))
    if not paths:
        pytest.skip("no images of BRCA-M2C")
    return [read_image(path) for path in paths]


def test_generated_fields(fields: list[np.ndarray]) -> None:
    for image in fields:
        assert roi_quality.judge(image, 0.25) == ""
        assert roi_quality.judge(blurred(image, 1 / 0.25), 0.25) == "", "soft is not rejected"
        assert roi_quality.judge(blurred(image, 2 / 0.25), 0.25) == "blurred"
        assert roi_quality.judge(blurred(image, 4 / 0.25), 0.25) == "blurred"


def test_real_fields(real: list[np.ndarray]) -> None:
    assert [i for i, image in enumerate(real) if roi_quality.judge(image, 0.5)] == []
    some = real[::3]
    for um in (2, 4):
        found = [roi_quality.judge(blurred(image, um / 0.5), 0.5) for image in some]
        assert "" not in found and "pen" not in found
        assert found.count("blurred") >= len(some) - 1  # one is fat, whose pale walls blur to glass
    sharp = [roi_quality.measure(image, 0.5)["sharpness"] for image in real]
    assert min(sharp) > 1.5 * roi_quality.SHARP, "the threshold is far from what is in focus"


@pytest.mark.parametrize("ink", INKS)
def test_marker_strokes(fields: list[np.ndarray], ink: str) -> None:
    for image in fields:
        for alpha in (0.8, 1.0):
            drawn = inked(image, INKS[ink], alpha, 0.06)
            assert roi_quality.judge(drawn, 0.25) == "pen"
            assert 0.03 < roi_quality.measure(drawn, 0.25)["pen"] < 0.07
        assert roi_quality.judge(inked(image, INKS[ink], 0.9, 0.005), 0.25) == "", "a speck"


@pytest.mark.parametrize("ink", INKS)
def test_marker_strokes_on_real_fields(real: list[np.ndarray], ink: str) -> None:
    found = [roi_quality.judge(inked(im, INKS[ink], 0.85, 0.08), 0.5) for im in real[::5]]
    assert found.count("pen") == len(found)


def test_real_slides(shared_data: Path) -> None:
    """Of two slides, only the margin that a surgeon's dye marked is called inked."""
    with open_slide(shared_data / "wsi" / "cmu-1-small-region.svs") as slide:
        assert roi_quality.judge(slide.read(0, 1500, 1000, 500, 500), slide.mpp) == "pen"
        assert roi_quality.judge(slide.read(0, 0, 1500, 500, 500), slide.mpp) == "background"
        assert roi_quality.judge(slide.read(0, 700, 2000, 500, 500), slide.mpp) == ""
    with open_slide(shared_data / "wsi" / "tcga-cr-7395-01a-01-ts1.svs", mpp=1.0) as slide:
        found = [
            roi_quality.judge(slide.read(0, x, y, 500, 500), slide.mpp)
            for y in range(0, slide.height - 500, 500)
            for x in range(0, slide.width - 500, 500)
        ]
    assert set(found) == {"", "background"} and found.count("") > 30


def test_glass_and_darkness() -> None:
    rng = np.random.default_rng(0)
    glass = rng.integers(236, 246, (512, 512, 1)).repeat(3, 2).astype(np.uint8)
    assert roi_quality.judge(glass, 0.5) == "background"
    assert math.isnan(roi_quality.measure(glass, 0.5)["sharpness"])
    assert roi_quality.judge(np.zeros((512, 512, 3), np.uint8), 0.5) in ("pen", "background")
    flat = np.full((512, 512, 3), (220, 150, 190), np.uint8)
    assert roi_quality.judge(flat, 0.5) == "", "no contrast is no proof of blur"


def test_stain_exposure_and_resolution_cancel_out(fields: list[np.ndarray]) -> None:
    for image in fields:
        sharpness = roi_quality.measure(image, 0.25)["sharpness"]
        darker = (image * 0.7).astype(np.uint8)
        assert roi_quality.measure(darker, 0.25)["sharpness"] == pytest.approx(sharpness, rel=0.05)
        for mpp in (0.3, 0.4, 0.5, 0.7):
            side = round(1024 * 0.25 / mpp)
            smaller = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            got = roi_quality.measure(np.asarray(smaller), mpp)["sharpness"]
            assert got == pytest.approx(sharpness, rel=0.15)


def test_coarse_slides_are_not_called_blurred(fields: list[np.ndarray]) -> None:
    soft = blurred(fields[0], 16)
    assert roi_quality.judge(soft, 0.25) == "blurred"
    assert roi_quality.judge(soft, 0.8) == ""
    assert math.isnan(roi_quality.measure(soft, 0.8)["sharpness"])


def test_the_numbers_against_plain_loops() -> None:
    image = inked(tissue(3, side=336, mpp=0.5, slide=8).image, INKS["green"], 0.9, 0.1)
    image[:, :90] = 245
    small = image[:336, :336].reshape(168, 2, 168, 2, 3).mean((1, 3))  # 1 µm per pixel
    mask = tissue_mask(small.reshape(42, 4, 42, 4, 3).mean((1, 3)).round().astype(np.uint8))
    light = small @ (0.299, 0.587, 0.114)
    ink, share, fine, coarse = 0, 0.0, [], []
    for r in range(0, 168, 8):
        for c in range(0, 168, 8):
            red, green, _ = small[r : r + 8, c : c + 8].mean((0, 1))
            if green - red > 15:
                ink += 1
                continue
            cells = [mask[(r + i) // 4, (c + j) // 4] for i in (0, 4) for j in (0, 4)]
            share += sum(cells) / 4
            if not all(cells):
                continue
            for i in range(r, r + 8, 2):
                fine += [np.var(light[i : i + 2, j : j + 2]) for j in range(c, c + 8, 2)]
            means = [
                light[r + i : r + i + 4, c + j : c + j + 4].mean() for i in (0, 4) for j in (0, 4)
            ]
            coarse.append(np.var(means))
    got = roi_quality.measure(image, 0.5)
    assert 0.05 < ink / 441 < 0.15 and got["pen"] == pytest.approx(ink / 441, abs=0.003)
    assert 0.4 < share / 441 < 0.9 and got["tissue"] == pytest.approx(share / 441, abs=0.01)
    wanted = (np.mean(fine) + 0.1) / (np.mean(coarse) + 0.1)
    assert got["sharpness"] == pytest.approx(wanted, rel=0.02)


def test_too_small_is_named() -> None:
    with pytest.raises(UserError, match=r"30 x 20 px at 0.25 µm.* at least 8 x 8 µm"):
        roi_quality.judge(np.zeros((20, 30, 3), np.uint8), 0.25)
    assert roi_quality.judge(np.full((32, 32, 3), 240, np.uint8), 0.25) == "background"
