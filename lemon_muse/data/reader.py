"""Read batches of crops from shards by the order, ahead of time, in threads.

Any block is one seek and one read. Reading and decoding release the GIL, so threads are enough:
nothing is forked, nothing is copied between processes. Sets of ROIs are read as crops too: there a
block is the nuclei of one ROI, cut out of its picture when it is read.
"""

import io
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from lemon_muse.data import geometry
from lemon_muse.data.codec import decode, decode_image
from lemon_muse.data.order import Order, part
from lemon_muse.data.selection import Selection
from lemon_muse.data.shards import Index
from lemon_muse.errors import RunError

KEPT = 256  # shards that stay open; a system allows 1024 files, and a large set has more shards


class BlockReader:
    """Random access to the blocks of a set; keeps the files open and checks each block once."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: dict[int, int] = {}
        self._spare: list[np.ndarray] = []
        self._checked = np.zeros(len(index.blocks), bool)
        self._slides: dict[int, np.ndarray] = {}
        self._names = np.array(list(index.slides))

    def pixels(self, block: int) -> np.ndarray:
        """Pixels of a block, uint8 [N, S, S, 3].

        Raises:
            RunError: the bytes are not what was written.
        """
        row = self.index.blocks[block]
        payload = self._buffer(int(row["length"]))
        crc = None if self._checked[block] else int(row["crc"])
        self._read(block, int(row["offset"]), payload, crc)
        self._checked[block] = True
        return self._decode(payload, block)

    def _decode(self, payload: np.ndarray, block: int) -> np.ndarray:
        return decode(
            payload, self.index.encoding, int(self.index.blocks[block]["count"]), self.index.size
        )

    def columns(self, block: int, *only: str) -> dict[str, np.ndarray]:
        """The metadata columns of a block; with `only` these, at a part of the time."""
        row = self.index.blocks[block]
        payload = np.empty(int(row["meta_length"]), np.uint8)
        self._read(block, int(row["meta_offset"]), payload, int(row["meta_crc"]))
        try:
            with np.load(io.BytesIO(payload.tobytes()), allow_pickle=False) as members:
                return {name: members[name] for name in only or members.files}
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"the metadata of block {block} is not readable ({error}).") from None

    def slides(self, block: int) -> np.ndarray:
        """Numbers of the slides of a block's nuclei (places in `Index.slides`), int32 [N]."""
        if block not in self._slides:
            names = self.columns(block, "slide")["slide"]
            self._slides[block] = np.searchsorted(self._names, names).astype(np.int32)
        return self._slides[block]

    def describe(self, samples: np.ndarray) -> list[str]:
        """'slide (x, y)' of the samples of a batch: for messages."""
        blocks, rows = self.index.locate(np.asarray(samples))
        out = []
        for block, row in zip(blocks, rows, strict=True):
            c = self.columns(int(block))
            out.append(f"{c['slide'][row]} ({c['x'][row]:.0f}, {c['y'][row]:.0f})")
        return out

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def forget(self, block: int) -> None:
        """Let go what is kept of a block's slides: of all blocks it would be 4 bytes a nucleus."""
        self._slides.pop(block, None)

    def recycle(self, pixels: np.ndarray) -> None:
        """Take back the memory of a block that nobody looks at any more.

        Fresh memory costs as much as the read itself: the system has to clear every page.
        """
        if self.index.encoding == "raw" and isinstance(pixels.base, np.ndarray):
            self._spare.append(pixels.base)

    def _buffer(self, length: int) -> np.ndarray:
        try:
            spare = self._spare.pop()
        except IndexError:
            return np.empty(length, np.uint8)
        return spare if len(spare) == length else np.empty(length, np.uint8)

    def _read(self, block: int, offset: int, into: np.ndarray, crc: int | None) -> None:
        """Fill `into`, uint8 [bytes], from the block's shard; with a checksum, compare it."""
        shard = int(self.index.blocks[block]["shard"])
        file = self._files.get(shard)
        mine = os.open(self.index.shard(shard), os.O_RDONLY) if file is None else None
        if mine is not None and len(self._files) < KEPT:
            file = self._files.setdefault(shard, mine)  # another thread may have been faster
        try:
            got = os.preadv(mine if file is None else file, [into.data], offset)  # type: ignore[arg-type]
        finally:
            if mine is not None and mine != file:
                os.close(mine)
        if got != len(into) or (crc is not None and zlib.crc32(into.data) != crc):
            raise RunError(
                f"block {block} of {self.index.shard(shard)} has changed since it was written "
                f"(checksum); 'lemon-muse prep check data={self.index.folder}' lists the damage."
            )


class RoiReader(BlockReader):
    """Random access to the ROIs of a set: pictures and nuclei."""

    def _decode(self, payload: np.ndarray, block: int) -> np.ndarray:
        return decode_image(payload)

    def describe(self, samples: np.ndarray) -> list[str]:
        out = []
        for block in np.asarray(samples).tolist():
            c = self.columns(block)
            out.append(f"{c['slide'][0]} (ROI at {c['left'][0]:.0f}, {c['top'][0]:.0f})")
        return out


class RoiCropReader(RoiReader):
    """The nuclei of ROIs as blocks of crops; `index` is from `Index.as_crops`."""

    def _decode(self, payload: np.ndarray, block: int) -> np.ndarray:
        nuclei = super().columns(block)
        count = int(self.index.blocks[block]["count"])
        centres = np.stack([nuclei["x"], nuclei["y"]], 1)[:count]
        return geometry.crop(decode_image(payload), centres, size=self.index.size)[0]

    def describe(self, samples: np.ndarray) -> list[str]:
        return BlockReader.describe(self, samples)

    def columns(self, block: int, *only: str) -> dict[str, np.ndarray]:
        """As those of a block of crops, whatever `only`: x and y in px of the slide."""
        found = super().columns(block)
        count = int(self.index.blocks[block]["count"])
        scale = found["side"][0] / self.index.header["roi"]
        return {
            "slide": np.repeat(found["slide"], count),
            "patient": np.repeat(found["patient"], count),
            "id": found["id"][:count],
            "x": (found["left"] + found["x"][:count] * scale).astype(np.float32),
            "y": (found["top"] + found["y"][:count] * scale).astype(np.float32),
            "mpp": np.repeat(found["mpp"], count),
            "source_mpp": np.repeat(found["source_mpp"], count),
            "type": found["type"][:count],
            "score": found["score"][:count],
        }


def open_reader(index: Index) -> BlockReader:
    """The reader that fits: blocks of crops, ROIs, or ROIs as crops."""
    if index.kind == "crops":
        return BlockReader(index)
    return RoiCropReader(index) if "roi" in index.header else RoiReader(index)


class Batches:
    """Batches of the steps of a run, for one rank, from any step, prepared ahead in threads.

    Args:
        index: of the set.
        seed: of the order.
        batch: global batch size.
        window: blocks (or ROIs) shuffled together.
        rank, world: which part.
        workers: reading threads; 0 reads when asked.
        chosen: which samples of the set a pass has; None: all.
    """

    part: slice | np.ndarray  # which rows of the global batch; an array of them is ascending
    with_slides = False  # whether batches of crops hold `slide`

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        batch: int,
        window: int,
        rank: int,
        world: int,
        workers: int,
        chosen: Selection | None = None,
    ) -> None:
        self.index, self.workers = index, workers
        self.reader = open_reader(index)
        self.order = Order(self.sizes(index), seed, batch, window, chosen)
        self.part = part(batch, rank, world)

    def sizes(self, index: Index) -> np.ndarray:
        """How many samples of a batch each block gives, int [n_blocks]."""
        raise NotImplementedError

    def batch_at(self, step: int, pool: ThreadPoolExecutor | None = None) -> dict[str, Any]:
        """This rank's part of the batch of a step; with `pool`, its threads read."""
        raise NotImplementedError

    def iterate(self, start: int, stop: int, *, depth: int = 3) -> Iterator[dict[str, Any]]:
        """Batches of the steps [start, stop), `depth` of them prepared ahead."""
        if self.workers == 0:
            for step in range(start, stop):
                yield self.batch_at(step)
            return
        with (
            ThreadPoolExecutor(self.workers, "read") as readers,
            ThreadPoolExecutor(1, "batch") as maker,
        ):
            ahead: list[Future[dict[str, Any]]] = []
            try:
                for step in range(start, stop):
                    while len(ahead) < depth and step + len(ahead) < stop:
                        ahead.append(maker.submit(self.batch_at, step + len(ahead), readers))
                    yield ahead.pop(0).result()
            finally:
                for future in ahead:
                    future.cancel()


class CropBatches(Batches):
    """Batches of crops, as `Batches`. Memory per rank: about window / world blocks."""

    def __init__(self, index: Index, **settings: Any) -> None:
        super().__init__(index, **settings)
        self._blocks: dict[int, Future[np.ndarray] | np.ndarray] = {}

    def sizes(self, index: Index) -> np.ndarray:
        return np.asarray(index.blocks["count"])

    def batch_at(self, step: int, pool: ThreadPoolExecutor | None = None) -> dict[str, Any]:
        """{'pixels': uint8 [b, S, S, 3], 'samples': int64 [b]} of this rank at a step; with
        `with_slides` also 'slide', int64 [b]."""
        block, row = self.order.batch_at(step)
        block, row = block[self.part], row[self.part]
        needed, first, count = np.unique(block, return_index=True, return_counts=True)
        blocks = self._fetch(needed, pool)
        size = self.index.size
        pixels = np.empty((len(block), size, size, 3), np.uint8)
        out = {"pixels": pixels, "samples": self.index.starts[block] + row}
        if self.with_slides:
            out["slide"] = np.empty(len(block), np.int64)
        for b, start, n in zip(needed, first, count, strict=True):
            here = slice(start, start + n)
            # mode="clip": with the default, numpy goes through a buffer of its own.
            np.take(blocks[int(b)], row[here], axis=0, out=pixels[here], mode="clip")
            if self.with_slides:
                out["slide"][here] = self.reader.slides(int(b))[row[here]]
        return out

    def _fetch(self, needed: np.ndarray, pool: ThreadPoolExecutor | None) -> dict[int, np.ndarray]:
        """The needed blocks; those of the step before that are no longer needed are let go."""
        wanted = {int(b) for b in needed}
        # A block stays while its window lasts: about every step of a window needs all its blocks.
        limit = max(2 * self.order.window, len(wanted))
        if len(self._blocks) + len(wanted - self._blocks.keys()) > limit:
            for b in [b for b in self._blocks if b not in wanted]:
                gone = self._blocks.pop(b)
                self.reader.forget(b)
                if isinstance(gone, np.ndarray):
                    self.reader.recycle(gone)
        for b in wanted - self._blocks.keys():
            self._blocks[b] = pool.submit(self.reader.pixels, b) if pool else self.reader.pixels(b)
        out = {}
        for b in wanted:
            got = self._blocks[b]
            if isinstance(got, Future):
                got = self._blocks[b] = got.result()
            out[b] = got
        return out
