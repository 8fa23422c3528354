"""Read what a report is made of: result rows, predictions, and the files of a run folder."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.results import Key, predictions_path
from lemon_muse.errors import UserError

FLOOR_PREFIXES = ("floor:", "random:")
_REQUIRED = ("benchmark", "encoder", "probe", "metric", "value")


@dataclass(frozen=True)
class Row:
    """One line of a results.jsonl: one metric of one probe on one encoder."""

    benchmark: str
    task: str
    encoder: str
    encoder_hash: str
    protocol: str
    probe: str
    split: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    seed: int
    seconds: float
    version: str
    params: dict[str, Any]
    source: Path

    @property
    def is_floor(self) -> bool:
        """Whether the row belongs to a floor (a baseline), not to a pretrained encoder."""
        return self.encoder.startswith(FLOOR_PREFIXES)

    @property
    def same(self) -> tuple[str, ...]:
        """What makes two rows the same measurement."""
        names = (self.benchmark, self.task, self.protocol, self.split, self.version)
        return (*names, self.encoder, self.encoder_hash, self.probe, self.metric)

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in `report.json` (NaN becomes null)."""
        row = {k: none_if_nan(v) for k, v in asdict(self).items() if k != "source"}
        return {**row, "source": self.source.name}


@dataclass(frozen=True)
class Predictions:
    """One predictions/<encoder>-<probe>.npz: what a probe said about each test nucleus.

    `labels` and `predicted` are int64 [n], indices into `classes`; `patient` is str [n]; `place` is
    str [n], the nucleus's image and position, by which two files are matched nucleus by nucleus.
    """

    labels: np.ndarray
    predicted: np.ndarray
    patient: np.ndarray
    place: np.ndarray
    classes: list[str]


@dataclass(frozen=True)
class Pearsons:
    """One predictions file of a regression: correlations float64 [S, G] of slides str [S] and G
    genes; `patient` str [S], None where the file does not say."""

    values: np.ndarray
    slides: np.ndarray
    genes: list[str]
    patient: np.ndarray | None


@dataclass(frozen=True)
class RunFolder:
    """What a run folder says: `metrics` maps a name to (steps, values), both float64 [k]."""

    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    config: dict[str, Any]
    info: dict[str, Any]
    notes: list[str]


def none_if_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for a value that does not exist."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_files(name: str) -> list[Path]:
    """The results.jsonl files that a word of `results=` means: a file, or a folder to search.

    Raises:
        UserError: there is no such file, or the folder holds none at any depth.
    """
    path = Path(name)
    found = [path] if path.is_file() else sorted(path.rglob("results.jsonl"))
    if not found:
        place = path / "results.jsonl" if path.is_dir() else path
        raise UserError(
            f"there is no results file {place}; give results= the results.jsonl that "
            "'lemon-muse eval' wrote, or a folder that holds some."
        )
    return found


def read_results(path: Path) -> tuple[list[Row], list[str]]:
    """All rows of one results.jsonl in the order in which they were written, and what to note.

    A row that a killed job left cut off is noted; any other malformed line is a `UserError`.
    """
    rows, notes = [], []
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            tree = json.loads(line)
        except json.JSONDecodeError as error:
            if _is_cut_off(line.rstrip(), error):
                notes.append(f"Line {number} of {path.name} is cut off and was left out.")
                continue
            raise UserError(
                f"{where}: not readable as JSON ({error.msg}); mend or delete the line."
            ) from None
        if not isinstance(tree, dict):
            raise UserError(f'{where}: a row must be an object like {{"benchmark": …}}.')
        rows.append(_row(tree, where, path))
    if not rows:
        raise UserError(f"{path} holds no rows; run 'lemon-muse eval' first.")
    return rows, notes


def _is_cut_off(line: str, error: json.JSONDecodeError) -> bool:
    """Whether a line is the beginning of an object that just stops."""
    at_end = error.pos >= len(line) or error.msg.startswith("Unterminated string")
    return line.startswith('{"') and at_end


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        return list(enumerate(path.read_text(encoding="utf-8").split("\n"), start=1))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; it should hold one JSON row a line.") from None


def _row(tree: dict[str, Any], where: str, path: Path) -> Row:
    for key in _REQUIRED:
        if key not in tree:
            raise UserError(f"{where}: the row has no '{key}'; write it again with 'eval'.")

    def number(key: str) -> float:
        value = tree.get(key)
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: '{key}' is {value!r}, it must be a number.")
        return float(value)

    def text(key: str) -> str:
        value = tree.get(key, "")
        return "" if value is None else str(value)

    def whole(key: str) -> int:
        value = number(key)
        return int(value) if math.isfinite(value) else 0

    return Row(
        benchmark=text("benchmark"),
        task=text("task"),
        encoder=text("encoder"),
        encoder_hash=text("encoder_hash"),
        protocol=text("protocol"),
        probe=text("probe"),
        split=text("split"),
        metric=text("metric"),
        value=number("value"),
        ci_low=number("ci_low"),
        ci_high=number("ci_high"),
        n=whole("n"),
        seed=whole("seed"),
        seconds=number("seconds"),
        version=text("version"),
        params=tree.get("params") if isinstance(tree.get("params"), dict) else {},  # type: ignore[arg-type]
        source=path,
    )


def newest(rows: list[Row]) -> list[Row]:
    """Drop rows that a later row of the same measurement replaces; order is kept."""
    last = {row.same: i for i, row in enumerate(rows)}
    return [row for i, row in enumerate(rows) if last[row.same] == i]


def repeats(rows: list[Row]) -> int:
    """How many rows say what another one says: floors stand in the results of every encoder."""
    return len(rows) - len({(*row.same, row.seed, repr(row.value)) for row in rows})


def predictions_file(row: Row) -> Path:
    """Where `eval` leaves the predictions of a row: ':' and '/' of the names become '_'."""
    names = (row.encoder_hash, row.benchmark, row.version, row.protocol, row.probe)
    key = Key(*names, row.seed, row.split, row.task)
    return predictions_path(row.source.parent, key, encoder=row.encoder)


def read_predictions(path: Path) -> Predictions:
    """One predictions file, checked for shape."""
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = np.asarray(file["labels"], np.int64)
            n = len(labels)
            predicted = np.asarray(file["predicted"], np.int64)
            patient = np.asarray(file["patient"]).astype(str)
            parts = [np.asarray(file[k]).astype(str) for k in ("image", "x", "y") if k in file]
            classes = [str(c) for c in file["classes"]]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a predictions file: {error}.") from None
    if any(len(part) != n for part in (predicted, patient, *parts)) or n == 0:
        raise UserError(f"{path}: labels, predicted, patient and places differ in length.")
    known = np.concatenate([labels, predicted])
    if known.min() < 0 or known.max() >= len(classes):
        raise UserError(f"{path}: a label lies outside its {len(classes)} classes.")
    place = np.array(["|".join(p) for p in zip(*parts, strict=True)] if parts else [""] * n)
    return Predictions(labels, predicted, patient, place, classes)


def read_pearsons(path: Path) -> Pearsons:
    """One predictions file of a regression, checked for shape."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values = np.asarray(file["pearson"], np.float64)
            slides = np.asarray(file["slides"]).astype(str)
            genes = [str(gene) for gene in file["genes"]]
            patient = np.asarray(file["patient"]).astype(str) if "patient" in file else None
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a predictions file of a regression: {error}.") from None
    people = len(slides) if patient is None else len(patient)
    if values.shape != (len(slides), len(genes)) or people != len(slides) or not values.size:
        raise UserError(f"{path}: correlations, slides and genes differ in length.")
    return Pearsons(values, slides, genes, patient)


def read_run(folder: Path) -> RunFolder:
    """metrics.jsonl (needed), config.yaml and run.json (where present) of a run folder."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} has no metrics.jsonl; give run= the folder that train wrote.")
    table: dict[str, dict[float, float]] = {}
    notes: list[str] = []
    lines = [(number, line) for number, line in _lines(path) if line.strip()]
    for position, (number, line) in enumerate(lines):
        try:
            tree = json.loads(line)
        except json.JSONDecodeError:
            if position == len(lines) - 1:
                notes.append("The last line of metrics.jsonl is cut off and was left out.")
                break
            raise UserError(f"{path}, line {number}: not readable as JSON.") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("step"), int | float):
            raise UserError(f"{path}, line {number}: the line has no 'step'.")
        for key, value in tree.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                # A resumed run writes a step again: the later line is the one that counts.
                table.setdefault(key, {})[float(tree["step"])] = float(value)
    metrics = {}
    for key, points in table.items():
        steps = sorted(points)
        metrics[key] = (np.array(steps), np.array([points[s] for s in steps]))
    return RunFolder(metrics, _yaml(folder / "config.yaml"), _yaml(folder / "run.json"), notes)


def _yaml(path: Path) -> dict[str, Any]:
    """A YAML or JSON file as a dict; JSON is a part of YAML. Empty where there is none."""
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is not readable; delete it or restore it.") from None
    return tree if isinstance(tree, dict) else {}
