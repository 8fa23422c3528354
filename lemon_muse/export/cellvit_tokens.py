"""Embeddings of nuclei in the two layouts that CellViT++ trains its cell classifier from.

* the token cache, `<dataset>/cache/<sha256>.h5`: its head trainer reads it instead of running
  CellViT;
* the cell graph, `<image>_cells.pt`: what its inference writes with `--graph`, and what its trainer
  for pre-extracted cells (Lizard) reads.

Neither needs CellViT++ to be installed. Source: cellvit/training/trainer/trainer_cell_classifier.py
and cellvit/training/datasets/lizard.py of TIO-IKIM/CellViT-plus-plus.
"""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lemon_muse.data.files import disk_is_full, write_atomic
from lemon_muse.errors import RunError, UserError
from lemon_muse.export import optional

# Rows a write: bounds the memory of h5py's ragged rows.
ROWS = 4096
GRAPH_MODULE, GRAPH_CLASS = "cellvit.data.dataclass.cell_graph", "CellGraphDataWSI"


def cache_name(
    *,
    dataset_path: str,
    cellvit_path: str,
    split: Literal["train", "val"],
    normalize_stains: bool = False,
    filelist: str | None = None,
    hash_info: str | None = None,
) -> str:
    """File name of the cache, `<sha256>.h5`; it belongs into `<dataset_path>/cache/`.

    Args:
        dataset_path, cellvit_path: exactly as in CellViT++'s configuration (`data.dataset_path`,
            `cellvit_path`): another way to write the same path is another name.
        split: which half.
        normalize_stains: `data.normalize_stains_train`, for either half.
        filelist: `data.train_filelist` or `data.val_filelist`; None where the configuration has no
            such key.
        hash_info: `data.hash_info`; None where the configuration has no such key.
    """
    if split not in ("train", "val"):
        raise UserError(f"split must be train or val, not {split!r}.")
    parts = [dataset_path, *([] if filelist is None else [filelist]), cellvit_path]
    parts += ["stain", str(bool(normalize_stains)), split]
    parts += [] if hash_info is None else [hash_info]
    return f"{hashlib.sha256('_'.join(map(str, parts)).encode('utf-8')).hexdigest()}.h5"


def write_cache(
    path: Path,
    images: Sequence[str],
    coords: np.ndarray,
    types: np.ndarray,
    tokens: np.ndarray,
) -> Path:
    """Write the token cache of one split; the file appears whole or not at all.

    Args:
        path: `<dataset_path>/cache/` and `cache_name(...)`; its folder is made if missing.
        images: name of the image of each nucleus, n of them.
        coords: [n, 2], x and y in px of the image.
        types: [n], class of each nucleus, 0 and up.
        tokens: [n, D], float. CellViT++ takes D from its segmentation model: 384 for ViT256.

    Raises:
        UserError: lengths or widths that do not agree, values that are not finite or negative, or
            h5py is not installed.
        RunError: the disk is full.
    """
    h5py = optional("h5py", f"the token cache {path}", "embed")
    xy, found = np.asarray(coords, np.float64), np.asarray(tokens)
    kinds = _classes(types)
    _check(len(images), xy=xy, tokens=found, more={"types": len(kinds)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    vlen = h5py.vlen_dtype(np.float64)
    count = len(images)
    packed: dict[str, Any] = {"chunks": True, "compression": "gzip"}
    try:
        with h5py.File(temporary, "w") as file:
            names = file.create_dataset("images", (count,), h5py.string_dtype(), **packed)
            places = file.create_dataset("coords", (count, 2), vlen, **packed)
            file.create_dataset("types", data=kinds, **packed)
            features = file.create_dataset("tokens", (count,), vlen)
            for start in range(0, count, ROWS):
                rows = slice(start, min(count, start + ROWS))
                names[rows] = [str(name) for name in images[rows]]
                # Their reader takes the first column for the whole place: each holds x and y.
                places[rows] = np.repeat(xy[rows, None], 2, axis=1)
                features[rows] = found[rows].astype(np.float64)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and disk_is_full(error):
            raise RunError(f"{path} cannot be written, the disk is full; make room.") from error
        raise
    return path


def write_cell_graph(
    path: Path, x: np.ndarray, positions: np.ndarray, metadata: Mapping[str, Any]
) -> Path:
    """Write a cell graph; CellViT++ opens it as its own `CellGraphDataWSI`.

    The class is named in the file and not needed to write it. Elsewhere `read_cell_graph` opens the
    file. Since torch 2.6 `torch.load` wants `weights_only=False` or the class among its safe
    globals, for the files of CellViT++ as for these.

    Args:
        path: `<image>_cells.pt`; its folder is made if missing.
        x: [n, D], features, written as float32.
        positions: [n, 2], x and y of each nucleus in px, written as float32: of the slide's finest
            level for a slide, at 0.25 µm/px for Lizard (the trainer halves them).
        metadata: plain values, e.g. {"wsi_metadata": {...}, "nuclei_types": {...}}.

    Raises:
        UserError: lengths that do not agree, values that are not finite, metadata that JSON lacks.
    """
    features, xy = np.asarray(x), np.asarray(positions, np.float64)
    _check(len(features), xy=xy, tokens=features)
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise UserError(f"metadata of a cell graph must be plain values ({error}).") from None
    graph = _Graph()
    graph.__dict__.update(
        x=torch.from_numpy(features.astype(np.float32)),
        positions=torch.from_numpy(xy.astype(np.float32)),
        metadata=dict(metadata),
    )
    buffer = io.BytesIO()
    torch.save(graph, buffer, pickle_module=_ByName)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return path


def read_cell_graph(path: Path) -> dict[str, Any]:
    """`x`, `positions` and `metadata` of a cell graph, theirs or ours, without CellViT++.

    Raises:
        UserError: no such file, or one that holds anything else.
    """
    try:
        with torch.serialization.safe_globals([(_Graph, f"{GRAPH_MODULE}.{GRAPH_CLASS}")]):
            graph = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).split("\n")[0]
        raise UserError(f"{path} is not a cell graph of CellViT++ ({first}).") from None
    if not isinstance(graph, _Graph):
        raise UserError(
            f"{path} is not a cell graph of CellViT++ (it is a {type(graph).__name__})."
        )
    return dict(graph.__dict__)


class _Graph:
    """Stands for CellGraphDataWSI, whose objects are nothing but these three attributes."""


class _Named(pickle._Pickler):
    """Writes `_Graph` under the name of the class that it stands for."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is not _Graph:
            super().save_global(obj, name)  # type: ignore[misc]
            return
        # Protocol 2, which torch writes, has class names as two lines of text.
        self.write(pickle.GLOBAL + f"{GRAPH_MODULE}\n{GRAPH_CLASS}\n".encode())  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]


class _ByName:
    """What `torch.save` wants of a pickle module."""

    Pickler = _Named


def _classes(types: np.ndarray) -> np.ndarray:
    """int32 [n].

    Raises:
        UserError: not whole numbers from 0 up.
    """
    given = np.asarray(types)
    kinds = given.astype(np.int32) if given.dtype.kind in "iuf" else np.full(given.shape, -1)
    if kinds.ndim != 1 or (kinds < 0).any() or (kinds != given).any():
        raise UserError("types must be whole numbers from 0 up, one a nucleus.")
    return kinds


def _check(
    count: int, *, xy: np.ndarray, tokens: np.ndarray, more: Mapping[str, int] | None = None
) -> None:
    if tokens.ndim != 2 or xy.ndim != 2 or xy.shape[1] != 2:
        raise UserError(
            f"tokens must be [n, D] and coordinates [n, 2], not {tokens.shape} and {xy.shape}."
        )
    lengths = {"tokens": len(tokens), "coordinates": len(xy), **(more or {})}
    if any(length != count for length in lengths.values()):
        said = ", ".join(f"{length} {what}" for what, length in lengths.items())
        raise UserError(f"{count} nuclei have {said}; give one of each a nucleus.")
    if count == 0:
        raise UserError("there is no nucleus to write; CellViT++ cannot train on none.")
    if not (np.isfinite(tokens).all() and np.isfinite(xy).all()):
        raise UserError(
            "tokens or coordinates hold values that are not finite; leave such nuclei out."
        )
