"""CSV, TSV and Parquet tables: x, y and, where known, type, score, id and area.

x and y are continuous level-0 px of the whole slide (pixel centres at +0.5), area is in µm².
Names may be written in any case; other columns are left alone.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.nuclei_formats.record import Nuclei, SlideFacts, nuclei
from lemon_muse.errors import UserError

OPTIONAL = ("type", "score", "id", "area")


def read(path: Path, *, slide: SlideFacts) -> Nuclei:
    """Nuclei of one table; `slide` is not needed, the table is at level 0 already.

    Raises:
        UserError: x or y is missing, a value is no number, the file is empty or damaged.
    """
    table = _open(path)
    columns = {name.strip().lower(): name for name in reversed(table.column_names)}
    missing = [name for name in ("x", "y") if name not in columns]
    if missing:
        raise UserError(
            f"{path} has no column '{missing[0]}' (it has {', '.join(table.column_names)}); name "
            f"the columns x, y and, where known, {', '.join(OPTIONAL)}, separated by commas."
        )
    xy = np.stack([_numbers(path, table[columns[name]], name) for name in ("x", "y")], 1)
    bad = ~np.isfinite(xy).all(1)
    if bad.any():
        raise UserError(
            f"{path}, row {int(np.argmax(bad)) + 1}, has no x or y; fill it in or take it out."
        )
    given = {name: table[columns[name]] for name in OPTIONAL if name in columns}
    return nuclei(
        xy,
        kind=_texts(given["type"]) if "type" in given else None,
        score=_numbers(path, given["score"], "score") if "score" in given else None,
        area=_numbers(path, given["area"], "area") if "area" in given else None,
        ids=_ids(given["id"]) if "id" in given else None,
    )


def _open(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path)
        delimiter = "\t" if path.suffix == ".tsv" else ","
        return csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter))
    except FileNotFoundError:
        raise UserError(f"there is no detection file {path}; check detections=.") from None
    except (pa.ArrowException, OSError) as error:
        first = str(error).split("\n")[0].rstrip(".")
        raise UserError(
            f"{path} cannot be read as a table ({first}); write a comma-separated file with a "
            f"header x,y, or Parquet."
        ) from None


def _numbers(path: Path, column: Any, name: str) -> np.ndarray:
    """float64 [n]; missing values are NaN."""
    import pyarrow as pa

    try:
        return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(
            f"{path} has a value in column '{name}' that is no number ({error}); mend it."
        ) from None


def _texts(column: Any) -> list[str]:
    return ["" if value is None else str(value) for value in column.to_pylist()]


def _ids(column: Any) -> np.ndarray:
    values = column.to_pylist()
    if all(isinstance(value, int) for value in values):
        return np.array(values, np.int64)
    return np.array(["" if value is None else str(value) for value in values], str)
