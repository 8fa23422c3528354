"""Shards of crops and of ROIs: the schema and the sidecar index (`writer`, `reader`, `rois`).

A set of shards is a folder:

    crops-00000-000.tar …  WebDataset tar files (`rois-…` for ROIs), `<kind>-<group>-<number>`
    index.json             schema, mpp, size, encoding, mean/std, counts per slide, list of shards
    blocks.npy             one row a sample: where its bytes are, how many nuclei, checksums
    groups/00000.{json,npy}  the same for each group of slides; the index is their sum

A sample of a crop set is a *block* of nuclei (default 256): pixels (`<key>.pixels.npy`, uint8
[N, S, S, 3], or `<key>.sheet.jpg`, a JPEG 4:4:4 of 16 cells a row) and metadata (`<key>.meta.npz`,
one array a column, `COLUMNS`). A sample of a ROI set is one ROI: `<key>.roi.jpg` or `.roi.webp` and
`<key>.meta.npz` (`ROI_COLUMNS`, `ROI_FACTS`). `index.json` is written last: a folder without it is
not a set. docs/formats.md has the full format.
"""

import io
import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lemon_muse.errors import UserError

SCHEMA = 2
Kind = Literal["crops", "rois"]
# Columns of a block's metadata: px of the source image at its own mpp, pixel centres at +0.5.
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
# Of a ROI's metadata: columns over its nuclei, x and y in px of the ROI; and facts of the ROI.
ROI_COLUMNS = {"id": "i8", "x": "f4", "y": "f4", "type": "U", "score": "f4"}
ROI_FACTS = {
    "slide": "U",
    "patient": "U",
    "left": "f8",  # corner in level-0 px
    "top": "f8",
    "side": "f8",  # level-0 px
    "mpp": "f4",
    "source_mpp": "f4",
    "tissue": "f4",  # share of the ROI that is tissue
}
BLOCK = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # of the pixel member's payload inside the tar
        ("length", "<u8"),  # of that payload in bytes
        ("meta_offset", "<u8"),
        ("meta_length", "<u8"),
        ("count", "<u4"),  # nuclei in the sample
        ("inner", "<u4"),  # of those, how many have a whole window (ROIs: they come first)
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
    starts: np.ndarray = field(repr=False)  # int64 [n_blocks + 1], first nucleus of each sample

    @property
    def kind(self) -> str:
        return str(self.header["kind"])

    @property
    def count(self) -> int:
        """Nuclei of the set."""
        return int(self.starts[-1])

    @property
    def size(self) -> int:
        """Side of a crop, or of a ROI, px."""
        return int(self.header["size"])

    @property
    def mpp(self) -> float:
        return float(self.header["mpp"])

    @property
    def encoding(self) -> str:
        return str(self.header["encoding"])

    @property
    def slides(self) -> dict[str, dict[str, Any]]:
        """What is known of each slide, by name, sorted: a slide's place here is its number."""
        return dict(sorted(self.header["slides"].items()))

    def shard(self, number: int) -> Path:
        return self.folder / str(self.header["shards"][number]["name"])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block and row, int64 [n] each, of global sample numbers."""
        block = np.searchsorted(self.starts, samples, side="right") - 1
        return block, samples - self.starts[block]

    def as_crops(self, size: int, *, edge: str = "drop") -> "Index":
        """This set of ROIs as a set of crops of `size` px: a block is the nuclei of a ROI.

        Args:
            size: side of a crop, px at the ROIs' mpp.
            edge: 'drop' leaves out nuclei nearer to the ROI's border than the margin of the set,
                'reflect' keeps them and mirrors the ROI.

        Raises:
            UserError: crops that are larger than the margin allows with 'drop', or than a ROI.
        """
        margin = int(self.header["margin"])
        if edge == "drop" and size > 2 * margin:
            raise UserError(
                f"crops of {size} px do not fit into the margin of {margin} px of the ROIs in "
                f"{self.folder}; use a smaller window, roi_edge=reflect, or prepare ROIs with "
                f"margin={-(-size // 2)}."
            )
        if size > self.size:
            raise UserError(f"crops of {size} px are larger than the ROIs of {self.size} px.")
        blocks = self.blocks.copy()
        if edge == "drop":
            blocks["count"] = blocks["inner"]
        mean, std = self.header["crop_mean"], self.header["crop_std"]
        header = {**self.header, "roi": self.size, "size": size, "mean": mean, "std": std}
        return replace(self, header=header, blocks=blocks, starts=_starts(blocks))


def open_index(folder: Path, *, kind: Kind | None = None) -> Index:
    """Read the index of a set and compare it with the files that are there.

    Args:
        folder: of the set.
        kind: what the caller can use; None: both.

    Raises:
        UserError: no index, another schema or kind, a missing or truncated shard, an index that
            misfits.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no index.json, so it is not a finished set of shards; make one: "
            f"'lemon-muse prep {kind or 'crops'} data=… out={folder}' (the same words resume a "
            f"killed job)."
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        rows = (folder / "blocks.npy").read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(
            f"the index of {folder} is not readable ({error}); run the job that made it again."
        ) from None
    if header.get("schema") != SCHEMA or header.get("kind") not in ("crops", "rois"):
        raise UserError(
            f"{path} has schema {header.get('schema')!r} of {header.get('kind')!r}, but this "
            f"version reads schema {SCHEMA} of crops and rois; make the set anew."
        )
    if kind is not None and header["kind"] != kind:
        raise UserError(f"{folder} holds {header['kind']}, but {kind} are needed here.")
    if zlib.crc32(rows) != header["blocks_crc"]:
        raise UserError(
            f"{folder}/blocks.npy does not belong to its index.json; run the job that made it "
            f"again."
        )
    blocks = np.load(io.BytesIO(rows), allow_pickle=False)
    for shard in header["shards"]:
        file = folder / shard["name"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            state = "missing" if size is None else f"{size} bytes long instead of {shard['bytes']}"
            raise UserError(
                f"shard {file} is {state}; copy it again, or make the set anew with "
                f"'prep {header['kind']}'."
            )
    return Index(folder=folder, header=header, blocks=blocks, starts=_starts(blocks))


def _starts(blocks: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(blocks["count"].astype(np.int64))])
