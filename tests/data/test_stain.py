"""Stain vectors: known ones are found again, there and back, and nothing on glass."""

import json
from pathlib import Path

import numpy as np
import pytest
from skimage.color import rgb2lab, rgb_from_hed

from lemon_muse.data import stain
from lemon_muse.data.slides import open_slide

# Hematoxylin and eosin: those that Macenko's program is shipped with, and a bluer pair.
PAIRS = (
    ((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)),
    ((0.70, 0.66, 0.28), (0.20, 0.90, 0.40)),
)


def unit(vectors: object) -> np.ndarray:
    out = np.asarray(vectors, np.float64)
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.rad2deg(np.arccos(np.clip((unit(a) * unit(b)).sum(-1), -1, 1)))


def amounts(n: int, rng: np.random.Generator) -> np.ndarray:
    """Float [n, 2]: a fifth pure hematoxylin, a fifth pure eosin, a fifth glass, the rest mixed."""
    out = rng.gamma(3, 0.4, (n, 2))
    part = n // 5
    out[:part, 1] = 0
    out[part : 2 * part, 0] = 0
    out[2 * part : 3 * part] = 0
    return out


def draw(amount: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Beer-Lambert, pixel values not yet rounded, float [n, 3]."""
    return 256 * np.exp(-(amount[:, :1] * vectors[0] + amount[:, 1:] * vectors[1])) - 1


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("noise", [0.0, 2.0])
@pytest.mark.parametrize("swapped", [False, True])
def test_known_stains_are_found_again(pair: object, noise: float, swapped: bool) -> None:
    rng = np.random.default_rng(0)
    vectors, amount = unit(pair), amounts(60_000, rng)
    if swapped:  # most of the tissue is the other stain: the order of the vectors does not follow
        amount = amount[:, ::-1] * (0.7, 1.4)
    light = draw(amount, vectors) + rng.normal(0, noise, (60_000, 3))
    pixels = light.round().clip(0, 255).astype(np.uint8)
    found = stain.macenko(pixels)
    assert found is not None
    assert degrees(found[0], vectors).max() < 2
    assert np.allclose(np.linalg.norm(found[0], axis=1), 1)
    assert found[0][0, 0] > found[0][1, 0], "hematoxylin first"
    stained = (-np.log((pixels.astype(float) + 1) / 256) >= 0.15).all(1)
    wanted, *_ = np.linalg.lstsq(
        found[0].T, -np.log((pixels[stained].astype(float).T + 1) / 256), rcond=None
    )
    assert np.allclose(found[1], np.percentile(wanted, 99, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found[1], np.percentile(amount[stained], 99, axis=0), rtol=0.1)


def test_the_order_of_pixels_and_the_amount_of_glass_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    pixels = draw(amounts(5000, rng), unit(PAIRS[0])).round().clip(0, 255).astype(np.uint8)
    glass = np.full((20_000, 3), 243, np.uint8)
    first = stain.macenko(pixels)
    again = stain.macenko(rng.permutation(np.concatenate([pixels, glass])))
    assert first is not None and again is not None
    assert np.allclose(first[0], again[0]) and np.allclose(first[1], again[1])


def test_no_two_stains() -> None:
    rng = np.random.default_rng(2)
    glass = rng.integers(236, 250, (5000, 3), dtype=np.uint8)
    assert stain.macenko(glass) is None
    assert stain.macenko(np.zeros((0, 3), np.uint8)) is None
    tissue = draw(rng.gamma(3, 0.4, (99, 2)) + 0.5, unit(PAIRS[0])).round().astype(np.uint8)
    assert stain.macenko(tissue) is None, "too few"
    assert stain.macenko(np.concatenate([tissue] * 2)) is not None
    grey = np.repeat(rng.integers(0, 200, (5000, 1), dtype=np.uint8), 3, 1)
    assert stain.macenko(grey) is None
    assert stain.macenko(np.full((5000, 3), 90, np.uint8)) is None
    one = amounts(5000, rng)
    one[:, 1] = 0
    light = draw(one, unit(PAIRS[0])) + rng.normal(0, 1, (5000, 3))
    assert stain.macenko(light.round().clip(0, 255).astype(np.uint8)) is None, "one stain"


def test_there_and_back() -> None:
    rng = np.random.default_rng(3)
    vectors = unit(PAIRS[0])
    amount = rng.uniform(0, 1.6, (4000, 2))
    pixels = stain.compose(amount, vectors)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, draw(amount, vectors).round().clip(0, 255))
    back = stain.concentrations(pixels, vectors)
    assert back.dtype == np.float32 and np.abs(back - amount).max() < 0.06  # of rounded pixels
    again = stain.compose(back, vectors).astype(int)
    assert np.abs(again - pixels).max() <= 1
    anything = rng.integers(0, 256, (500, 3), dtype=np.uint8)
    density = -np.log((anything.astype(float) + 1) / 256)
    wanted, *_ = np.linalg.lstsq(vectors.T, density.T, rcond=None)
    np.testing.assert_allclose(stain.concentrations(anything, vectors), wanted.T, atol=2e-5)
    black = stain.compose(np.array([[40.0, 40], [0, 0], [-1, -1]]), vectors)
    assert black.tolist() == [[0] * 3, [255] * 3, [255] * 3]


def test_moments_in_lab() -> None:
    image = np.random.default_rng(4).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    mean, std = stain.lab_moments(image.reshape(-1, 3))
    lab = rgb2lab(image)
    np.testing.assert_allclose(mean, [lab[..., c].mean() for c in range(3)])
    np.testing.assert_allclose(std, [lab[..., c].std() for c in range(3)])
    white, none = stain.lab_moments(np.full((9, 3), 255, np.uint8))
    assert np.allclose(white, (100, 0, 0), atol=0.01) and np.allclose(none, 0)


def test_description_goes_through_json() -> None:
    rng = np.random.default_rng(5)
    pixels = draw(amounts(5000, rng), unit(PAIRS[1])).round().clip(0, 255).astype(np.uint8)
    said = json.loads(json.dumps(stain.describe(pixels), allow_nan=False))
    assert list(said) == ["lab_mean", "lab_std", "vectors", "strength"]
    found = stain.macenko(pixels)
    assert found is not None
    for key, value in zip(said, (*stain.lab_moments(pixels), *found), strict=True):
        assert np.abs(np.array(said[key]) - value).max() <= 0.5e-5 + 1e-12
    blank = json.loads(json.dumps(stain.describe(np.full((500, 3), 250, np.uint8))))
    assert blank["vectors"] is None and blank["strength"] is None and len(blank["lab_mean"]) == 3


def test_other_arrays_are_refused() -> None:
    for wrong in (np.zeros((4, 3)), np.zeros((2, 2, 3), np.uint8), np.zeros((4, 4), np.uint8)):
        for function in (stain.macenko, stain.lab_moments, stain.describe):
            with pytest.raises(ValueError, match=r"uint8 \[n, 3\]"):
                function(wrong)
    with pytest.raises(ValueError, match="no pixel"):
        stain.describe(np.zeros((0, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "mpp"), [("cmu-1-small-region.svs", None), ("tcga-cr-7395-01a-01-ts1.svs", 1.0)]
)
def test_a_real_slide(shared_data: Path, name: str, mpp: float | None) -> None:
    path = shared_data / "wsi" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    with open_slide(path, mpp=mpp) as slide:
        pixels = slide.thumbnail(1024).reshape(-1, 3)
    found = stain.macenko(pixels)
    assert found is not None and (found[0] > 0).all() and (found[1] > 0.5).all()
    # Measured: 10 and 25 degrees (CMU), 22 and 22 (TCGA); Ruifrok's eosin is purer than most.
    assert (degrees(found[0], rgb_from_hed[:2]) < (25, 30)).all()
    # It fits its own slide: two amounts a pixel bring the picture back.
    again = stain.compose(stain.concentrations(pixels, found[0]), found[0])
    assert np.abs(again.astype(int) - pixels).mean() < 6
