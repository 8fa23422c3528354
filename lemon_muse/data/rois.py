"""Batches of whole ROIs with their nuclei, for methods that make their own views (MUSE)."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lemon_muse.data.reader import Batches
from lemon_muse.data.shards import Index


class RoiBatches(Batches):
    """A rank's part of the batches of ROIs; arguments as for `Batches`.

    The order is that of crops with blocks of one sample: a permutation of all ROIs in each pass.
    """

    def sizes(self, index: Index) -> np.ndarray:
        return np.ones(len(index.blocks), np.int64)

    def batch_at(self, step: int, pool: ThreadPoolExecutor | None = None) -> dict[str, Any]:
        """This rank's ROIs at a step.

        Returns:
            'pixels' uint8 [b, S, S, 3]; 'points' float32 [b, n, 2], nuclei in px of the ROI, n the
            most of these ROIs, NaN past the count; 'counts' int64 [b]; 'samples' int64 [b], numbers
            of the ROIs.
        """
        samples = self.order.batch_at(step)[0][self.part]
        side = self.index.size
        pixels = np.empty((len(samples), side, side, 3), np.uint8)
        counts = self.index.blocks["count"][samples].astype(np.int64)
        points = np.full((len(samples), int(counts.max()), 2), np.nan, np.float32)

        def read(place: int) -> None:
            block = int(samples[place])
            pixels[place] = self.reader.pixels(block)
            columns = self.reader.columns(block)
            xy = np.stack([columns["x"], columns["y"]], 1)
            points[place, : len(xy)] = xy

        places = range(len(samples))
        for _ in pool.map(read, places) if pool else map(read, places):
            pass
        return {"pixels": pixels, "points": points, "counts": counts, "samples": samples}
