"""Write samples into tar shards, atomically, group by group, with their index.

A set grows by groups of slides. The shards of a group are named after it; its record (`groups/`)
is written when they all stand; `write_index` sums the records up. So groups can be written by
different processes, in any order, and a set can be extended without touching what is there.
"""

import contextlib
import io
import os
import socket
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lemon_muse.data.codec import encode
from lemon_muse.data.files import disk_is_full
from lemon_muse.data.moments import Moments
from lemon_muse.data.records import write_index, write_record
from lemon_muse.data.shards import BLOCK, COLUMNS, ROI_COLUMNS, ROI_FACTS, SCHEMA, Kind
from lemon_muse.errors import RunError, UserError


class ShardWriter:
    """Write the samples of one group into tar shards and, at the end, the group's record.

    Each shard is written under a temporary name, synced and renamed; the record comes last. With
    `whole`, the set has this group alone and the index is written too.

    Args:
        folder: where the set goes.
        kind: 'crops' or 'rois'.
        size: side S of a crop or a ROI in px (crops: a multiple of 16 for JPEG sheets).
        mpp: µm per pixel.
        encoding: crops: 'raw' or 'jpeg'; ROIs: 'jpeg' or 'webp'.
        quality: of the JPEG or WebP, 1 to 100.
        shard_bytes: a shard is closed when it has grown past this.
        group: number of the group.
        whole: write the index on closing.
        extra: further entries of index.json (seed, source, edge policy …).
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int,
        mpp: float,
        kind: Kind = "crops",
        encoding: str = "raw",
        quality: int = 95,
        shard_bytes: int = 256 * 2**20,
        group: int = 0,
        whole: bool = True,
        extra: dict[str, Any] | None = None,
    ) -> None:
        check_encoding(kind, encoding, size)
        self.folder, self.size, self.kind, self.group = folder, size, kind, group
        self.encoding, self.quality, self.shard_bytes = encoding, quality, shard_bytes
        self.whole = whole
        self.header = {
            "mpp": mpp,
            "size": size,
            "encoding": encoding,
            "quality": None if encoding == "raw" else quality,
            **(extra or {}),
        }
        self.blocks: list[tuple[int, ...]] = []
        self.shards: list[dict[str, Any]] = []
        self.slides: dict[str, dict[str, Any]] = {}
        self.moments, self.crop_moments = Moments(), Moments()
        self._tar: io.BufferedWriter | None = None
        self._offset = 0
        folder.mkdir(parents=True, exist_ok=True)
        if whole:
            for old in [*folder.glob("*.tar"), *folder.glob("*.tmp"), folder / "index.json"]:
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
            with contextlib.suppress(OSError):  # what is buffered finds no room either
                self._tar.close()
            self._temporary().unlink(missing_ok=True)
        if isinstance(error, OSError) and disk_is_full(error):
            raise RunError(
                f"writing to {self.folder} failed, the disk is full; make room and run the same "
                f"words again."
            ) from error

    def write(
        self, pixels: np.ndarray, columns: dict[str, np.ndarray], *, payload: Any = None
    ) -> None:
        """Append one block of crops.

        Args:
            pixels: uint8 [N, S, S, 3].
            columns: one array [N] for each of `COLUMNS`.
            payload: (ending, bytes) of the pixels where they are encoded already.
        """
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (self.size, self.size, 3):
            raise ValueError(f"a block must be uint8 [N, {self.size}, {self.size}, 3]")
        typed = _typed(columns, COLUMNS, len(pixels))
        ending, data = payload or encode(pixels, self.encoding, self.quality)
        self._append(ending, data, typed, len(pixels), len(pixels))
        self.moments.add(pixels)
        names, first, counts = np.unique(typed["slide"], return_index=True, return_counts=True)
        for name, row, count in zip(names, first, counts, strict=True):
            self.add_slide(str(name), typed["patient"][row], typed["source_mpp"][row], int(count))

    def write_roi(
        self,
        payload: bytes,
        columns: dict[str, np.ndarray],
        facts: Mapping[str, Any],
        *,
        inner: int,
    ) -> None:
        """Append one ROI; its moments are added by the caller.

        Args:
            payload: the encoded picture.
            columns: one array [n] for each of `ROI_COLUMNS`, nuclei with a whole window first.
            facts: a value for each of `ROI_FACTS`.
            inner: how many nuclei have a whole window.
        """
        count = len(columns["id"])
        typed = _typed(columns, ROI_COLUMNS, count)
        typed |= {k: np.array([facts[k]]).astype(t) for k, t in ROI_FACTS.items()}
        ending = "roi.jpg" if self.encoding == "jpeg" else "roi.webp"
        self._append(ending, payload, typed, count, inner)
        entry = self.add_slide(facts["slide"], facts["patient"], facts["source_mpp"], count)
        entry["rois"] = entry.get("rois", 0) + 1

    def add_slide(self, name: str, patient: str, source_mpp: float, count: int) -> dict[str, Any]:
        """Count nuclei of a slide; returns its entry of the index, which may be added to."""
        entry = self.slides.setdefault(
            str(name), {"patient": str(patient), "source_mpp": float(source_mpp), "count": 0}
        )
        entry["count"] += count
        return entry

    def close(self) -> None:
        """Finish the last shard and write the record, and the index if this group is the set."""
        self._finish_shard()
        record = {
            "schema": SCHEMA,
            "kind": self.kind,
            "header": self.header,
            "slides": self.slides,
            "shards": self.shards,
            "moments": self.moments.as_json(),
            "crop_moments": self.crop_moments.as_json(),
        }
        write_record(self.folder, self.group, record, np.array(self.blocks, BLOCK))
        if self.whole:
            write_index(self.folder, [self.group])

    def _append(
        self, ending: str, payload: bytes, columns: dict[str, np.ndarray], count: int, inner: int
    ) -> None:
        buffer = io.BytesIO()
        # Names as text of fixed width: a tenth of the bytes for a twentieth of the time of a sheet.
        np.savez_compressed(buffer, **columns)  # type: ignore[arg-type]
        meta = buffer.getvalue()
        if self._tar is None:
            self._tar = self._temporary().open("wb")
            self._offset = 0
        key = f"{self.group:05d}{len(self.blocks):07d}"
        offset = self._member(f"{key}.{ending}", payload)
        meta_offset = self._member(f"{key}.meta.npz", meta)
        sums = zlib.crc32(payload), zlib.crc32(meta)
        place = (len(self.shards), offset, len(payload), meta_offset, len(meta))
        self.blocks.append((*place, count, inner, *sums))
        if self._offset >= self.shard_bytes:
            self._finish_shard()

    def _name(self) -> str:
        return f"{self.kind}-{self.group:05d}-{len(self.shards):03d}.tar"

    def _temporary(self) -> Path:
        return self.folder / f"{self._name()}.{socket.gethostname()}-{os.getpid()}.tmp"

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
        self._temporary().replace(self.folder / self._name())
        self.shards.append({"name": self._name(), "bytes": size})


def check_encoding(kind: Kind, encoding: str, size: int) -> None:
    """A mistake in the choice of the encoding is said before any work is done."""
    allowed = {"crops": ("raw", "jpeg"), "rois": ("jpeg", "webp")}[kind]
    if encoding not in allowed:
        raise UserError(f"encoding must be one of {', '.join(allowed)}, not {encoding!r}.")
    if kind == "crops" and encoding == "jpeg" and size % 16:
        raise UserError(
            f"JPEG sheets need a crop size that is a multiple of 16 (cells would leak into "
            f"each other), not {size}; take size={-(-size // 16) * 16}."
        )


def _typed(
    columns: dict[str, np.ndarray], types: dict[str, str], count: int
) -> dict[str, np.ndarray]:
    if set(columns) != set(types) or any(len(c) != count for c in columns.values()):
        raise ValueError(f"a sample needs the columns {list(types)}, each of {count} rows")
    return {name: np.asarray(columns[name]).astype(kind) for name, kind in types.items()}
