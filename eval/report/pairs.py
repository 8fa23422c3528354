"""Encoders against floors on the same nuclei: predictions beside the rows, paired differences."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.report.inputs import (
    Pearsons,
    Predictions,
    Row,
    predictions_file,
    read_pearsons,
    read_predictions,
)

if TYPE_CHECKING:
    from eval.report.tables import Board

PAIRED = ("balanced_accuracy", "macro_f1", "pearson")
# A predictions file belongs to a row only if it gives the row's value; rows may be rounded.
_SAME_VALUE = 1e-4
_NOWHERE = {"ci_low": np.nan, "ci_high": np.nan}


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


def add_predictions(board: "Board") -> None:
    """Read what lies beside the rows; a file that does not give the row's value is left out.

    Where an encoder is trained on one domain and tested on others, the rows speak of a part of the
    nuclei that the files do not tell: there is nothing to pair.
    """
    if " cross:" in board.task:
        return
    for name in board.names:
        for probe in board.probes:
            rows = {m: board.cells[name, probe, m] for m in (*PAIRED, "accuracy")
                    if (name, probe, m) in board.cells}  # fmt: skip
            if not rows:
                continue
            path = predictions_file(next(iter(rows.values())))
            if not path.is_file():
                continue
            if _fits(board, name, probe, rows, path):
                continue
            board.notes.append(
                f"predictions/{path.name} belongs to another run than the rows of {name} "
                f"({probe}) and was left out."
            )


def _fits(board: "Board", name: str, probe: str, rows: dict[str, Row], path: Path) -> bool:
    """Whether the file is that of the rows; it then stands on the board."""
    if "pearson" in rows:
        values = read_pearsons(path)
        if not abs(rows["pearson"].value - float(values.values.mean())) <= _SAME_VALUE:
            return False
        board.pearsons[name, probe] = values
        return True
    found = read_predictions(path)
    if next(iter(rows.values())).n not in (0, len(found.labels)):
        return False
    if "accuracy" in rows:
        accuracy = float((found.labels == found.predicted).mean())
        if not abs(rows["accuracy"].value - accuracy) <= _SAME_VALUE:
            return False
    board.predictions[name, probe] = found
    return True


def add_differences(board: "Board", *, resamples: int, seed: int) -> None:
    """The first encoder against every floor, the others against the best ones only."""
    for probe in board.probes:
        best = {board.best(probe, m, board.floors) for m in PAIRED}
        for encoder in board.encoders:
            first = encoder == board.encoders[0]
            for floor in board.floors if first else [f for f in board.floors if f in best]:
                drawn = _drawn(board, encoder, floor, probe, resamples=resamples, seed=seed)
                for metric in PAIRED:
                    pair = [board.cells.get((n, probe, metric)) for n in (encoder, floor)]
                    value = pair[0].value - pair[1].value if pair[0] and pair[1] else np.nan
                    if np.isfinite(value):
                        bounds = drawn.get(metric, _NOWHERE)
                        limits = (bounds["ci_low"], bounds["ci_high"])
                        board.differences.append(
                            Difference(encoder, floor, probe, metric, float(value), *limits)
                        )


def _drawn(
    board: "Board", encoder: str, floor: str, probe: str, *, resamples: int, seed: int
) -> dict[str, dict[str, float]]:
    """Intervals of the differences where both have been scored on the same nuclei, else {}."""
    mine, other = (board.predictions.get((n, probe)) for n in (encoder, floor))
    if mine is not None and other is not None and _paired(mine, other):
        from eval.bootstrap import paired_difference

        return paired_difference(
            mine.predicted,
            other.predicted,
            mine.labels,
            mine.patient,
            classes=len(mine.classes),
            draws=resamples,
            seed=seed,
        )
    both = [board.pearsons.get((n, probe)) for n in (encoder, floor)]
    if both[0] is not None and both[1] is not None and _same_slides(both[0], both[1]):
        from eval import regression

        return regression.paired_difference(
            both[0].values, both[1].values, seed, patient=both[0].patient, draws=resamples
        )
    return {}


def _paired(first: Predictions, second: Predictions) -> bool:
    """Whether two predictions speak of the same nuclei in the same order."""
    return (
        first.classes == second.classes
        and np.array_equal(first.labels, second.labels)
        and np.array_equal(first.place, second.place)
        and np.array_equal(first.patient, second.patient)
    )


def _same_slides(first: Pearsons, second: Pearsons) -> bool:
    """Whether two regressions speak of the same slides and genes in the same order."""
    return first.genes == second.genes and np.array_equal(first.slides, second.slides)
