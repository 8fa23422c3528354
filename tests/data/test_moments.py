"""Moments are the sums of all pixels, whatever their shape and layout."""

import numpy as np
import pytest

from lemon_muse.data.moments import Moments


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (5, 7, 3), (300, 64, 64, 3), (700, 333, 3)])
def test_sums_are_those_of_whole_numbers(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for part in (pixels, pixels[::3, ::2] if pixels.ndim > 2 else pixels[::2]):
        moments = Moments()
        moments.add(part)
        moments.add(part[:1])
        values = np.concatenate([part.reshape(-1, 3), part[:1].reshape(-1, 3)]).astype(np.int64)
        wanted = [values.sum(0) / 255, (values**2).sum(0) / 255**2]
        np.testing.assert_allclose(moments.sums, wanted, rtol=1e-14)
        assert moments.count == len(values)


def test_white_pixels_do_not_overflow() -> None:
    moments = Moments()
    moments.add(np.full((4096, 1024, 3), 255, np.uint8))
    np.testing.assert_array_equal(moments.sums, 4096 * 1024)
