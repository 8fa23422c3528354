"""The pixels of the nuclei of one slide, piece by piece, ahead of the network."""

import copy
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np

from lemon_muse.data.ahead import map_ahead
from lemon_muse.data.geometry import MPP_TOLERANCE

if TYPE_CHECKING:
    from eval.samplers import Look
    from lemon_muse.data.slides import Slide

PART = 4096  # nuclei of a piece, at most
HELD = 2**27  # bytes of pixels of a piece, at most
STRIP = 1024  # rows of the slide that pieces go along, px at the encoder's mpp, about
ORDER = 2  # of how nuclei are put into pieces; another number where that changes


def cut_pieces(xy: np.ndarray, slide: "Slide", look: "Look") -> list[np.ndarray]:
    """Rows of the nuclei that are read together, int64 arrays; each row once.

    Args:
        xy: float64 [n, 2], level-0 px.
        look: crops: strips across the slide, from left to right; dense: whole squares, which nuclei
            share.
    """
    if not len(xy):
        return []
    down = look.mpp / slide.mpp  # level-0 px per px of the encoder
    if look.valid is None:
        most = _most(look)
        rows = _rows_at_once(slide, look)
        corner = np.floor(xy / (1 if rows else down) - look.window / 2 + 0.5)
        # The order of `Slide.bands`, so that one pass through the slide fills piece after piece.
        strip = np.maximum(corner[:, 1], 0) // (rows or STRIP)
        order = np.lexsort((xy[:, 1], corner[:, 0], strip))
        unit = np.arange(len(xy))
    else:
        most = max(1, HELD // (3 * look.window**2))
        column, row = np.floor(xy / (down * look.valid)).T
        order = np.lexsort((column, row))
        new = np.diff(column[order]).astype(bool) | np.diff(row[order]).astype(bool)
        unit = np.concatenate([[0], np.cumsum(new)])
    return np.split(order, np.flatnonzero(np.diff(unit // most)) + 1)


def _most(look: "Look") -> int:
    """Crops of a piece, at most."""
    return max(1, min(PART, HELD // (3 * look.window**2)))


def _rows_at_once(slide: "Slide", look: "Look") -> int:
    """Rows that `Slide.bands` decodes together where it copies pixels of level 0; 0 elsewhere."""
    if slide.level_for(look.mpp) or abs(slide.mpp / look.mpp - 1) > MPP_TOLERANCE:
        return 0
    tall = slide.tile_size[1]
    return max(1, STRIP // tall) * tall


class Reader:
    """Reads pieces in threads; each thread opens the slide for itself.

    One thread goes through the slide in one pass, where pixels are copied: no tile is decoded
    twice, and no memory is asked for twice. Several threads take a piece each.
    """

    def __init__(self, slide: "Slide", look: "Look", *, workers: int) -> None:
        self.slide, self.look, self.workers = slide, look, workers
        self.own = threading.local()
        self.opened: list[Slide] = []
        self.free: list[np.ndarray] = []

    def pieces(self, xy: np.ndarray, pieces: list[np.ndarray]) -> Generator[Any, None, None]:
        """Of each piece, in their order: crops uint8 [n, S, S, 3], or windows
        (`eval.dense.Windows`).

        Args:
            xy: float64 [m, 2], level-0 px.
            pieces: rows of `xy`, from `cut_pieces`; those that are missing.
        """
        if self.look.valid is not None:
            yield from map_ahead(lambda rows: self._windows(xy[rows]), pieces, workers=self.workers)
        elif self.workers > 1 or not _rows_at_once(self.slide, self.look):
            ahead = map_ahead(
                lambda rows: next(self._crops(xy, [rows])), pieces, workers=self.workers
            )
            with closing(ahead):  # type: ignore[type-var]
                yield from ahead
        else:
            one_pass = self._crops(xy, pieces)
            ahead = map_ahead(lambda _: next(one_pass), pieces, workers=self.workers)
            with closing(ahead):  # type: ignore[type-var]
                yield from ahead

    def done(self, seen: Any) -> None:
        """Give the memory of crops back for the next piece."""
        if isinstance(seen, np.ndarray) and seen.base is not None:
            self.free.append(seen.base)

    def close(self) -> None:
        for slide in self.opened:
            slide.close()

    def _mine(self) -> "Slide":
        if not hasattr(self.own, "slide"):
            self.own.slide = copy.copy(self.slide)
            self.opened.append(self.own.slide)
        found: Slide = self.own.slide
        return found

    def _windows(self, xy: np.ndarray) -> Any:
        from eval.dense import cut_slide, joined

        look, rows = self.look, np.arange(len(xy))
        given = {"window": look.window, "valid": look.valid or look.window}
        return joined(list(cut_slide(self._mine(), xy, rows, **given, mpp=look.mpp)))

    def _crops(self, xy: np.ndarray, pieces: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The crops of each piece as soon as all of them are there, in the order of the pieces."""
        every, look = np.concatenate(pieces), self.look
        left = np.array([len(rows) for rows in pieces])
        ends = np.cumsum(left)
        starts, turn = ends - left, 0
        begun: dict[int, np.ndarray] = {}
        for found, pixels in self._mine().bands(xy[every], look.window, mpp=look.mpp, band=STRIP):
            owner = np.searchsorted(ends, found, side="right")
            for i in range(owner.min(), owner.max() + 1):
                here = owner == i
                if i not in begun:
                    begun[i] = self._buffer(int(left[i]))
                whole = here.all()  # indexing by `here` would copy the pixels once more
                begun[i][found[here] - starts[i]] = pixels if whole else pixels[here]
                left[i] -= np.count_nonzero(here)
            while turn < len(pieces) and not left[turn]:
                yield begun.pop(turn)
                turn += 1

    def _buffer(self, count: int) -> np.ndarray:
        """uint8 [count, S, S, 3], not filled. New pages for each piece would cost 4% of a job."""
        side = self.look.window
        try:
            return self.free.pop()[:count]
        except IndexError:  # none, or another thread was faster
            return np.empty((_most(self.look), side, side, 3), "u1")[:count]
