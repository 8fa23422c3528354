"""A classification's metrics beyond one number: folds, groups of nuclei, cross-domain matrices."""

from dataclasses import dataclass

import numpy as np

from eval import bootstrap, metrics
from eval.bootstrap import Interval
from eval.plans import column
from lemon_muse.data.table import Table

# Metrics that are given for parts of the nuclei, and columns with more values than this are not.
PARTS = ("balanced_accuracy", "macro_f1", "auroc")
MOST = 20
NAN = float("nan")


@dataclass(frozen=True)
class Scored:
    """What one fold gave: its name, rows of the table int64 [n], class scores float [n, K]."""

    name: str
    rows: np.ndarray
    scores: np.ndarray

    def only(self, wanted: np.ndarray) -> "Scored":
        """Its rows where `wanted`, bool [n]."""
        return Scored(self.name, self.rows[wanted], self.scores[wanted])


def pooled(table: Table, parts: list[Scored], *, seed: int) -> dict[str, Interval]:
    """Every metric on all scored nuclei of all folds, with intervals over patients; the AUROC
    compares nuclei of one fold only, which one model has scored."""
    rows = np.concatenate([part.rows for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    return bootstrap.intervals(
        table.label[rows],
        scores.argmax(1),
        scores,
        table.patient[rows],
        classes=table.classes,
        fold=np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts]),
        seed=seed,
    )


def values_of(table: Table, parts: list[Scored]) -> dict[str, float]:
    """The metrics of `PARTS` on all scored nuclei, without intervals."""
    rows = np.concatenate([part.rows for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    labels, classes = table.label[rows], len(table.classes)
    matrix = metrics.confusion(labels, scores.argmax(1), classes=classes)
    won, counts = metrics.auroc_pairs(labels, scores, np.zeros(len(rows), int), classes=classes)
    return {
        "balanced_accuracy": float(metrics.balanced_accuracy(matrix)),
        "macro_f1": float(metrics.macro_f1(matrix)),
        "auroc": float(metrics.macro_auroc(won, counts, np.ones((1, 1)))[0]),
    }


def by_fold(table: Table, parts: list[Scored]) -> dict[str, Interval]:
    """Mean and standard deviation (n - 1) over folds: 'metric/fold_mean', 'metric/fold_sd'."""
    found = [values_of(table, [part]) for part in parts]
    out = {}
    for name in PARTS:
        values = np.array([value[name] for value in found])
        values = values[np.isfinite(values)]
        if len(values) > 1:
            out[f"{name}/fold_mean"] = Interval(float(values.mean()), NAN, NAN)
            out[f"{name}/fold_sd"] = Interval(float(values.std(ddof=1)), NAN, NAN)
    return out


def by_group(table: Table, parts: list[Scored], *, seed: int) -> dict[str, Interval]:
    """'metric/column=value' for every further column of the table with 2 to `MOST` values."""
    out: dict[str, Interval] = {}
    for by in table.groups:
        groups = column(table, by)
        names = np.unique(groups[np.concatenate([part.rows for part in parts])]).tolist()
        if not 2 <= len(names) <= MOST:
            continue
        for name in names:
            mine = [part.only(groups[part.rows] == name) for part in parts]
            found = pooled(table, mine, seed=seed)
            out |= {f"{m}/{by}={name}": found[m] for m in PARTS if m in found}
    return out


def crossed(table: Table, parts: list[Scored], *, by: str, seed: int) -> dict[str, Interval]:
    """Of folds that each train on one value of a column: 'metric/A>B' = trained on A, tested on B.

    The plain metrics are those of nuclei of another value than the trained one; 'metric/in_domain'
    those of held-out nuclei of the same.
    """
    groups = column(table, by)
    out: dict[str, Interval] = {}
    for part in parts:
        for name in np.unique(groups[part.rows]).tolist():
            found = values_of(table, [part.only(groups[part.rows] == name)])
            out |= {f"{m}/{part.name}>{name}": Interval(v, NAN, NAN) for m, v in found.items()}
    same = [part.only(groups[part.rows] == part.name) for part in parts]
    inside = pooled(table, same, seed=seed)
    out |= {f"{m}/in_domain": inside[m] for m in PARTS if m in inside}
    return {**out, **pooled(table, outside(table, parts, by=by), seed=seed)}


def outside(table: Table, parts: list[Scored], *, by: str) -> list[Scored]:
    """Of folds that each train on one value of a column: what they say of all other values."""
    groups = column(table, by)
    return [part.only(groups[part.rows] != part.name) for part in parts]
