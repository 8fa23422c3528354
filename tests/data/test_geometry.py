"""A crop is where the coordinates say, at the mpp that is asked for."""

import numpy as np
import pytest
from PIL import Image

from lemon_muse.data import geometry


def dot(side: int, x: float, y: float, radius: float) -> np.ndarray:
    """A dark disc with its centre at (x, y), pixel centres at +0.5, drawn with antialiasing."""
    fine = (np.arange(side * 8) + 0.5) / 8
    inside = (fine[None] - x) ** 2 + (fine[:, None] - y) ** 2 < radius**2
    share = inside.reshape(side, 8, side, 8).mean((1, 3))
    return np.repeat((255 - 200 * share)[..., None], 3, 2).astype(np.uint8)


def centroid(crop: np.ndarray) -> tuple[float, float]:
    weight = 255.0 - crop[..., 0]
    at = np.arange(len(crop)) + 0.5
    return float((weight.sum(0) @ at) / weight.sum()), float((weight.sum(1) @ at) / weight.sum())


@pytest.mark.parametrize("source_mpp", [0.125, 0.25, 0.4, 0.5])
def test_a_painted_nucleus_is_in_the_middle(source_mpp: float) -> None:
    x, y = 61.3, 44.8
    image, scale = geometry.resample(dot(128, x, y, 4), source_mpp=source_mpp, mpp=0.25)
    np.testing.assert_allclose(scale, source_mpp / 0.25, rtol=0.01)
    crop, rows = geometry.crop(image, np.array([[x, y]]) * scale, size=24)
    assert list(rows) == [0]
    assert max(abs(c - 12) for c in centroid(crop[0])) <= 0.6  # half a pixel, by design


def test_resampling_agrees_with_pillow() -> None:
    rng = np.random.default_rng(0)
    image = np.array(Image.fromarray(rng.integers(0, 256, (12, 15, 3), np.uint8)).resize((90, 72)))
    for mpp in (0.25, 1.0):
        ours, scale = geometry.resample(image, source_mpp=0.5, mpp=mpp)
        size = (round(90 * 0.5 / mpp), round(72 * 0.5 / mpp))
        theirs = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        assert np.abs(ours.astype(int) - theirs).max() <= 2
        np.testing.assert_allclose(scale, 0.5 / mpp)


def test_within_two_percent_pixels_are_left_alone() -> None:
    image = dot(32, 16, 16, 5)
    same, scale = geometry.resample(image, source_mpp=0.2527, mpp=0.25)
    assert same is image and (scale == 1).all()


def test_edges() -> None:
    image = dot(40, 2.5, 38.5, 3)
    points = np.array([[2.5, 38.5], [20.0, 20.0], [0.0, 0.0], [39.99, 39.99]])
    mirrored, rows = geometry.crop(image, points, size=16)
    assert list(rows) == [0, 1, 2, 3] and mirrored.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(mirrored[0][:, 8], image[np.r_[31:40, 39:32:-1], 3])
    inside, rows = geometry.crop(image, points, size=16, edge="drop")
    assert list(rows) == [1]
    np.testing.assert_array_equal(inside[0], image[12:28, 12:28])
    tiny, rows = geometry.crop(image[:5, :5], np.array([[2.0, 2.0]]), size=32)
    assert tiny.shape == (1, 32, 32, 3)
