"""The finished table: AnnData (.h5ad, .zarr) or Parquet, put together from the parts of slides.

Columns of all nuclei are held in memory (some hundred bytes each), features are not: Parquet takes
them part by part, AnnData from a map of a file.
"""

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lemon_muse.errors import RunError, UserError

if TYPE_CHECKING:
    from launch.embed.labels import Predicted
    from launch.embed.work import Done

KEY = "lemon_muse"
TEXTS = ("type", "patient", "slide", "predicted")


@dataclass(frozen=True)
class Output:
    """All that is written: slides with their parts, and what is said of their making.

    `about` holds plain values; `predicted` is one for each slide, where types were asked for.
    """

    slides: list["Done"]
    dim: int
    about: dict[str, Any]
    predicted: list["Predicted"] | None = None

    def __len__(self) -> int:
        return sum(len(slide) for slide in self.slides)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """id, x_px, y_px, x_um, y_um, type, score, patient, slide, and the predicted ones, [n]."""
        parts = []
        for slide in self.slides:
            points, mpp = slide.points, float(slide.facts["mpp"])
            name, patient = slide.task.slide, slide.task.patient
            parts.append(
                {
                    "id": np.array([f"{name}:{i}" for i in points.number.tolist()], object),
                    "x_px": points.xy[:, 0],
                    "y_px": points.xy[:, 1],
                    "x_um": points.xy[:, 0] * mpp,
                    "y_um": points.xy[:, 1] * mpp,
                    "type": points.type.astype(object),
                    "score": points.score.astype(np.float32),
                    "patient": np.full(len(points), patient, object),
                    "slide": np.full(len(points), name, object),
                }
            )
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self.predicted is not None:
            found["predicted"] = np.concatenate([p.names.astype(object) for p in self.predicted])
            found["probability"] = np.concatenate([p.probability for p in self.predicted])
        return found


def check_extra(out: Path) -> None:
    """UserError where the library that writes this kind of file is not installed."""
    if out.suffix == ".parquet":
        return
    try:
        import anndata  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            f"out={out} needs the extra 'embed': pip install lemon-muse[embed]; .parquet "
            f"needs none."
        ) from None


def is_finished(out: Path, key: str) -> bool:
    """Whether the table is there, made with the same words from the same files, and whole.

    One that lacks slides is made again, whatever was mended meanwhile.

    Raises:
        UserError: it is there, whole, and was made otherwise.
    """
    if not out.exists():
        return False
    about = read_about(out)
    if about.get("failed"):
        return False
    if about.get("key") != key:
        raise UserError(
            f"{out} was made with other words or from other files; delete it, or give another out=."
        )
    return True


def read_about(out: Path) -> dict[str, Any]:
    """The key of a table and the slides that it lacks.

    Raises:
        UserError: it is not a table of this job.
    """
    try:
        if out.suffix == ".parquet":
            from pyarrow import parquet

            said: dict[str, Any] = json.loads(
                (parquet.read_schema(out).metadata or {})[KEY.encode()]
            )
            return said
        if out.suffix == ".h5ad":
            import h5py

            with h5py.File(out) as file:
                group = file[f"uns/{KEY}"]
                return {name: group[name][()].decode() for name in ("key", "failed")}
        import zarr

        opened: Any = zarr.open(out, mode="r")
        return {name: str(opened[f"uns/{KEY}/{name}"][()]) for name in ("key", "failed")}
    except Exception as error:  # three libraries, each with kinds of its own
        raise UserError(
            f"{out} is there and no table of lemon-muse embed ({type(error).__name__}); delete it, "
            f"or give another out=."
        ) from None


def write(out: Path, table: Output, folder: Path) -> None:
    """Write the table; it appears whole or not at all.

    Args:
        folder: for what is not finished, on the same file system.

    Raises:
        RunError: the disk is full.
    """
    unfinished = folder / f"table{out.suffix}"
    _remove(unfinished)
    try:
        if out.suffix == ".parquet":
            _write_parquet(unfinished, table)
        else:
            _write_anndata(unfinished, table, folder / "features.f32")
    except OSError as error:
        _remove(unfinished)
        raise RunError(
            f"{out} cannot be written ({error}); make room, then run it again."
        ) from None
    if unfinished.is_file():
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
    else:
        _remove(out)  # a folder is not replaced by a rename
    unfinished.replace(out)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _write_parquet(path: Path, table: Output) -> None:
    """One group of rows for each part; the features are a list of fixed length, float32."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: _arrow(name, values) for name, values in table.columns.items()}
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    fields.append(pa.field("feature", pa.list_(pa.float32(), table.dim)))
    schema = pa.schema(fields, {KEY: json.dumps(table.about, sort_keys=True, ensure_ascii=False)})
    # Features do not get smaller by compression: they are left plain, and read faster.
    packed = dict.fromkeys(columns, "zstd") | {"feature.list.element": "none"}
    start = 0
    # Nor do they repeat: a dictionary of them would be built for nothing.
    words = [name for name in columns if name in TEXTS]
    with parquet.ParquetWriter(path, schema, compression=packed, use_dictionary=words) as writer:
        for part in (part for slide in table.slides for part in slide.parts):
            found = np.load(part)
            flat = pa.array(found.reshape(-1), pa.float32())
            here = [column.slice(start, len(found)) for column in columns.values()]
            here.append(pa.FixedSizeListArray.from_arrays(flat, table.dim))
            writer.write_table(pa.Table.from_arrays(here, schema=schema))
            start += len(found)


def _arrow(name: str, values: np.ndarray) -> Any:
    import pyarrow as pa

    if name not in TEXTS:
        return pa.array(values)
    names, code = np.unique(values.astype(str), return_inverse=True)
    kinds = pa.array(names.tolist(), pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(code.astype(np.int32)), kinds)


def _write_anndata(path: Path, table: Output, raw: Path) -> None:
    """X float32, obs, obsm['spatial'] float64 (level-0 px) and uns['lemon_muse']."""
    import anndata
    import pandas as pd

    columns = dict(table.columns)
    with raw.open("wb") as file:
        for part in (part for slide in table.slides for part in slide.parts):
            np.load(part).tofile(file)
    features = np.asarray(np.memmap(raw, np.float32, "r", shape=(len(table), table.dim)))
    index = pd.Index(columns.pop("id"), dtype=object)
    obs = pd.DataFrame(
        {k: pd.Categorical(v) if k in TEXTS else v for k, v in columns.items()}, index=index
    )
    made = anndata.AnnData(
        X=features,
        obs=obs,
        var=pd.DataFrame(index=[f"f{i}" for i in range(table.dim)]),
        obsm={"spatial": np.stack([columns["x_px"], columns["y_px"]], 1)},
        uns={KEY: _arrays(table.about)},
    )
    if path.suffix == ".h5ad":
        made.write_h5ad(path)
    else:
        with warnings.catch_warnings():
            # anndata says that it will write version 3 one day; it reads both.
            warnings.filterwarnings("ignore", "Writing zarr v2")
            made.write_zarr(path)
    del made, features
    raw.unlink()


def _arrays(value: Any) -> Any:
    """Lists of numbers as arrays: what anndata stores and gives back as it was."""
    if isinstance(value, dict):
        return {name: _arrays(part) for name, part in value.items()}
    return np.array(value) if isinstance(value, list) else value
