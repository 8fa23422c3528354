"""Where the ROIs of a slide lie: a grid, or the places with the most nuclei.

ROIs of a slide never overlap, so a nucleus lies in at most one. Corners are whole level-0 px; a ROI
is half-open, [corner, corner + side) on both axes. How much of a ROI is tissue comes from a mask of
the thumbnail (`data_prep.detector.tissue_mask`), weighted by area.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np

from lemon_muse.data.slides import Slide
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

SAMPLING = ("grid", "dense")
FINE = 8  # dense: candidates lie side / FINE apart
REASONS = ("border", "few nuclei", "little tissue")


@dataclass(frozen=True)
class Places:
    """ROIs of one slide, row by row.

    Attributes:
        corners: int64 [m, 2], x and y of the corner with the least x and y, level-0 px.
        nuclei: for each ROI the rows of `xy` inside it, int64, ascending.
        tissue: float64 [m], share of tissue, 0 to 1.
        rejected: squares that became no ROI, by reason; each counts once, under the first of
            'border', 'few nuclei', 'little tissue' that holds.
    """

    corners: np.ndarray
    nuclei: list[np.ndarray]
    tissue: np.ndarray
    rejected: dict[str, int]

    def __len__(self) -> int:
        return len(self.corners)


def find(
    slide: Slide,
    xy: np.ndarray,
    *,
    side: float,
    sampling: str,
    min_nuclei: int,
    min_tissue: float,
    most: int | None,
    rng: np.random.Generator,
) -> Places:
    """Choose the ROIs of a slide.

    'grid' takes the squares of a grid in the middle of the slide; on an axis on which it costs no
    square, the grid keeps to the slide's native tiles, which are then cut through less often.
    'dense' takes the square with the most nuclei, then the one with the most among those that do
    not overlap it, and so on; squares lie side / 8 apart. It has no chance in it.

    Args:
        slide: an open slide.
        xy: float [n, 2], nuclei in level-0 px.
        side: of a ROI, level-0 px.
        sampling: 'grid' or 'dense'.
        min_nuclei: a ROI has at least as many.
        min_tissue: least share of tissue, 0 to 1.
        most: at most so many ROIs: a random choice (grid) or the densest; None: all.
        rng: of that choice.

    Returns:
        The ROIs and what was rejected: of the grid continued over the whole slide, or of all the
        overlapping squares that 'dense' looked at, none of which lies over the border.

    Raises:
        UserError: the slide is smaller than a ROI; a nucleus lies outside the slide.
    """
    if sampling not in SAMPLING:
        raise ValueError(f"sampling must be one of {SAMPLING}, not {sampling!r}")
    if not side >= 1 or (most is not None and most < 1):
        raise ValueError(f"side and most must be at least 1, not {side} and {most}")
    _fits(slide, side)
    xy = _inside(slide, xy)
    axes = _grid_axes(slide, side) if sampling == "grid" else _fine_axes(slide, side)
    counts = _counts(xy, *axes, side)
    shares = _shares(slide, *axes, side)
    enough = counts >= min_nuclei
    good = enough & (shares >= min_tissue)
    rejected = {
        "border": _cut_off(slide, axes, side) if sampling == "grid" else 0,
        "few nuclei": int((~enough).sum()),
        "little tissue": int((enough & ~good).sum()),
    }
    if sampling == "dense":
        rows, columns = _greedy(counts, good, axes, side, most)
    else:
        rows, columns = np.nonzero(good)
    if most is not None and len(rows) > most:
        chosen = np.sort(rng.choice(len(rows), most, replace=False))
        rows, columns = rows[chosen], columns[chosen]
    corners = np.stack([axes[0][columns], axes[1][rows]], 1)
    if not len(corners):
        log.warning("%s has no ROI: %s", slide.path, rejected)
    return Places(corners, _members(xy, corners, side), shares[rows, columns], rejected)


def _fits(slide: Slide, side: float) -> None:
    least = min(slide.width, slide.height)
    if side <= least:
        return
    wide, high, wanted = (s * slide.mpp for s in (slide.width, slide.height, side))
    raise UserError(
        f"{slide.path} is {wide:.0f} x {high:.0f} µm, smaller than a ROI of {wanted:.0f} x "
        f"{wanted:.0f} µm; give ROIs of at most {math.floor(least * slide.mpp)} µm a side, or "
        f"leave the slide out."
    )


def _inside(slide: Slide, xy: np.ndarray) -> np.ndarray:
    xy = np.asarray(xy, np.float64).reshape(-1, 2)
    good = ((xy >= 0) & (xy <= (slide.width, slide.height))).all(1)  # NaN is False
    if not good.all():
        raise UserError(
            f"{(~good).sum()} of {len(xy)} nuclei lie outside the slide {slide.path} "
            f"({slide.width} x {slide.height} px); drop them, or check that they belong to it."
        )
    return xy


def _grid_axes(slide: Slide, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners x and y of a grid of squares that lie wholly on the slide, int64."""
    tile = slide.tile_size
    x, y = (_grid(n, side, t) for n, t in zip((slide.width, slide.height), tile, strict=True))
    return x, y


def _grid(length: int, side: float, tile: int) -> np.ndarray:
    """Corners along one axis, centred; on the native tiles where that loses none."""
    step = math.ceil(side)  # of a fraction of a px, squares would share a nucleus
    count = int((length - side) // step) + 1
    spare = length - side - (count - 1) * step
    on_tiles = math.ceil(step / tile) * tile
    room = length - side - (count - 1) * on_tiles
    if room < 0 or tile >= length:  # a whole image is one tile wide
        return int(spare / 2) + step * np.arange(count)
    start = min(round(room / 2 / tile), int(room // tile)) * tile
    return start + on_tiles * np.arange(count)


def _cut_off(slide: Slide, axes: tuple[np.ndarray, np.ndarray], side: float) -> int:
    """Squares of the continued grid that touch the slide but do not lie wholly on it."""
    touch, whole = 1, 1
    for corners, length in zip(axes, (slide.width, slide.height), strict=True):
        end = corners[-1] + (corners[1] - corners[0] if len(corners) > 1 else math.ceil(side))
        touch *= len(corners) + int(corners[0] > 0) + int(end < length)
        whole *= len(corners)
    return touch - whole


def _fine_axes(slide: Slide, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners x and y, side / FINE apart, and the last that fits, int64."""
    axes = []
    for length in (slide.width, slide.height):
        last = math.floor(length - side)
        steps = np.floor(np.arange(int(last / side * FINE) + 1) * (side / FINE)).astype(np.int64)
        axes.append(np.unique(np.append(steps[steps < last], last)))
    return axes[0], axes[1]


def _counts(xy: np.ndarray, x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    """Nuclei in each square, int64 [len(y), len(x)], exactly, by an integral image.

    Its cells end where a square begins or ends, so that each square is a whole number of cells.
    """
    edges = [np.unique(np.concatenate([a, a + side])) for a in (x, y)]
    cells = [np.searchsorted(e, xy[:, i], side="right") for i, e in enumerate(edges)]
    shape = (len(edges[1]) + 1, len(edges[0]) + 1)  # and what lies before the first, after the last
    sums = np.bincount(cells[1] * shape[1] + cells[0], minlength=shape[0] * shape[1])
    sums = sums.reshape(shape).cumsum(0).cumsum(1)  # [i, j]: below the edges i and j
    x0, x1 = np.searchsorted(edges[0], x), np.searchsorted(edges[0], x + side)
    y0, y1 = np.searchsorted(edges[1], y), np.searchsorted(edges[1], y + side)
    deep = sums[y1] - sums[y0]
    return deep[:, x1] - deep[:, x0]


def _shares(slide: Slide, x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    """Share of tissue in each square, float64 [len(y), len(x)].

    Between the pixels of the thumbnail the integral is linear on each axis, hence this is exact.
    """
    from data_prep.detector import THUMBNAIL, tissue_mask

    mask = tissue_mask(slide.thumbnail(THUMBNAIL))
    height, width = mask.shape
    sums = np.zeros((height + 1, width + 1))
    sums[1:, 1:] = mask.cumsum(0).cumsum(1)
    fx, fy = width / slide.width, height / slide.height
    deep = _between(sums, (y + side) * fy) - _between(sums, y * fy)
    area = _between(deep.T, (x + side) * fx) - _between(deep.T, x * fx)
    return np.clip(area.T / (side * fx * side * fy), 0, 1)  # rounding only


def _between(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of `table` at fractional positions, linearly."""
    low = np.clip(np.floor(at).astype(int), 0, len(table) - 2)
    part = (at - low)[:, None]
    return table[low] * (1 - part) + table[low + 1] * part


def _greedy(
    counts: np.ndarray,
    good: np.ndarray,
    axes: tuple[np.ndarray, np.ndarray],
    side: float,
    most: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the squares taken, row by row.

    What a square loses to its neighbours it loses by overlapping them, so no count ever changes
    and the squares can be gone through once, from the fullest on.
    """
    free = good.copy()
    taken: list[tuple[int, int]] = []
    rows, columns = np.nonzero(good)
    order = np.argsort(-counts[rows, columns], kind="stable")
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if len(taken) == most:
            break
        if free[row, column]:
            taken.append((row, column))
            x, y = (_near(axis, i, side) for axis, i in zip(axes, (column, row), strict=True))
            free[y, x] = False
    found = np.array(sorted(taken), np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _near(axis: np.ndarray, i: int, side: float) -> slice:
    """The corners whose squares overlap the square at `axis[i]` on this axis."""
    low = np.searchsorted(axis, axis[i] - side, side="right")
    return slice(int(low), int(np.searchsorted(axis, axis[i] + side)))


def _members(xy: np.ndarray, corners: np.ndarray, side: float) -> list[np.ndarray]:
    """Rows of `xy` in each square, ascending."""
    order = np.argsort(xy[:, 1], kind="stable")
    height = xy[order, 1]
    out = []
    for x, y in corners:
        first, last = np.searchsorted(height, (y, y + side))
        rows = order[first:last]
        inside = (xy[rows, 0] >= x) & (xy[rows, 0] < x + side)
        out.append(np.sort(rows[inside]).astype(np.int64))
    return out
