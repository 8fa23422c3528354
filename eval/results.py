"""Result rows and predictions on disk.

`results.jsonl` holds one metric a line and only grows: the lines of a probe are written by one call
and synced. A key that is there is not computed again, so a killed job is finished by a rerun.
"""

import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval import bootstrap, metrics
from lemon_muse.data.table import Table

log = logging.getLogger(__name__)

Row = dict[str, Any]
Params = dict[str, float | int | str]
# The metrics without which a measurement is not whole, by what is measured; written last.
NEEDED = (metrics.METRICS, ("pearson",), ("purity/class",))
LAST = frozenset(name for names in NEEDED for name in names)
# Bytes; a row has a few hundred.
LONGEST_LINE = 65536


class Key(NamedTuple):
    """What makes two results the same measurement."""

    encoder_hash: str
    benchmark: str
    version: str
    protocol: str
    probe: str
    seed: int
    split: str
    task: str


def key_of(row: Row) -> Key:
    """The key of a row read from a file; missing fields count as empty."""
    return Key(*(row.get(name, "") for name in Key._fields))


def read(path: Path) -> list[Row]:
    """Rows of a results.jsonl, [] where there is none; of equal (key, metric) the last one counts.

    A line cut off by a crash is left out with a warning.
    """
    if not path.is_file():
        return []
    rows: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[(*key_of(row), row["metric"])] = row
        except (ValueError, KeyError, AttributeError, TypeError):
            log.warning("%s, line %d, is not a result row and is left out", path, number)
    return list(rows.values())


def complete(rows: list[Row], key: Key) -> list[Row]:
    """The rows of `key` if every metric that one kind of measurement needs is there, else []."""
    mine = [row for row in rows if key_of(row) == key]
    have = {row["metric"] for row in mine}
    return mine if any(have.issuperset(names) for names in NEEDED) else []


def append(path: Path, rows: list[Row]) -> None:
    """Add complete lines by one synced write; a line that a crash left cut off is removed first.

    The file is locked meanwhile: jobs with one `out` must not take each other's lines for torn. A
    metric that has a line by now, of this job before it was killed or of another, gets no second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, LONGEST_LINE, max(0, size - LONGEST_LINE))
        whole = size - len(tail) + tail.rfind(b"\n") + 1
        if whole != size:
            os.ftruncate(descriptor, whole)
        have = {(*key_of(row), row["metric"]) for row in read(path)}
        new = [row for row in rows if (*key_of(row), row["metric"]) not in have]
        payload = "".join(json.dumps(row, allow_nan=False) + "\n" for row in new).encode()
        written = 0
        while written < len(payload):
            written += os.write(descriptor, payload[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_rows(
    key: Key,
    found: dict[str, bootstrap.Interval],
    *,
    encoder: str,
    n: int,
    seconds: float,
    params: Params,
) -> list[Row]:
    """One row a metric; a value that is not defined becomes null.

    The metrics that `complete` asks for come last: a block cut off by a crash never looks complete.

    Args:
        found: from `bootstrap.intervals`.
        n: nuclei that were scored.
        seconds: wall time of the probe, without the features.
    """
    return [
        {
            "benchmark": key.benchmark,
            "task": key.task,
            "encoder": encoder,
            "encoder_hash": key.encoder_hash,
            "protocol": key.protocol,
            "probe": key.probe,
            "split": key.split,
            "metric": metric,
            "value": _number(interval.value),
            "ci_low": _number(interval.low),
            "ci_high": _number(interval.high),
            "n": n,
            "seed": key.seed,
            "seconds": round(seconds, 3),
            "version": key.version,
            "params": params,
        }
        for metric, interval in sorted(found.items(), key=lambda item: item[0] in LAST)
    ]


def predictions_path(out: Path, key: Key, *, encoder: str) -> Path:
    """out/predictions/<encoder>-<probe>.npz, with digits where another key holds that name.

    ':' and '/' of the encoder's name become '_'.
    """
    stem = re.sub(r"[:/\\\s]", "_", f"{encoder}-{key.probe}")
    return _free(out / "predictions" / f"{stem}.npz", key)


def _free(path: Path, key: Key) -> Path:
    """`path`, or with digits where it holds another key."""
    if not path.is_file() or _stored_key(path) in (key, None):
        return path
    digits = hashlib.sha256("\0".join(map(str, key)).encode()).hexdigest()[:8]
    return path.with_name(f"{path.stem}-{digits}.npz")


def has_predictions(path: Path, key: Key) -> bool:
    """Whether `path` is a readable predictions file of this key."""
    return path.is_file() and _stored_key(path) == key


def write_predictions(
    path: Path, key: Key, table: Table, rows: np.ndarray, scores: np.ndarray, *, encoder: str
) -> None:
    """What a probe says about each nucleus, atomically, as .npz.

    Arrays: labels, predicted int64 [n]; scores float32 [n, K]; patient, slide, image str [n];
    x, y float64 [n]; row int64 [n] (of the table); confusion int64 [K, K]; classes str [K];
    encoder and key: str scalars (the key as JSON).
    """
    labels, predicted = table.label[rows], scores.argmax(1)
    _write(
        path,
        key,
        encoder,
        labels=labels,
        predicted=predicted.astype(np.int64),
        scores=scores.astype(np.float32),
        patient=table.patient[rows].astype(str),
        slide=table.slide[rows].astype(str),
        image=table.image[rows].astype(str),
        x=table.x[rows],
        y=table.y[rows],
        row=np.asarray(rows, np.int64),
        confusion=metrics.confusion(labels, predicted, classes=len(table.classes)),
        classes=np.array(table.classes, str),
    )


def write_pearson(
    path: Path,
    key: Key,
    values: np.ndarray,
    *,
    slides: np.ndarray,
    patient: np.ndarray,
    genes: tuple[str, ...],
    predicted: np.ndarray,
    rows: np.ndarray,
    encoder: str,
) -> None:
    """What a regression gives, atomically, as .npz.

    Arrays: pearson float64 [S, G]; slides, patient str [S]; genes str [G]; predicted float16
    [n, G]; row int64 [n] (of the table); encoder and key as in `write_predictions`.
    """
    _write(
        path,
        key,
        encoder,
        pearson=values,
        slides=slides.astype(str),
        patient=patient.astype(str),
        genes=np.array(genes, str),
        predicted=predicted.astype(np.float16),
        row=np.asarray(rows, np.int64),
    )


def _write(path: Path, key: Key, encoder: str, **arrays: np.ndarray) -> None:
    from lemon_muse.data.files import write_atomic

    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        encoder=np.array(encoder),
        key=np.array(json.dumps(list(key))),
        **arrays,  # type: ignore[arg-type]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another job may have taken the name since it was asked for.
        write_atomic(_free(path, key), stream.getvalue())


def _stored_key(path: Path) -> Key | None:
    """The key inside a predictions file; None where the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Key(*json.loads(str(file["key"])))
    except Exception:  # a damaged zip raises many kinds; the file is then written again
        return None


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
