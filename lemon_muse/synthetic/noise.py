"""Smooth noise that is a pure function of world coordinates, so that patches meet without a seam.

One fixed periodic tile of white noise is read through a cubic B-spline at any lattice spacing: that
spacing is the grain of the noise, and neighbouring windows agree because nothing but the position
enters. The tile repeats after 1024 lattice points (0.5 mm at a grain of 0.5 µm).
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

TILE = 1024
# Standard deviation that the cubic B-spline leaves of unit white noise, in two dimensions: 151/315.
SPLINE_STD = np.float32(151 / 315)


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels in the world: left and top edge in µm, step in µm, size in pixels."""

    x: float
    y: float
    step: float
    width: int
    height: int

    def grown(self, margin: float, step: float | None = None) -> "Window":
        """At least `margin` µm larger on every side, on the world's grid of `step` µm."""
        step = step or self.step
        left, top = (int(np.floor((v - margin) / step + 1e-6)) for v in (self.x, self.y))
        right = int(np.ceil((self.x + self.width * self.step + margin) / step - 1e-6))
        bottom = int(np.ceil((self.y + self.height * self.step + margin) / step - 1e-6))
        return Window(left * step, top * step, step, right - left, bottom - top)

    def inner(self, small: "Window") -> tuple[slice, slice]:
        """Rows and columns of this window that `small`, of the same step, covers."""
        row, col = round((small.y - self.y) / self.step), round((small.x - self.x) / self.step)
        return slice(row, row + small.height), slice(col, col + small.width)


def _taps(position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First lattice index int64 and cubic B-spline weights float32 [4, ...] of positions."""
    base = np.floor(position)
    t = (position - base).astype(np.float32)
    one = 1 - t
    weights = np.stack(
        [
            one**3 / 6,
            (4 - 6 * t**2 + 3 * t**3) / 6,
            (4 - 6 * one**2 + 3 * one**3) / 6,
            t**3 / 6,
        ]
    )
    return base.astype(np.int64) - 1, weights


def spline_grid(
    lattice: np.ndarray, window: Window, *, step: float, x: float, y: float, wrap: bool
) -> np.ndarray:
    """Read a lattice through a cubic B-spline on the pixels of a window.

    Args:
        lattice: float32 [rows, columns]; point (0, 0) lies at (`x`, `y`) µm, `step` µm apart.
        window: where to read.
        step: lattice spacing, µm.
        x: column 0, µm.
        y: row 0, µm.
        wrap: periodic lattice; otherwise the border value continues.

    Returns:
        float32 [window.height, window.width].
    """
    rows = (window.y + (np.arange(window.height) + 0.5) * window.step - y) / step
    cols = (window.x + (np.arange(window.width) + 0.5) * window.step - x) / step
    row0, row_weights = _taps(rows)
    col0, col_weights = _taps(cols)
    mode: Literal["wrap", "clip"] = "wrap" if wrap else "clip"
    # Columns first, on the few lattice rows that are touched; then rows. Plain sums, no BLAS: the
    # result must not depend on the number of threads.
    low, high = int(row0.min()), int(row0.max()) + 4
    strip = np.take(lattice, np.arange(low, high), axis=0, mode=mode)
    wide = np.zeros((len(strip), window.width), np.float32)
    for k in range(4):
        wide += np.take(strip, col0 + k, axis=1, mode=mode) * col_weights[k]
    out = np.zeros((window.height, window.width), np.float32)
    for k in range(4):
        out += wide[row0 + k - low] * row_weights[k][:, None]
    return out


@lru_cache(maxsize=1)
def white() -> np.ndarray:
    """The tile of white noise, float32 [1024, 1024], always the same."""
    return np.random.default_rng(20240229).standard_normal((TILE, TILE), dtype=np.float32)


@lru_cache(maxsize=16)
def texture(grain: float, mpp: float) -> np.ndarray:
    """A periodic texture in pixels, unit variance: grain µm, read at `mpp`; float32 [512, 512]."""
    size = 512
    lattice = max(4, round(size * mpp / grain))
    window = Window(0.0, 0.0, 1.0, size, size)
    tile = np.ascontiguousarray(white()[:lattice, :lattice])
    out = spline_grid(tile, window, step=size / lattice, x=0.0, y=0.0, wrap=True)
    return (out - out.mean()) / out.std()


class Noise:
    """Named noise fields of one piece of tissue."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _offset(self, name: str, octave: int) -> np.ndarray:
        key = [self.seed, zlib.crc32(name.encode()), octave]
        return np.random.default_rng(key).integers(0, TILE, 2) + 0.5

    def grid(self, name: str, window: Window, grain: float, *, octaves: int = 1) -> np.ndarray:
        """Unit-variance noise float32 [height, width] with `grain` µm between lattice points."""
        total = np.zeros((window.height, window.width), np.float32)
        power = 0.0
        for octave in range(octaves):
            step = grain / 2**octave
            dx, dy = self._offset(name, octave) * step
            part = spline_grid(white(), window, step=step, x=-dx, y=-dy, wrap=True)
            total += part * np.float32(0.5**octave)
            power += 0.25**octave
        return total / (SPLINE_STD * np.float32(np.sqrt(power)))

    def points(
        self, name: str, x: np.ndarray, y: np.ndarray, grain: float, *, octaves: int = 1
    ) -> np.ndarray:
        """The same noise at scattered points: x, y in µm, any equal shape."""
        total = np.zeros(x.shape, np.float32)
        power = 0.0
        tile = white()
        for octave in range(octaves):
            step = grain / 2**octave
            dx, dy = self._offset(name, octave) * step
            row0, row_weights = _taps((y + dy) / step)
            col0, col_weights = _taps((x + dx) / step)
            for j in range(4):
                rows = (row0 + j) % TILE
                for k in range(4):
                    weight = row_weights[j] * col_weights[k] * np.float32(0.5**octave)
                    total += tile[rows, (col0 + k) % TILE] * weight
            power += 0.25**octave
        return total / (SPLINE_STD * np.float32(np.sqrt(power)))


def smooth(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a smooth step between (float32)."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)
