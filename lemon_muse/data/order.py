"""The sample order: a pure function of (seed, pass), so that resume is exact and elastic.

Blocks are permuted, taken in windows, and the samples of a window are shuffled. Step s is the slice
[s * batch, (s + 1) * batch) of the pass that it falls into; the incomplete slice at a pass's end is
left out (another one each pass). The slice is sorted by block, so that a rank's part of it touches
few blocks: K ranks read each block about once, not K times, and see the same samples as one rank.
A selection says which samples of each block a pass has; without one it has all.
"""

from dataclasses import dataclass

import numpy as np

from lemon_muse.data.selection import Selection


@dataclass(frozen=True)
class Order:
    """Which samples a step sees.

    Args:
        counts: nuclei of each block, int [n_blocks].
        seed: of the permutations.
        batch: global batch size.
        window: blocks that are shuffled together.
        chosen: which samples of them; None: all, each once a pass.
    """

    counts: np.ndarray
    seed: int
    batch: int
    window: int
    chosen: Selection | None = None

    def __post_init__(self) -> None:
        if self.batch > self.total:
            raise ValueError(
                f"a batch of {self.batch} needs at least as many nuclei; there are {self.total}"
            )

    @property
    def total(self) -> int:
        """Samples of a pass."""
        return int(np.sum(self.counts)) if self.chosen is None else self.chosen.total

    @property
    def steps_a_pass(self) -> int:
        return self.total // self.batch

    def batch_at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Block and row, int64 [batch] each, of the samples of a step, sorted by block."""
        number, inside = divmod(step, self.steps_a_pass)
        blocks, ends = self._windows(number)
        first, last = inside * self.batch, (inside + 1) * self.batch
        parts = []
        window = int(np.searchsorted(ends, first, side="right"))
        start = 0 if window == 0 else int(ends[window - 1])
        while start < last:
            block, row = self._shuffled(number, window, blocks)
            cut = slice(max(first - start, 0), min(last - start, len(block)))
            parts.append(np.stack([block[cut], row[cut]]))
            start = int(ends[window])
            window += 1
        block, row = np.concatenate(parts, axis=1)
        by_block = np.lexsort((row, block))
        return block[by_block], row[by_block]

    def _windows(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted blocks of a pass, and the sample count at the end of each window."""
        if self._cache.get("pass") != number:
            rng = np.random.default_rng([self.seed, number])
            if self.chosen is None:
                blocks = rng.permutation(len(self.counts))
                sizes = np.asarray(self.counts, np.int64)[blocks]
            else:
                counts = self.chosen.counts_at(number)
                # Blocks that give nothing would thin out the windows, and with them the mixing.
                blocks = rng.permutation(np.flatnonzero(counts))
                sizes = counts[blocks]
            edges = np.arange(0, len(blocks), self.window)
            self._cache.update(
                {"pass": number, "windows": (blocks, np.add.reduceat(sizes, edges).cumsum())}
            )
        return self._cache["windows"]  # type: ignore[return-value]

    def _shuffled(
        self, number: int, window: int, blocks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """All samples of a window in shuffled order."""
        if self._cache.get("window") != (number, window):
            mine = blocks[window * self.window : (window + 1) * self.window]
            if self.chosen is None:
                sizes = np.asarray(self.counts, np.int64)[mine]
                block = np.repeat(mine, sizes)
                row = np.concatenate([np.arange(n) for n in sizes])
            else:
                block, row = self.chosen.samples_at(number, mine)
            mixed = np.random.default_rng([self.seed, number, window]).permutation(len(block))
            self._cache.update({"window": (number, window), "samples": (block[mixed], row[mixed])})
        return self._cache["samples"]  # type: ignore[return-value]

    @property
    def _cache(self) -> dict[str, object]:
        # Only speed: what is kept here is always recomputable from the fields.
        return self.__dict__.setdefault("_kept", {})


def part(total: int, rank: int, world: int) -> slice:
    """The rows of a global batch that belong to a rank; equal parts, or a ValueError."""
    if total % world:
        raise ValueError(f"a batch of {total} cannot be split evenly over {world} ranks")
    each = total // world
    return slice(rank * each, (rank + 1) * each)
