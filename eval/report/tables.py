"""From result rows to the numbers of the page: encoders beside floors, best values, differences."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from eval.report.inputs import Pearsons, Predictions, Row
from eval.report.pairs import PAIRED, Difference, add_differences, add_predictions
from eval.report.style import class_colour
from eval.report.words import encoder_words

METRICS = ("balanced_accuracy", "macro_f1", "accuracy", "auroc", "pearson")
_PROBES = ("knn", "logistic", "linear", "ridge", "uni", "finetune")
_FLOORS = ("random:", "floor:histogram", "floor:pixel_pca", "floor:colour", "floor:majority")


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
    pearsons: dict[tuple[str, str], Pearsons] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_regression(self) -> bool:
        """Whether it holds correlations and no class metric."""
        return {"pearson"} == set(self.metrics())

    @property
    def headline_metric(self) -> str:
        """The metric that verdicts speak of."""
        return next((m for m in PAIRED if m in self.metrics()), PAIRED[0])

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
    names = unique_names(rows)
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
        add_predictions(board)
        add_differences(board, resamples=resamples, seed=seed)
        out.append(board)
    return out


def name_of(rows: list[Row], encoder: str, encoder_hash: str) -> str:
    """The name under which the tables show an encoder."""
    return unique_names(rows).get((encoder, encoder_hash), encoder)


def unique_names(rows: list[Row]) -> dict[tuple[str, str], str]:
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
