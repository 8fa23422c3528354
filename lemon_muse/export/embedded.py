"""From a table of `lemon-muse embed` to CellViT++'s cell graphs and token cache."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from lemon_muse.config import Config
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError
from lemon_muse.export import optional

# CellViT++ counts from the middle of the first pixel; the tables from its corner.
PIXEL_CENTRE = 0.5
# Widths that its classifier training can be told of, by the segmentation model that has them.
WIDTHS = (384, 1024, 1280)
COLUMNS = ("slide", "x_px", "y_px", "type", "predicted")


class Tokens(Config):
    """The token cache of CellViT++, which is asked for with dataset= and model=."""

    dataset: str | None = Field(
        None, description="data.dataset_path of CellViT++'s configuration, to the letter"
    )
    model: str | None = Field(None, description="cellvit_path of its configuration, to the letter")
    split: Literal["train", "val"] = Field("train", description="which half the table is")
    filelist: str | None = Field(
        None, description="data.train_filelist or data.val_filelist, where it has one"
    )
    hash_info: str | None = Field(None, description="data.hash_info, where it has one")
    normalize_stains: bool = Field(False, description="data.normalize_stains_train")
    column: Literal["type", "predicted"] = Field("type", description="column of the classes")
    classes: tuple[str, ...] = Field(
        (), description="names of the classes 0, 1, … in this order; none = those found, sorted"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> "Tokens":
        if (self.dataset is None) != (self.model is None):
            raise ValueError("dataset= and model= go together: the cache is named after both.")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes= names a class twice.")
        return self


@dataclass(frozen=True)
class Embedded:
    """A table in memory: feature float32 [n, D], columns [n] by name, and what it says of itself
    (`encoder`, `slides`)."""

    feature: np.ndarray
    columns: dict[str, np.ndarray]
    about: dict[str, Any]


def write(table: Path, out: Path, cfg: Tokens) -> str:
    """Write `SLIDE_cells.pt` of every slide, `classes.json`, and the cache where it is asked for.

    Each file appears whole or not at all; killed, the same words write them again.

    Args:
        table: .h5ad, .zarr or .parquet of `lemon-muse embed`.
        out: folder; the cache goes to `out/cache/`.

    Returns:
        A sentence about what was written.

    Raises:
        UserError: no such table, no classes for the cache, a folder whose classes have other
            numbers, or a package is missing.
    """
    from lemon_muse.export.cellvit_tokens import write_cell_graph

    if cfg.dataset is not None:
        optional("h5py", "the token cache of CellViT++", "embed")
    held = read(table)
    if cfg.column not in held.columns:
        raise UserError(f"{table} has no column '{cfg.column}'; embed with classify.benchmark= .")
    kinds = held.columns[cfg.column].astype(str)
    classes = cfg.classes or tuple(sorted(set(np.unique(kinds).tolist()) - {""}))
    numbered = json.dumps(dict(enumerate(classes)), indent=1)
    _refuse_other_classes(out / "classes.json", numbered)
    slides = held.columns["slide"].astype(str)
    xy = _places(held, slides)
    # What can be refused goes first.
    cache = _write_cache(out, held, slides, xy, kinds, classes, cfg)
    for name in np.unique(slides).tolist():
        rows = np.flatnonzero(slides == name)
        facts = {k: _plain(v) for k, v in held.about["slides"][name].items()}
        metadata = {
            "wsi_metadata": {"slide": name, "base_mpp": facts["mpp"], **facts},
            "nuclei_types": dict(enumerate(classes)),
            "encoder": {k: _plain(v) for k, v in held.about["encoder"].items()},
        }
        write_cell_graph(out / f"{name}_cells.pt", held.feature[rows], xy[rows], metadata)
    write_atomic(out / "classes.json", numbered.encode())
    count = len(np.unique(slides))
    said = f"{out}: cellvit_tokens, cell graphs of {count} slides, {len(slides)} nuclei"
    said += f"; {cache}" if cache else ""
    width = held.feature.shape[1]
    if width not in WIDTHS:
        said += f". CellViT++ can train on {', '.join(map(str, WIDTHS))} features, not on {width}"
    return said


def _refuse_other_classes(path: Path, numbered: str) -> None:
    """The two halves of a data set go to one folder: a class must have one number in both."""
    if path.is_file() and (held := path.read_text(encoding="utf-8")) != numbered:
        before, now = (" ".join(text.split()) for text in (held, numbered))
        raise UserError(
            f"{path} numbers the classes {before}, but these would be {now}; give both halves the "
            f"same tokens.classes=, or another out=."
        )


def _write_cache(
    out: Path,
    held: Embedded,
    slides: np.ndarray,
    xy: np.ndarray,
    kinds: np.ndarray,
    classes: tuple[str, ...],
    cfg: Tokens,
) -> str:
    from lemon_muse.export.cellvit_tokens import cache_name, write_cache

    if cfg.dataset is None or cfg.model is None:
        return ""
    number = {name: i for i, name in enumerate(classes)}
    code = np.array([number.get(kind, -1) for kind in kinds.tolist()], np.int64)
    rows = np.flatnonzero(code >= 0)
    if not len(rows):
        raise UserError(
            f"no nucleus has one of the classes {', '.join(classes) or '(none)'} in column "
            f"'{cfg.column}', so CellViT++ could not train; embed detections that state types, or "
            f"give classes= and column= ."
        )
    name = cache_name(
        dataset_path=cfg.dataset,
        cellvit_path=cfg.model,
        split=cfg.split,
        normalize_stains=cfg.normalize_stains,
        filelist=cfg.filelist,
        hash_info=cfg.hash_info,
    )
    path = out / "cache" / name
    write_cache(path, slides[rows].tolist(), xy[rows], code[rows], held.feature[rows])
    left = len(code) - len(rows)
    without = f" ({left} without a class left out)" if left else ""
    return f"{path}: {len(rows)} nuclei of {len(classes)} classes{without}"


def read(path: Path) -> Embedded:
    """A finished table of `lemon-muse embed`.

    Raises:
        UserError: it is missing or something else, or anndata is not installed.
    """
    if not path.exists():
        raise UserError(f"there is no table embedded={path}.")
    if path.suffix not in (".parquet", ".h5ad", ".zarr"):
        raise UserError(f"embedded={path} must end in .parquet, .h5ad or .zarr.")
    try:
        return _of_parquet(path) if path.suffix == ".parquet" else _of_anndata(path)
    except UserError:
        raise
    except Exception as error:  # three libraries, each with kinds of its own
        raise UserError(
            f"{path} is no table of lemon-muse embed ({type(error).__name__}); make it again."
        ) from None


def _of_parquet(path: Path) -> Embedded:
    from pyarrow import parquet

    table = parquet.read_table(path)
    about = json.loads(table.schema.metadata[b"lemon_muse"])
    columns = {k: np.asarray(table[k].to_pylist()) for k in COLUMNS if k in table.column_names}
    flat = table["feature"].combine_chunks().flatten().to_numpy()
    return Embedded(flat.reshape(len(table), -1), columns, about)


def _of_anndata(path: Path) -> Embedded:
    anndata = optional("anndata", f"embedded={path}", "embed")
    table = (anndata.read_h5ad if path.suffix == ".h5ad" else anndata.read_zarr)(path)
    columns = {k: np.asarray(table.obs[k]) for k in COLUMNS if k in table.obs}
    return Embedded(np.asarray(table.X), columns, table.uns["lemon_muse"])


def _places(held: Embedded, slides: np.ndarray) -> np.ndarray:
    """float64 [n, 2]: px of the finest level from the corner of the scanned area, as CellViT has
    them."""
    names, of = np.unique(slides, return_inverse=True)
    facts = [held.about["slides"][name] for name in names.tolist()]
    corner = np.array([[f["bounds_x"], f["bounds_y"]] for f in facts], np.float64)
    xy = np.stack([held.columns["x_px"], held.columns["y_px"]], 1).astype(np.float64)
    return xy - corner[of] - PIXEL_CENTRE


def _plain(value: Any) -> Any:
    """A number, text or list of what a table's reader gave."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
