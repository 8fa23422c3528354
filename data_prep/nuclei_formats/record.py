"""What every reader takes and gives: the facts of a slide, and its nuclei as columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

# The tools that work on pixel indices call the middle of the first pixel (0, 0); ours is at 0.5.
PIXEL_CENTRE = 0.5


@dataclass(frozen=True)
class SlideFacts:
    """What a reader must know of the slide that the detections belong to.

    Attributes:
        width, height: level 0, px.
        mpp: µm per level-0 pixel.
        bounds: (x, y) of the scanned area's corner in level-0 px; (0, 0) where the file has none.
        magnification: objective power of level 0, such as 40; None where the file has none.
    """

    width: int
    height: int
    mpp: float
    bounds: tuple[float, float] = (0.0, 0.0)
    magnification: float | None = None


@dataclass(frozen=True)
class Nuclei:
    """Nuclei as columns of equal length n.

    Attributes:
        x, y: float64 [n], centre in level-0 px of the whole slide, continuous, pixel centres at
            +0.5.
        type: str [n], '' where unknown.
        score: float32 [n], NaN where unknown.
        area: float32 [n], µm², NaN where unknown.
        id: str or int64 [n], stable: the file's own id, or the running number in the file.
    """

    x: np.ndarray
    y: np.ndarray
    type: np.ndarray
    score: np.ndarray
    area: np.ndarray
    id: np.ndarray

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self.columns()}
        if len(lengths) > 1:
            raise ValueError(f"the columns of nuclei must be equally long, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.x)

    def columns(self) -> tuple[np.ndarray, ...]:
        """The six columns in the order of the attributes."""
        return self.x, self.y, self.type, self.score, self.area, self.id

    def take(self, rows: np.ndarray) -> "Nuclei":
        """The nuclei of some rows, int [m] or bool [n], in that order."""
        return Nuclei(*(column[rows] for column in self.columns()))


def nuclei(
    xy: np.ndarray | Sequence[Sequence[float]],
    *,
    kind: Sequence[str] | np.ndarray | None = None,
    score: Sequence[float | None] | np.ndarray | None = None,
    area: Sequence[float] | np.ndarray | None = None,
    ids: Sequence[str] | Sequence[int] | np.ndarray | None = None,
) -> Nuclei:
    """Columns with the right dtypes; what is not given is unknown.

    Args:
        xy: float [n, 2], level-0 px of the whole slide.
        kind, score, area, ids: as in `Nuclei`, [n].
    """
    points = np.asarray(xy, np.float64).reshape(-1, 2)
    n = len(points)
    return Nuclei(
        x=points[:, 0].copy(),
        y=points[:, 1].copy(),
        type=np.full(n, "", str) if kind is None else np.asarray(kind, str).reshape(n),
        score=_floats(score, n),
        area=_floats(area, n),
        id=np.arange(n, dtype=np.int64) if ids is None else _ids(ids),
    )


def _floats(values: Sequence[float | None] | np.ndarray | None, n: int) -> np.ndarray:
    if values is None:
        return np.full(n, np.nan, np.float32)
    return np.asarray(values, np.float64).astype(np.float32)  # None becomes NaN


def _ids(values: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
    ids = np.asarray(values)
    return ids.astype(np.int64) if ids.dtype.kind in "iu" else ids.astype(str)


def _flat(outlines: Sequence[Sequence[Sequence[float]]], count: int) -> np.ndarray:
    """All points one after the other, float64 [count, 2]."""
    numbers = np.fromiter(chain.from_iterable(chain.from_iterable(outlines)), np.float64)
    if len(numbers) == 2 * count:
        return numbers.reshape(-1, 2)
    # a third coordinate in some points
    points = [point[:2] for ring in outlines for point in ring]
    return np.array(points, np.float64).reshape(-1, 2)


def rings(outlines: Sequence[Sequence[Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Area centroid and area of closed or open rings, all at once.

    Args:
        outlines: n rings of (x, y); a ring without area has the mean of its corners as centre.

    Returns:
        Centres float64 [n, 2] and areas float64 [n] in square units of the coordinates.
    """
    n = len(outlines)
    lengths = np.array([len(ring) for ring in outlines], np.int64)
    if n and lengths.min() == 0:
        raise ValueError("an outline has no point")
    flat = _flat(outlines, int(lengths.sum()))
    owner = np.repeat(np.arange(n), lengths)
    starts = np.cumsum(lengths) - lengths
    mean = np.stack([np.bincount(owner, flat[:, i], n) / lengths for i in (0, 1)], 1)
    # Relative to the mean: at 1e5 px the products would cost half of the digits.
    here = flat - mean[owner]
    following = np.arange(len(flat)) + 1
    following[starts + lengths - 1] = starts
    after = here[following]
    cross = here[:, 0] * after[:, 1] - after[:, 0] * here[:, 1]
    twice = np.bincount(owner, cross, n)
    flatness = np.abs(twice) < 1e-9
    moment = [np.bincount(owner, (here + after)[:, i] * cross, n) for i in (0, 1)]
    shift = np.stack(moment, 1) / np.where(flatness, 1, 3 * twice)[:, None]
    return mean + np.where(flatness[:, None], 0, shift), np.abs(twice) / 2
