"""Crop shards: the schema and the sidecar index (`writer.py` writes them, `reader.py` reads).

A set of shards is a folder:

    crops-000000.tar …   WebDataset tar files; one sample = one *block* of nuclei (default 256)
    index.json           schema, mpp, size, encoding, mean/std, counts per slide, list of shards
    blocks.npy           one row a block: where its bytes are, how many nuclei, checksums

A sample has two members: pixels (`<key>.pixels.npy`, uint8 [N, S, S, 3], or `<key>.sheet.jpg`,
a JPEG 4:4:4 of 16 cells a row) and metadata (`<key>.meta.npz`, one array a column, `COLUMNS`).
`index.json` is written last: a folder without it is not a set. docs/formats.md has the full format.
"""

import io
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.errors import UserError

SCHEMA = 1
# Columns of the metadata member. Coordinates: px of the source image at its own mpp, centres +0.5.
COLUMNS: dict[str, str] = {
    "slide": "U",
    "patient": "U",
    "id": "i8",
    "x": "f4",
    "y": "f4",
    "mpp": "f4",
    "source_mpp": "f4",
    "type": "U",
    "score": "f4",
}
BLOCK = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # of the pixel member's payload inside the tar
        ("length", "<u8"),  # of that payload in bytes
        ("meta_offset", "<u8"),
        ("meta_length", "<u8"),
        ("count", "<u4"),  # nuclei in the block
        ("crc", "<u4"),  # zlib.crc32 of the pixel payload
        ("meta_crc", "<u4"),
    ]
)


@dataclass(frozen=True)
class Index:
    """What `index.json` and `blocks.npy` say of a set of shards."""

    folder: Path
    header: dict[str, Any]
    blocks: np.ndarray  # BLOCK [n_blocks]
    starts: np.ndarray = field(repr=False)  # int64 [n_blocks + 1], first sample of each block

    @property
    def count(self) -> int:
        return int(self.starts[-1])

    @property
    def size(self) -> int:
        return int(self.header["size"])

    @property
    def mpp(self) -> float:
        return float(self.header["mpp"])

    @property
    def encoding(self) -> str:
        return str(self.header["encoding"])

    def shard(self, number: int) -> Path:
        return self.folder / str(self.header["shards"][number]["name"])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block and row, int64 [n] each, of global sample numbers."""
        block = np.searchsorted(self.starts, samples, side="right") - 1
        return block, samples - self.starts[block]


def open_index(folder: Path) -> Index:
    """Read the index of a set and compare it with the files that are there.

    Raises:
        UserError: no index, another schema, a missing or truncated shard, an index that misfits.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no index.json, so it is not a finished set of crop shards; make one: "
            f"'lemon-muse prep crops data=… out={folder}' (the same words resume a killed job)."
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        rows = (folder / "blocks.npy").read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(
            f"the index of {folder} is not readable ({error}); make the set anew."
        ) from None
    if header.get("schema") != SCHEMA or header.get("kind") != "crops":
        raise UserError(
            f"{path} has schema {header.get('schema')!r} of {header.get('kind')!r}, but this "
            f"version reads schema {SCHEMA} of 'crops'."
        )
    if zlib.crc32(rows) != header["blocks_crc"]:
        raise UserError(
            f"{folder}/blocks.npy does not belong to its index.json; make the set anew."
        )
    blocks = np.load(io.BytesIO(rows), allow_pickle=False)
    for shard in header["shards"]:
        file = folder / shard["name"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            state = "missing" if size is None else f"{size} bytes long instead of {shard['bytes']}"
            raise UserError(
                f"shard {file} is {state}; copy it again, or make the set anew with 'prep crops'."
            )
    starts = np.concatenate([[0], np.cumsum(blocks["count"].astype(np.int64))])
    return Index(folder=folder, header=header, blocks=blocks, starts=starts)
