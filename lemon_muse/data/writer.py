"""Write blocks of crops into tar shards, atomically, with their index."""

import io
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lemon_muse.data.codec import encode
from lemon_muse.data.files import write_atomic
from lemon_muse.data.shards import BLOCK, COLUMNS, SCHEMA
from lemon_muse.errors import RunError, UserError


class ShardWriter:
    """Write blocks of crops into tar shards and, at the end, the index.

    Each shard is written under a temporary name, synced and renamed; the index comes last. A job
    that dies leaves no `index.json`; leftovers of an earlier try are removed by a new writer.

    Args:
        folder: where the set goes.
        size: side S of a stored crop in px (a multiple of 16 for JPEG sheets).
        mpp: µm per pixel of every crop.
        encoding: 'raw' or 'jpeg'.
        quality: of the JPEG, 1 to 100.
        shard_bytes: a shard is closed when it has grown past this.
        extra: further entries of index.json (seed, source, edge policy …).
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int,
        mpp: float,
        encoding: str = "raw",
        quality: int = 95,
        shard_bytes: int = 256 * 2**20,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if encoding not in ("raw", "jpeg"):
            raise UserError(f"encoding must be 'raw' or 'jpeg', not {encoding!r}.")
        if encoding == "jpeg" and size % 16:
            raise UserError(
                f"JPEG sheets need a crop size that is a multiple of 16 (cells would leak into "
                f"each other), not {size}; take size={-(-size // 16) * 16}."
            )
        self.folder, self.size, self.mpp = folder, size, mpp
        self.encoding, self.quality, self.shard_bytes = encoding, quality, shard_bytes
        self.extra = extra or {}
        self.blocks: list[tuple[int, ...]] = []
        self.shards: list[dict[str, Any]] = []
        self.slides: dict[str, dict[str, Any]] = {}
        self._sums = np.zeros((2, 3), np.float64)
        self._pixels = 0
        self._tar: io.BufferedWriter | None = None
        self._offset = 0
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("crops-*.tar"), *folder.glob("*.tmp"), folder / "index.json"]:
            old.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        if self._tar is not None:
            self._tar.close()
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        if isinstance(error, OSError):
            free = shutil.disk_usage(self.folder).free
            raise RunError(
                f"writing to {self.folder} failed ({error}; {free / 2**30:.1f} GiB free); make "
                f"room and run the same words again."
            ) from error

    def write(self, pixels: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Append one block: pixels uint8 [N, S, S, 3] and one array [N] for each of `COLUMNS`."""
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (self.size, self.size, 3):
            raise ValueError(f"a block must be uint8 [N, {self.size}, {self.size}, 3]")
        if set(columns) != set(COLUMNS) or any(len(c) != len(pixels) for c in columns.values()):
            raise ValueError(
                f"a block needs the columns {list(COLUMNS)}, each of {len(pixels)} rows"
            )
        ending, payload = encode(pixels, self.encoding, self.quality)
        buffer = io.BytesIO()
        typed = {k: np.asarray(columns[k]).astype(t) for k, t in COLUMNS.items()}
        np.savez(buffer, **typed)  # type: ignore[arg-type]
        meta = buffer.getvalue()
        if self._tar is None:
            self._tar = (self.folder / f"{self._name()}.tmp").open("wb")
            self._offset = 0
        key = f"{len(self.blocks):09d}"
        offset = self._member(f"{key}.{ending}", payload)
        meta_offset = self._member(f"{key}.meta.npz", meta)
        sums = zlib.crc32(payload), zlib.crc32(meta)
        self.blocks.append(
            (len(self.shards), offset, len(payload), meta_offset, len(meta), len(pixels), *sums)
        )
        self._count(pixels, typed)
        if self._offset >= self.shard_bytes:
            self._finish_shard()

    def close(self) -> None:
        """Finish the last shard and write the index."""
        if not self.blocks:
            raise UserError(f"no nucleus was found for {self.folder}: the set would be empty.")
        self._finish_shard()
        buffer = io.BytesIO()
        np.save(buffer, np.array(self.blocks, BLOCK), allow_pickle=False)
        mean = self._sums[0] / self._pixels
        std = np.sqrt(self._sums[1] / self._pixels - mean**2)
        header = {
            "schema": SCHEMA,
            "kind": "crops",
            "mpp": self.mpp,
            "size": self.size,
            "encoding": self.encoding,
            "quality": self.quality if self.encoding == "jpeg" else None,
            "count": int(sum(b[5] for b in self.blocks)),
            "blocks": len(self.blocks),
            "blocks_crc": zlib.crc32(buffer.getvalue()),
            "mean": [round(float(v), 6) for v in mean],
            "std": [round(float(v), 6) for v in std],
            "slides": self.slides,
            "shards": self.shards,
            **self.extra,
        }
        write_atomic(self.folder / "blocks.npy", buffer.getvalue())
        write_atomic(self.folder / "index.json", json.dumps(header, indent=1).encode())

    def _name(self) -> str:
        return f"crops-{len(self.shards):06d}.tar"

    def _member(self, name: str, payload: bytes) -> int:
        """Append one tar member; returns the offset of its payload.

        A USTAR header with mtime 0: shards are reproducible byte for byte and have no PAX records.
        """
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        self._tar.write(info.tobuf(tarfile.USTAR_FORMAT))
        start = self._offset + 512
        self._tar.write(payload)
        padding = -len(payload) % 512
        self._tar.write(bytes(padding))
        self._offset = start + len(payload) + padding
        return start

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.write(bytes(1024))
        self._tar.flush()
        os.fsync(self._tar.fileno())
        size = self._tar.tell()
        self._tar.close()
        self._tar = None
        (self.folder / f"{self._name()}.tmp").rename(self.folder / self._name())
        self.shards.append({"name": self._name(), "bytes": size})

    def _count(self, pixels: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        # Histograms make exact sums of values and squares without a float copy of the pixels.
        values = np.arange(256) / 255.0
        for channel in range(3):
            counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
            self._sums[:, channel] += (counts @ values, counts @ values**2)
        self._pixels += pixels[..., 0].size
        names, first, counts = np.unique(columns["slide"], return_index=True, return_counts=True)
        for name, row, count in zip(names, first, counts, strict=True):
            entry = self.slides.setdefault(
                str(name),
                {
                    "patient": str(columns["patient"][row]),
                    "source_mpp": float(columns["source_mpp"][row]),
                    "count": 0,
                },
            )
            entry["count"] += int(count)
