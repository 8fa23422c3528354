"""Parquet files as HEST-1k publishes them: columns part by part, ids as text, nuclei as points."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.errors import UserError

UNASSIGNED = ("-1", "UNASSIGNED", "")
OUTLINES = 2**16  # outlines in memory at once


def read_outlines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Nuclei of a GeoParquet file: ids str [n], x and y float64 [n] in px; ids without an area.

    A nucleus in several parts (a MultiPolygon, or rows of one id) lies where its largest part is:
    the centroid of all would lie between them, on no nucleus.

    Raises:
        UserError: the file is damaged, has no ids or no outlines, or holds no nucleus.
    """
    import shapely

    shape, index = _geo_columns(path)
    found: list[tuple[np.ndarray, ...]] = []
    for part in read_parquet(path, (shape, index), rows=OUTLINES):
        ids = np.array(as_text(part.column(index), path).to_pylist(), object)
        wkb = part.column(shape).to_numpy(zero_copy_only=False)
        pieces, owner = shapely.get_parts(
            shapely.from_wkb(wkb, on_invalid="ignore"), return_index=True
        )
        solid = shapely.area(pieces) > 0
        pieces, owner = pieces[solid], owner[solid]
        x, y = shapely.get_coordinates(shapely.centroid(pieces)).T
        found.append((ids, ids[owner], shapely.area(pieces), x, y))
    if not found:
        raise UserError(f"{path} holds no nucleus; fetch it again.")
    every, cell, area, x, y = (np.concatenate(column) for column in zip(*found, strict=True))
    total = len(set(every.tolist()) - {None, *UNASSIGNED})
    named = np.array([name is not None and name not in UNASSIGNED for name in cell], bool)
    cell, area, x, y = (column[named] for column in (cell, area, x, y))
    if not len(cell):
        raise UserError(f"{path} holds no nucleus; fetch it again.")
    # The largest piece of a cell comes first; cells keep the order of the file.
    order = np.argsort(-area, kind="stable")
    names, first = np.unique(cell[order].astype(str), return_index=True)
    chosen = np.sort(order[first])
    return cell[chosen].astype(str), x[chosen], y[chosen], total - len(names)


def read_parquet(
    path: Path, needed: tuple[str, ...], optional: tuple[str, ...] = (), *, rows: int
) -> Iterator[Any]:
    """Record batches of these columns, without those optional ones that the file lacks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            lacking = [name for name in needed if name not in there]
            if lacking:
                raise UserError(
                    f"{path} has no column {lacking[0]} (it has {', '.join(there)}): it is not "
                    f"the file that HEST-1k publishes under this name; fetch it again."
                )
            columns = [*needed, *(name for name in optional if name in there)]
            yield from file.iter_batches(batch_size=rows, columns=columns)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not read as parquet ({reason}); fetch it again.") from None


def _geo_columns(path: Path) -> tuple[str, str]:
    """Names of the columns of outlines and of cell ids of a GeoParquet file."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not read as parquet ({reason}); fetch it again.") from None
    stated = json.loads((schema.metadata or {}).get(b"geo", b"{}"))
    shape = stated.get("primary_column", "geometry")
    for index in ("__index_level_0__", "cell_id"):
        if index in schema.names:
            return shape, index
    raise UserError(
        f"{path} has no cell ids: neither __index_level_0__ nor cell_id is among its columns "
        f"({', '.join(schema.names)}); fetch the published file again."
    )


def as_text(values: Any, path: Path) -> Any:
    """Ids or names of any type as a pyarrow string array; bytes and text of bytes are undone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    try:
        if pa.types.is_dictionary(kind):
            return as_text(values.dictionary_decode(), path)
        if pa.types.is_floating(kind):  # integers that a missing one has turned into floats
            values = pc.if_else(pc.is_nan(values), None, values).cast(pa.int64())
        text = values.cast(pa.string())
    except pa.ArrowException as error:
        raise UserError(
            f"{path} has ids or names of type {kind} that are no text ({error}); fetch it again."
        ) from None
    return pc.replace_substring_regex(text, r"^b(?:'(.*)'|\"(.*)\")$", r"\1\2")


def different(values: Any, path: Path) -> tuple[Any, np.ndarray]:
    """The different values as text, and which of them each row has, int64 [n]; -1 where none."""
    encoded = values if hasattr(values, "indices") else values.dictionary_encode()
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return as_text(encoded.dictionary, path), indices.astype(np.int64)
