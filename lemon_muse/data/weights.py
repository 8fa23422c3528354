"""The file of weights that `prep balance` writes and training reads: a class for each nucleus.

An `.npz` with `code` int32 [n] (class of every nucleus of the set in its order, -1: left out),
`weight` float64 [k] (of one nucleus of a class), `names` str [k] and `about`, JSON with the
checksum of the set that it belongs to.
"""

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.data.files import write_atomic
from lemon_muse.data.shards import Index
from lemon_muse.errors import UserError

SCHEMA = 1
# What a file that is none of these, or a damaged one, raises when it is read.
DAMAGED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Weights of the nuclei of a set.

    Attributes:
        code: class of every nucleus, int32 [n]; -1: it never comes.
        weight: of one nucleus of each class, float64 [k], >= 0; only ratios matter.
        names: of the classes, str [k].
        about: what made them; plain values.
    """

    code: np.ndarray
    weight: np.ndarray
    names: np.ndarray
    about: dict[str, Any]


def write_weights(path: Path, weights: Weights, index: Index) -> None:
    """Write the file of a set; it appears whole or not at all."""
    facts = {"schema": SCHEMA, "of": belongs(index), **weights.about}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        code=weights.code.astype(np.int32),
        weight=weights.weight.astype(np.float64),
        names=weights.names.astype(str),
        about=np.array(json.dumps(facts)),
    )
    write_atomic(path, buffer.getvalue())


def read_weights(path: Path, index: Index) -> Weights:
    """The weights of a set.

    Raises:
        UserError: no such file, not one of these, or of another set.
    """
    again = f"make it with 'lemon-muse prep balance data={index.folder} out={path}'"
    try:
        with np.load(path, allow_pickle=False) as members:
            about: dict[str, Any] = json.loads(str(members["about"]))
            found = Weights(members["code"], members["weight"], members["names"], about)
    except FileNotFoundError:
        raise UserError(f"there is no file of weights {path}; {again}.") from None
    except DAMAGED as error:
        raise UserError(f"{path} is no file of weights ({error}); {again}.") from None
    if about.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {about.get('schema')!r}, not {SCHEMA}; {again}.")
    if about.get("of") != belongs(index) or len(found.code) != index.count:
        raise UserError(
            f"the weights in {path} are of another set of shards than {index.folder}; {again}."
        )
    code, weight = found.code, found.weight
    inside = code.min(initial=-1) >= -1 and code.max(initial=-1) < len(weight)
    if not inside or not (np.isfinite(weight) & (weight >= 0)).all():
        raise UserError(
            f"{path} has weights below 0 or not finite, or classes without a weight; {again}."
        )
    return found


def belongs(index: Index) -> str:
    """What tells a set from others, wherever it lies: its blocks' checksum and its nuclei."""
    return f"{index.kind}-{index.header['blocks_crc']}-{index.count}"
