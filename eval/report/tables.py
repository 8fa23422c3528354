"""From result rows to the numbers of the page: encoders beside floors, best values, differences."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from eval.bootstrap import paired_difference
from eval.report.inputs import Predictions, Row, predictions_file, read_predictions
from eval.report.style import class_colour
from eval.report.words import encoder_words

METRICS = ("balanced_accuracy", "macro_f1", "accuracy", "auroc")
PAIRED = ("balanced_accuracy", "macro_f1")
_PROBES = ("knn", "logistic", "linear", "ridge")
_FLOORS = ("random:", "floor:histogram", "floor:pixel_pca", "floor:colour", "floor:majority")
# A predictions file belongs to a row only if it gives the row's accuracy; rows may be rounded.
_SAME_ACCURACY = 1e-4


@dataclass(frozen=True)
class Difference:
    """Encoder minus floor on the same nuclei; low and high are a 95 % bootstrap interval or NaN."""

    encoder: str
    floor: str
    probe: str
    metric: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """'above', 'ahead' (above, but zero lies inside the interval), 'level' or 'below'."""
        known = np.isfinite(self.low)
        if self.value > 0:
            return "above" if known and self.low > 0 else "ahead"
        return "below" if known and self.high < 0 else "level"


@dataclass(frozen=True)
class Board:
    """All measurements of one benchmark, task, protocol, split and version."""

    benchmark: str
    task: str
    protocol: str
    split: str
    version: str
    encoders: list[str]
    floors: list[str]
    probes: list[str]
    classes: list[str]
    colours: dict[str, str]
    cells: dict[tuple[str, str, str], Row]
    predictions: dict[tuple[str, str], Predictions] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Encoders, then floors: the rows of the table."""
        return self.encoders + self.floors

    def words(self, name: str) -> str:
        """A name as it reads; a floor's window only where it tells two floors apart."""
        bare = {encoder_words(floor, window=False) for floor in self.floors}
        return encoder_words(name, window=len(bare) < len(self.floors))

    def metrics(self) -> list[str]:
        """The metrics of the table that any row has, in a fixed order."""
        return [m for m in METRICS if any(key[2] == m for key in self.cells)]

    def present(self, probe: str) -> list[str]:
        """Names that have at least one of the table's metrics under a probe."""
        return [n for n in self.names if any((n, probe, m) in self.cells for m in METRICS)]

    def best(self, probe: str, metric: str, names: Iterable[str] | None = None) -> str | None:
        """The name with the highest value, or None where nobody has one."""
        rows = [(self.cells.get((n, probe, metric)), n) for n in names or self.names]
        values = [(row.value, n) for row, n in rows if row and np.isfinite(row.value)]
        return max(values, key=lambda pair: pair[0])[1] if values else None

    def against_best_floor(self, encoder: str, probe: str, metric: str) -> Difference | None:
        """The difference to the best floor of the same probe and metric."""
        floor = self.best(probe, metric, self.floors) if self.floors else None
        wanted = (encoder, floor, probe, metric)
        return next(
            (d for d in self.differences if (d.encoder, d.floor, d.probe, d.metric) == wanted), None
        )

    def lead(self, name: str, probe: str, metric: str) -> Difference | None:
        """An encoder's lead over the best floor, or the first encoder's lead over a floor."""
        if name in self.encoders:
            return self.against_best_floor(name, probe, metric)
        wanted = (self.encoders[0] if self.encoders else "", name, probe, metric)
        return next(
            (d for d in self.differences if (d.encoder, d.floor, d.probe, d.metric) == wanted), None
        )


def boards(
    rows: list[Row], *, foreground: str, classes: list[str], resamples: int, seed: int
) -> list[Board]:
    """Group rows by what was measured; add predictions and paired differences.

    Args:
        foreground: name (see `name_of`) of the encoder that comes first.
        classes: names whose colours are given by their place; names of the rows follow.
    """
    order = _unique([*classes, *(r.metric[3:] for r in rows if r.metric.startswith("f1/"))])
    colours = {name: class_colour(i) for i, name in enumerate(order)}
    names = _unique_names(rows)
    groups: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in rows:
        key = (row.benchmark, row.task, row.protocol, row.split, row.version)
        groups.setdefault(key, []).append(row)
    out = []
    for key, members in groups.items():
        label = {(r.encoder, r.encoder_hash): names[r.encoder, r.encoder_hash] for r in members}
        encoders = _unique(label[r.encoder, r.encoder_hash] for r in members if not r.is_floor)
        floors = _unique(label[r.encoder, r.encoder_hash] for r in members if r.is_floor)
        encoders.sort(key=lambda name: name != foreground)
        floors.sort(key=_floor_rank)
        probes = _unique(r.probe for r in members)
        probes.sort(key=lambda p: _PROBES.index(p) if p in _PROBES else len(_PROBES))
        here = {r.metric[3:] for r in members if r.metric.startswith("f1/")}
        cells = {(label[r.encoder, r.encoder_hash], r.probe, r.metric): r for r in members}
        mine = [name for name in order if name in here]
        board = Board(*key, encoders, floors, probes, mine, colours, cells)
        _add_predictions(board)
        _add_differences(board, resamples=resamples, seed=seed)
        out.append(board)
    return out


def name_of(rows: list[Row], encoder: str, encoder_hash: str) -> str:
    """The name under which the tables show an encoder."""
    return _unique_names(rows).get((encoder, encoder_hash), encoder)


def _unique_names(rows: list[Row]) -> dict[tuple[str, str], str]:
    """Names as written, with the start of the hash where one name stands for several encoders."""
    hashes: dict[str, set[str]] = {}
    for row in rows:
        hashes.setdefault(row.encoder, set()).add(row.encoder_hash)
    return {
        (r.encoder, r.encoder_hash): r.encoder
        if len(hashes[r.encoder]) == 1 or r.is_floor
        else f"{r.encoder} ({r.encoder_hash[:8] or 'no hash'})"
        for r in rows
    }


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _floor_rank(name: str) -> int:
    return next((i for i, start in enumerate(_FLOORS) if name.startswith(start)), len(_FLOORS))


def _add_predictions(board: Board) -> None:
    """Read the predictions beside the rows; one that does not give the row's accuracy is out."""
    for name in board.names:
        for probe in board.probes:
            row = next(
                (r for m in METRICS if (r := board.cells.get((name, probe, m))) is not None), None
            )
            path = predictions_file(row) if row else None
            if row is None or path is None or not path.is_file():
                continue
            found = read_predictions(path)
            accuracy = board.cells.get((name, probe, "accuracy"))
            differs = row.n not in (0, len(found.labels)) or (
                accuracy is not None
                and abs(accuracy.value - float((found.labels == found.predicted).mean()))
                > _SAME_ACCURACY
            )
            if differs:
                board.notes.append(
                    f"predictions/{path.name} belongs to another run than the rows of {name} "
                    f"({probe}) and was left out."
                )
            else:
                board.predictions[name, probe] = found


def _add_differences(board: Board, *, resamples: int, seed: int) -> None:
    for probe in board.probes:
        for encoder in board.encoders:
            for floor in board.floors:
                both = [board.predictions.get((n, probe)) for n in (encoder, floor)]
                drawn: dict[str, dict[str, float]] = {}
                if both[0] is not None and both[1] is not None and _paired(both[0], both[1]):
                    drawn = paired_difference(
                        both[0].predicted,
                        both[1].predicted,
                        both[0].labels,
                        both[0].patient,
                        classes=len(both[0].classes),
                        draws=resamples,
                        seed=seed,
                    )
                for metric in PAIRED:
                    pair = [board.cells.get((n, probe, metric)) for n in (encoder, floor)]
                    value = pair[0].value - pair[1].value if pair[0] and pair[1] else np.nan
                    if np.isfinite(value):
                        bounds = drawn.get(metric, {"ci_low": np.nan, "ci_high": np.nan})
                        limits = (bounds["ci_low"], bounds["ci_high"])
                        board.differences.append(
                            Difference(encoder, floor, probe, metric, float(value), *limits)
                        )


def _paired(first: Predictions, second: Predictions) -> bool:
    """Whether two predictions speak of the same nuclei in the same order."""
    return (
        first.classes == second.classes
        and np.array_equal(first.labels, second.labels)
        and np.array_equal(first.place, second.place)
        and np.array_equal(first.patient, second.patient)
    )
