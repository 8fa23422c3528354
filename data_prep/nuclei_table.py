"""The table of the nuclei of one slide: Parquet, columns id, x, y, type, score, area.

x and y are continuous level-0 px, area is in µm²; what is known of the slide and of the detection
stands in the file's metadata under the key ``lemon_muse`` as JSON.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.nuclei_formats.record import Nuclei
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

KEY = b"lemon_muse"
COLUMNS = ("id", "x", "y", "type", "score", "area")


@dataclass(frozen=True)
class NucleiTable:
    """Nuclei of one slide.

    Attributes:
        id: int64 [n], unique in the slide.
        x, y: float32 [n], level-0 px, inside the slide.
        type: str [n], '' where unknown.
        score, area: float32 [n], NaN where unknown; area in µm².
        about: slide, path, mpp, width, height, patient, source, format and counts.
    """

    id: np.ndarray
    x: np.ndarray
    y: np.ndarray
    type: np.ndarray
    score: np.ndarray
    area: np.ndarray
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.id)


def write_table(path: Path, found: Nuclei, about: dict[str, Any]) -> None:
    """Write the nuclei of a slide; the file appears whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "id": pa.array(whole_ids(found.id), pa.int64()),
        "x": pa.array(found.x.astype(np.float32)),
        "y": pa.array(found.y.astype(np.float32)),
        "type": pa.array(found.type.tolist(), pa.string()),
        "score": pa.array(found.score.astype(np.float32)),
        "area": pa.array(found.area.astype(np.float32)),
    }
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(about, sort_keys=True)})
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def read_table(path: Path) -> NucleiTable:
    """The nuclei of a slide.

    Raises:
        UserError: the file is missing, damaged or was not written by `write_table`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    about = read_about(path)
    try:
        table = parquet.read_table(path, columns=list(COLUMNS))
        types = table["type"].cast(pa.string()).to_pylist()
        arrays = {c: table[c].to_numpy() for c in COLUMNS if c != "type"}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(path, error) from None
    return NucleiTable(**arrays, type=np.array(types, str), about=about)


def read_about(path: Path) -> dict[str, Any]:
    """What a table says of its slide and its making; only the end of the file is read.

    Raises:
        UserError: as `read_table`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        about: dict[str, Any] = json.loads((parquet.read_schema(path).metadata or {})[KEY])
        return about
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no table of nuclei {path}; run prep nuclei again.")
    return UserError(
        f"{path} is not a readable table of nuclei ({type(error).__name__}); delete it and run "
        f"prep nuclei again."
    )


def whole_ids(ids: np.ndarray) -> np.ndarray:
    """Stable int64 ids, unique in the slide.

    Whole numbers stay; names (QuPath's) become the first 63 bits of their BLAKE2b hash, which do
    not depend on the order of the file; ids that repeat become running numbers.
    """
    if ids.dtype.kind in "iu":
        numbers = ids.astype(np.int64)
    else:
        hashes = [hashlib.blake2b(str(i).encode(), digest_size=8).digest() for i in ids]
        numbers = np.array([int.from_bytes(h, "big") >> 1 for h in hashes], np.int64)
    repeated = len(np.unique(numbers)) < len(numbers)
    return np.arange(len(numbers), dtype=np.int64) if repeated else numbers


def inside(found: Nuclei, width: float, height: float) -> np.ndarray:
    """Which nuclei lie on the slide, bool [n]; as float32 too, since so they are stored."""
    keep = np.isfinite(found.x) & np.isfinite(found.y) & (found.x >= 0) & (found.y >= 0)
    below = found.x.astype(np.float32) < width, found.y.astype(np.float32) < height
    return keep & below[0] & below[1]


def distinct(found: Nuclei, *, mpp: float, radius: float) -> np.ndarray:
    """Rows that stay when nuclei within `radius` of a better one are merged into it.

    The better one has the higher score (unknown is lowest), then the larger area, then the smaller
    y, then x: the order of the file does not matter. A nucleus that was merged removes none.

    Args:
        found: n nuclei with finite coordinates.
        mpp: µm per level-0 px.
        radius: µm, inclusive.

    Returns:
        int64 [m], ascending.
    """
    from scipy.spatial import cKDTree

    if radius <= 0 or len(found) < 2:
        return np.arange(len(found))
    xy = np.stack([found.x, found.y], 1)
    score = np.nan_to_num(found.score.astype(np.float64), nan=-np.inf)
    area = np.nan_to_num(found.area.astype(np.float64), nan=-np.inf)
    rank = np.empty(len(found), np.int64)
    rank[np.lexsort((found.x, found.y, -area, -score))] = np.arange(len(found))
    pairs = np.sort(rank[cKDTree(xy).query_pairs(radius / mpp, output_type="ndarray")], axis=1)
    alive = [True] * len(found)
    # By rank of the better one: its own fate is known when its turn comes.
    for better, worse in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
        if alive[better]:
            alive[worse] = False
    return np.flatnonzero(np.array(alive)[rank])
