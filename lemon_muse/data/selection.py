"""Which samples of a set a pass has: some of them, or a draw of them by weight.

Blocks stay the unit of reading. What a pass has is a function of (seed, pass), so that the order
stays exact; only sums over blocks are held, rows are worked out when their window is read.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

CHUNK = 2**22  # samples looked at together: tens of MiB however large the set is
EXACT = 2.0**52  # sum of the whole-number weights: sums of them are exact in float64


@dataclass(frozen=True)
class Selection:
    """A part of the samples of a set.

    Attributes:
        sizes: samples of each block, int64 [n_blocks].
        counts: how many of them are chosen, int64 [n_blocks]. Where that is fewer than the chosen
            slides have, chance picks them.
        seed: of that choice and of the draws.
        slide_of: number of the slide of every sample, int [n]; None: all slides are chosen.
        slides: which slides are, bool [n_slides].
        draw: draws by weight instead of each chosen sample once a pass.
    """

    sizes: np.ndarray
    counts: np.ndarray
    seed: int
    slide_of: np.ndarray | None = None
    slides: np.ndarray | None = None
    draw: "Draw | None" = None
    starts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", ends(self.sizes)[:-1])

    @property
    def total(self) -> int:
        """Samples of a pass; the same for every pass."""
        return int(self.counts.sum()) if self.draw is None else self.draw.total

    def digest(self) -> str:
        """16 hex digits of what is chosen and how it is drawn, whatever the settings say."""
        found = hashlib.blake2b(self.counts.astype(np.int64).data, digest_size=8)
        for array in (self.slides, self.draw and self.draw.code, self.draw and self.draw.units):
            found.update(b"/" if array is None else np.ascontiguousarray(array).data)
        return found.hexdigest()

    def counts_at(self, number: int) -> np.ndarray:
        """Samples that each block gives to a pass, int64 [n_blocks]."""
        if self.draw is None:
            return self.counts
        return np.diff(self.draw.below(number, self.draw.ends))

    def samples_at(self, number: int, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block and row, int64 [m] each, of the samples that these blocks give to a pass."""
        found = [self._rows_at(number, block) for block in np.asarray(blocks).tolist()]
        return np.repeat(blocks, [len(rows) for rows in found]), np.concatenate(found)

    def rows(self, block: int) -> np.ndarray:
        """Rows of a block that are chosen, int64 [counts[block]], ascending."""
        first, size, count = (int(a[block]) for a in (self.starts, self.sizes, self.counts))
        rows = np.arange(size)
        if self.slide_of is not None and self.slides is not None:
            rows = np.flatnonzero(self.slides[self.slide_of[first : first + size]])
        if count < len(rows):
            # The first of a permutation: a larger count takes these and more.
            mixed = np.random.default_rng([self.seed, block]).permutation(rows)
            rows = np.sort(mixed[:count])
        return rows

    def _rows_at(self, number: int, block: int) -> np.ndarray:
        rows = self.rows(block)
        if self.draw is None:
            return rows
        weights = self.draw.units[self.draw.code[self.starts[block] + rows]]
        reached = int(self.draw.ends[block]) + ends(weights)
        return np.repeat(rows, np.diff(self.draw.below(number, reached)))


@dataclass(frozen=True)
class Draw:
    """A systematic sample with given weights: a sample comes as often as its weight says, rounded
    up or down by chance, so that its mean over the passes is exact.

    Attributes:
        code: class of every sample of the set, int32 [n]; -1: it never comes.
        units: weight of a sample of each class, int64 [classes + 1]; the last, 0, is of -1.
        ends: sum of the weights before each block, and of all, int64 [n_blocks + 1].
        total: draws of a pass.
        seed: of the draws.
    """

    code: np.ndarray
    units: np.ndarray
    ends: np.ndarray
    total: int
    seed: int

    def below(self, number: int, reached: np.ndarray) -> np.ndarray:
        """How many draws of a pass lie below these sums of weights, int64.

        Draw k lies at (k + u) / total of the sum of all weights, u in [0, 1) of the pass.
        """
        u = np.random.default_rng([self.seed, number, 1]).random()
        whole = int(self.ends[-1])
        count = np.ceil(reached * (self.total / whole) - u).astype(np.int64)
        # The last draw may round to just above the whole.
        return np.where(reached >= whole, self.total, count.clip(0, self.total))


def weighted(chosen: Selection, code: np.ndarray, weight: np.ndarray) -> Selection:
    """A selection whose samples are drawn with the weights of their classes.

    A pass has as many draws as the selection has samples of a weight above 0.

    Args:
        chosen: what is drawn from.
        code: class of every sample of the set, int32 [n]; -1: it never comes.
        weight: of a sample of each class, float [classes], >= 0.

    Raises:
        ValueError: no chosen sample has a weight.
    """
    numbers = np.zeros(len(weight), np.int64)
    for start in range(0, len(code), CHUNK):
        numbers += np.bincount(code[start : start + CHUNK] + 1, minlength=len(weight) + 1)[1:]
    # fsum: one result on every machine, so that draws and digest are those of the others too.
    if not (whole := math.fsum((numbers * weight).tolist())):
        raise ValueError("no sample has a weight above 0")
    scale = EXACT / whole
    units = np.append(np.rint(np.asarray(weight) * scale).astype(np.int64), 0)

    def sums(values: np.ndarray) -> np.ndarray:
        found = by_block(chosen.sizes, lambda here: values[code[here]] * _in(chosen, here))
        found[chosen.counts == 0] = 0
        for block in np.flatnonzero((chosen.counts > 0) & (chosen.counts < _most(chosen))).tolist():
            found[block] = values[code[chosen.starts[block] + chosen.rows(block)]].sum()
        return found

    total = int(sums((units > 0).astype(np.int64)).sum())
    if not total:
        raise ValueError("no chosen sample has a weight above 0")
    draw = Draw(code, units, ends(sums(units)), total, chosen.seed)
    return Selection(chosen.sizes, chosen.counts, chosen.seed, chosen.slide_of, chosen.slides, draw)


def by_block(sizes: np.ndarray, values: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Sums over the samples of each block, int64 [n_blocks].

    Args:
        sizes: samples of each block, int64 [n_blocks].
        values: of the samples in a slice of all samples, int or bool.
    """
    edges = ends(sizes)
    out = np.empty(len(sizes), np.int64)
    first = 0
    while first < len(sizes):
        last = max(first + 1, int(np.searchsorted(edges, edges[first] + CHUNK, side="right")) - 1)
        reached = ends(values(slice(int(edges[first]), int(edges[last]))))
        out[first:last] = np.diff(reached[edges[first : last + 1] - edges[first]])
        first = last
    return out


def ends(sizes: np.ndarray) -> np.ndarray:
    """0 and the sums up to each, int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _in(chosen: Selection, here: slice) -> np.ndarray | bool:
    if chosen.slide_of is None or chosen.slides is None:
        return True
    inside: np.ndarray = chosen.slides[chosen.slide_of[here]]
    return inside


def _most(chosen: Selection) -> np.ndarray:
    """Samples of the chosen slides in each block."""
    if chosen.slide_of is None or chosen.slides is None:
        return chosen.sizes
    slides, slide_of = chosen.slides, chosen.slide_of
    return by_block(chosen.sizes, lambda here: slides[slide_of[here]])
