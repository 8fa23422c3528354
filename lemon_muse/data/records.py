"""What a set of shards knows of itself: a record for each group, and the index, their sum."""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.data.files import write_atomic
from lemon_muse.data.shards import BLOCK, SCHEMA
from lemon_muse.errors import UserError


def write_record(folder: Path, group: int, record: dict[str, Any], blocks: np.ndarray) -> None:
    """Note that a group stands: `groups/<group>.json`, written last."""
    (folder / "groups").mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, blocks, allow_pickle=False)
    record = {**record, "blocks_crc": zlib.crc32(buffer.getvalue())}
    write_atomic(folder / "groups" / f"{group:05d}.npy", buffer.getvalue())
    write_atomic(folder / "groups" / f"{group:05d}.json", json.dumps(record).encode())


def has_record(folder: Path, group: int) -> bool:
    """Whether a group stands: its record, and every shard of it at its full length."""
    path = folder / "groups" / f"{group:05d}.json"
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
        return all((folder / s["name"]).stat().st_size == s["bytes"] for s in shards)
    except FileNotFoundError:
        return False


def write_index(folder: Path, groups: list[int], extra: dict[str, Any] | None = None) -> None:
    """Write `blocks.npy` and `index.json` from the records of the groups.

    Raises:
        UserError: no nucleus in any of them.
    """
    records: list[dict[str, Any]] = []
    parts: list[np.ndarray] = []
    shards: list[dict[str, Any]] = []
    slides: dict[str, dict[str, Any]] = {}
    for group in groups:
        path = folder / "groups" / f"{group:05d}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        blocks = np.load(path.with_suffix(".npy"), allow_pickle=False)
        blocks["shard"] += len(shards)
        records.append(record)
        parts.append(blocks)
        shards += record["shards"]
        slides |= record["slides"]
    joined = np.concatenate(parts) if parts else np.zeros(0, BLOCK)
    if not joined["count"].sum():
        raise UserError(f"no nucleus was found for {folder}: the set would be empty.")
    buffer = io.BytesIO()
    np.save(buffer, joined, allow_pickle=False)
    mean, std = _mean_std([r["moments"] for r in records])
    header = {
        "schema": SCHEMA,
        "kind": records[0]["kind"],
        **records[0]["header"],
        "count": int(joined["count"].sum()),
        "blocks": len(joined),
        "blocks_crc": zlib.crc32(buffer.getvalue()),
        "mean": mean,
        "std": std,
        "groups": groups,
        "slides": slides,
        "shards": shards,
        **(extra or {}),
    }
    if header["kind"] == "rois":
        header["crop_mean"], header["crop_std"] = _mean_std([r["crop_moments"] for r in records])
    text = json.dumps(header, indent=1).encode()
    files = {folder / "blocks.npy": buffer.getvalue(), folder / "index.json": text}
    if all(path.is_file() and path.read_bytes() == bytes_ for path, bytes_ in files.items()):
        return  # of another process, and perhaps being read
    # Without this, a job killed between the two files would leave an index of other blocks.
    (folder / "index.json").unlink(missing_ok=True)
    for path, bytes_ in files.items():
        write_atomic(path, bytes_)


def _mean_std(moments: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    sums = np.sum([m["sums"] for m in moments], 0)
    mean, square = sums / max(1, sum(m["count"] for m in moments))
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.round(6).tolist(), std.round(6).tolist()
