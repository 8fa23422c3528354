"""Drawing nuclei: batches of small stamps that are pasted into the planes of stain.

A stamp knows the local coordinates of its pixels in µm (u along the long axis, v across) and gives
a mask in [0, 1] and the hematoxylin and eosin inside it. The kinds differ in outline, chromatin,
nucleoli and what surrounds them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lemon_muse.synthetic.cells import FIBROBLAST, LYMPHOCYTE, MITOSIS, PLASMA, TUMOUR, Cells
from lemon_muse.synthetic.noise import Window, smooth, texture

BATCH = 96
Layers = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Canvas:
    """Planes of hematoxylin and eosin, float32 [height, width], on the pixels of `window`."""

    window: Window
    h: np.ndarray
    e: np.ndarray


@dataclass(frozen=True)
class Stamp:
    """A batch of `n` stamps of S x S pixels: local coordinates and textures, float32 [n, S, S].

    `u`, `v` are µm along and across the nucleus, `fine` and `coarse` chromatin noise, `bumps` the
    noise of outlines; all noise has unit variance. `cells` holds the rows drawn.
    """

    cells: Cells
    u: np.ndarray
    v: np.ndarray
    fine: np.ndarray
    coarse: np.ndarray
    bumps: np.ndarray

    def dice(self, column: int, low: float, high: float) -> np.ndarray:
        """One of the cell's uniform draws, scaled to [low, high); float32 [n, 1, 1]."""
        value = low + (high - low) * self.cells.dice[:, column]
        return value.astype(np.float32)[:, None, None]

    def column(self, name: str) -> np.ndarray:
        """A cell's property as float32 [n, 1, 1]."""
        return np.asarray(getattr(self.cells, name))[:, None, None]


def paint(canvas: Canvas, cells: Cells) -> None:
    """Draw all nuclei (and what each brings of cytoplasm) onto the canvas, cytoplasm first."""
    batches = list(_batches(canvas.window, cells))
    for draw, cover in ((_surround, 0.6), (_body, 0.8)):
        for kind, stamp, rows, cols in batches:
            for mask, h, e in draw(kind, stamp):
                for i in range(len(mask)):
                    _paste(canvas, mask[i], h[i], e[i], rows[i], cols[i], cover)


def _paste(
    canvas: Canvas,
    mask: np.ndarray,
    h: np.ndarray,
    e: np.ndarray,
    row: int,
    col: int,
    cover: float,
) -> None:
    """Put one stamp down. What lies below shines through a little: a section is 4 µm thick."""
    height, width = canvas.h.shape
    size = len(mask)
    top, left = max(0, -row), max(0, -col)
    bottom, right = min(size, height - row), min(size, width - col)
    if top >= bottom or left >= right:
        return
    part = (slice(top, bottom), slice(left, right))
    place = (slice(row + top, row + bottom), slice(col + left, col + right))
    m = mask[part]
    keep = 1 - np.float32(cover) * m
    for plane, value in ((canvas.h, h), (canvas.e, e)):
        target = plane[place]
        target *= keep
        target += m * value[part]


def _reach(cells: Cells) -> np.ndarray:
    """Half the side of the stamp in µm: the nucleus and what is drawn around it."""
    extra = np.choose(cells.kind, [2.4, 6.5, 2.0, 2.0, 4.5])
    return cells.axes.max(axis=1) * 1.08 + extra


def _batches(window: Window, cells: Cells) -> Iterator[tuple[int, Stamp, np.ndarray, np.ndarray]]:
    """Stamps of equal kind and size together, in a fixed order."""
    pixels = 2 * np.ceil(_reach(cells) / window.step).astype(np.int64) + 1
    grain = 12
    side = (pixels + grain - 1) // grain * grain
    for kind in (FIBROBLAST, TUMOUR, PLASMA, LYMPHOCYTE, MITOSIS):
        for size in np.unique(side[cells.kind == kind]):
            rows = np.flatnonzero((cells.kind == kind) & (side == size))
            for start in range(0, len(rows), BATCH):
                yield kind, *_stamp(window, cells.take(rows[start : start + BATCH]), int(size))


def _stamp(window: Window, cells: Cells, size: int) -> tuple[Stamp, np.ndarray, np.ndarray]:
    x = (cells.xy[:, 0].astype(np.float64) - window.x) / window.step
    y = (cells.xy[:, 1].astype(np.float64) - window.y) / window.step
    col, row = np.floor(x).astype(np.int64) - size // 2, np.floor(y).astype(np.int64) - size // 2
    grid = np.arange(size) + 0.5
    dx = ((col[:, None] + grid - x[:, None]) * window.step).astype(np.float32)[:, None, :]
    dy = ((row[:, None] + grid - y[:, None]) * window.step).astype(np.float32)[:, :, None]
    cos, sin = np.cos(cells.angle)[:, None, None], np.sin(cells.angle)[:, None, None]
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    step = np.arange(size)
    shift = (cells.dice[:, 6:8] * 512).astype(np.int64)
    at_y = (shift[:, 1, None] + step)[:, :, None] % 512
    at_x = (shift[:, 0, None] + step)[:, None, :] % 512
    noises = [texture(g, window.step)[at_y, at_x] for g in (0.42, 0.85, 2.6)]
    return Stamp(cells, u, v, *noises), row, col


def _oval(stamp: Stamp, wobble: float) -> tuple[np.ndarray, np.ndarray]:
    """Relative radius rho (1 on the outline) and about the signed distance inside in µm."""
    a, b = stamp.cells.axes[:, :1, None], stamp.cells.axes[:, 1:, None]
    rho = np.sqrt((stamp.u / a) ** 2 + (stamp.v / b) ** 2)
    rho = rho * (1 + np.float32(wobble) * stamp.bumps)
    return rho, (1 - rho) * np.sqrt(a * b)


def _edge(inside: np.ndarray, soft: np.ndarray | float) -> np.ndarray:
    """Mask from a signed distance in µm: a smooth step of width about 2 `soft`."""
    return smooth(inside / soft, -1, 1)


def _surround(kind: int, stamp: Stamp) -> Layers:
    """Cytoplasm or clear zone below the nucleus."""
    if kind == PLASMA:
        # The nucleus lies at one end of an oval, violet cell; a pale hof (Golgi) beside it.
        length, width = stamp.dice(0, 5.0, 6.8), stamp.dice(1, 4.0, 5.2)
        shift = length * stamp.dice(2, 0.38, 0.6)
        rho = np.sqrt(((stamp.u - shift) / length) ** 2 + (stamp.v / width) ** 2)
        mask = _edge((1 - rho * (1 + 0.07 * stamp.bumps)) * width, 0.5)
        near = (stamp.u - stamp.cells.axes[:, :1, None] - 0.6) ** 2 + (stamp.v * 0.8) ** 2
        hof = 1 - 0.6 * np.exp(-near / 2.2)
        h = stamp.dice(3, 0.16, 0.34) * hof * (1 + 0.14 * stamp.fine)
        return [(mask, h, stamp.dice(4, 0.2, 0.42) * hof * (1 + 0.1 * stamp.coarse))]
    if kind == MITOSIS:
        # Cells round up to divide: a clear, finely granular zone around the chromosomes.
        reach = stamp.dice(0, 6.0, 7.6)
        rho = np.hypot(stamp.u, stamp.v) * (1 + 0.06 * stamp.bumps)
        mask = _edge(reach - rho, 0.6)
        e = stamp.dice(1, 0.1, 0.26) * (1 + 0.2 * stamp.fine)
        return [(mask, stamp.dice(2, 0.04, 0.12) * (1 + 0.3 * stamp.fine), e)]
    if kind == LYMPHOCYTE:
        rho, inside = _oval(stamp, 0.06)
        mask = _edge(inside + stamp.dice(0, 0.3, 1.3), 0.5) * 0.6
        return [(mask, 0.1 + 0 * rho, 0.16 + 0 * rho)]
    return []


def _body(kind: int, stamp: Stamp) -> Layers:
    """The nucleus itself."""
    bodies: dict[int, Callable[[Stamp], Layers]] = {
        LYMPHOCYTE: _lymphocyte,
        PLASMA: _plasma,
        TUMOUR: _tumour,
        FIBROBLAST: _fibroblast,
        MITOSIS: _mitosis,
    }
    return bodies[kind](stamp)


def _lymphocyte(stamp: Stamp) -> Layers:
    """Round, dense, smudged clumps of chromatin."""
    rho, inside = _oval(stamp, 0.05)
    clumps = 1 + 0.16 * stamp.coarse + 0.1 * stamp.fine + 0.1 * smooth(rho, 0.5, 0.95)
    pale = 1 - 0.5 * stamp.column("open") * (1 - smooth(rho, 0.6, 0.9))
    h = stamp.column("dense") * clumps * pale
    return [(_edge(inside, stamp.column("soft")), h, 0.16 * np.ones_like(h))]


def _plasma(stamp: Stamp) -> Layers:
    """Clock face: blocks of chromatin on the rim, pale between them."""
    rho, inside = _oval(stamp, 0.035)
    count = np.floor(stamp.dice(5, 5, 8.99))
    angle = np.arctan2(stamp.v, stamp.u)
    uneven = stamp.coarse + 0.5 * stamp.bumps + 0.4 * stamp.fine
    wheel = stamp.dice(7, 0.3, 0.9) * np.cos(count * angle + stamp.dice(6, 0, 6.28))
    spokes = smooth(wheel + 0.6 * uneven, -0.9, 1.1)
    rim = smooth(rho, 0.3, 0.7)
    middle = stamp.dice(0, 0.0, 0.7) * (1 - smooth(rho, 0.12, 0.3))
    h = stamp.column("dense") * (0.52 + 0.55 * np.maximum(spokes * rim, middle) + 0.07 * stamp.fine)
    return [(_edge(inside, stamp.column("soft")), h, 0.2 * np.ones_like(h))]


def _tumour(stamp: Stamp) -> Layers:
    """Large, uneven outline; vesicular (rim, strands, nucleoli) to densely hyperchromatic."""
    _, inside = _oval(stamp, 0.06)
    opened, dense = stamp.column("open"), stamp.column("dense")
    rim = np.exp(-(((inside - 0.45) / 0.42) ** 2))
    strands = smooth(stamp.coarse + 0.4 * stamp.fine, 0.2, 1.6)
    closed = 0.84 + 0.15 * stamp.coarse + 0.1 * stamp.fine
    vesicle = 0.4 + 0.4 * strands + 0.09 * stamp.fine + 0.3 * rim
    h = dense * (closed + opened * (vesicle - closed))
    e = 0.14 + 0 * h
    for k, share in ((0, 1.0), (1, 0.45)):
        # A nucleolus is hematoxylin and eosin together: dark magenta, in about 4 of 5 nuclei.
        place = stamp.dice(2 * k + 2, 0, 6.28)
        far = stamp.dice(2 * k + 3, 0.0, 0.55) * np.sqrt(stamp.cells.axes.prod(1))[:, None, None]
        size = stamp.dice(2 * k + 1, 0.55, 1.3) * np.where(stamp.dice(k, 0, 1) < 0.85 * share, 1, 0)
        gap = np.hypot(stamp.u - far * np.cos(place), stamp.v - far * np.sin(place))
        spot = smooth(size - gap, -0.25, 0.3) * (size > 0) * (0.4 + 0.6 * opened)
        h = h + spot * np.maximum(0.95 * dense - h, 0) + 0.08 * spot
        e = e + 0.3 * spot
    return [(_edge(inside, stamp.column("soft")), h, e)]


def _fibroblast(stamp: Stamp) -> Layers:
    """A spindle with pointed ends, bent with its fibre."""
    a, b = stamp.cells.axes[:, :1, None], stamp.cells.axes[:, 1:, None]
    bend = stamp.dice(0, -0.035, 0.035) * stamp.u**2
    wave = stamp.dice(1, -0.5, 0.5) * np.sin(stamp.u * (2.2 / a) * 1.5)
    v = stamp.v - bend - wave
    t = np.clip(np.abs(stamp.u) / a, 0, 1.3)
    half = b * np.clip(1 - t ** stamp.dice(2, 1.9, 4.5), -0.6, 1) * (1 + 0.14 * stamp.bumps)
    inside = half - np.abs(v)
    # Beyond the tips the distance to the tip counts, not the one to the axis.
    inside = np.where(t > 1, np.minimum(inside, (1 - t) * a), inside)
    grain = 1 + 0.13 * stamp.coarse + 0.1 * stamp.fine
    hollow = 1 - 0.6 * stamp.column("open") * smooth(inside, 0.2, 1.4)
    h = stamp.column("dense") * grain * hollow
    return [(_edge(inside, stamp.column("soft")), h, 0.16 * np.ones_like(h))]


def _mitosis(stamp: Stamp) -> Layers:
    """Chromosomes without a membrane: a plate, two plates, a ring or a ragged clump."""
    form = stamp.dice(5, 0, 1)
    ragged = 0.4 * stamp.coarse + 0.2 * stamp.fine
    radius = np.hypot(stamp.u, stamp.v)
    thick, long = stamp.dice(3, 1.1, 1.9), stamp.dice(4, 3.6, 5.4)

    def bar(offset: np.ndarray | float, half: np.ndarray, reach: np.ndarray) -> np.ndarray:
        flat = half * np.sqrt(np.clip(1 - (stamp.v / reach) ** 2, 0, 1))
        return np.minimum(flat - np.abs(stamp.u - offset), reach - np.abs(stamp.v))

    plate = bar(0.0, thick, long)
    gap = stamp.dice(0, 2.2, 3.6)
    pair = np.maximum(bar(gap, thick * 0.75, long * 0.8), bar(-gap, thick * 0.75, long * 0.8))
    ring = thick * 0.85 - np.abs(radius - stamp.dice(1, 2.0, 2.9))
    clump = stamp.dice(2, 2.7, 3.7) - radius + 0.75 * stamp.bumps + ragged
    inside = np.where(form < 0.45, plate, np.where(form < 0.58, pair, clump))
    inside = np.where((form >= 0.58) & (form < 0.7), ring, inside) + 0.5 * ragged
    h = stamp.column("dense") * (1.05 + 0.1 * stamp.fine)
    return [(_edge(inside, 0.35), h, 0.2 * np.ones_like(h))]
