"""Intervals over patients and seeds: what another set of patients and other seeds would give.

Patients are drawn with replacement. A draw's value is the mean over seeds of the metric on the
drawn patients' nuclei, moved by what the seeds' spread makes likely. Two recipes share the patients
of a draw, and are paired by seed, so that what both find hard cancels in their difference.

How it is moved: 't' by Student's t with S - 1 degrees of freedom times the standard error over the
S seeds on these patients; 'bootstrap' by drawing seeds with replacement. Three seeds drawn with
replacement say far too little: where seeds alone vary, such 95 % intervals hold the truth in 75 %
of all cases (their tests measure it), those of t in 95 %. With one seed both are over patients
alone.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval import bootstrap, metrics

SeedsBy = Literal["t", "bootstrap"]
METRICS = {"balanced_accuracy": metrics.balanced_accuracy, "macro_f1": metrics.macro_f1}
_SEEDS = 7919  # the seeds' draws are not those of the patients


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, its 95 % interval, two-sided p of 'not zero'; NaN where not defined."""

    value: float
    low: float
    high: float
    p: float

    @property
    def excludes_zero(self) -> bool:
        return bool(self.low > 0 or self.high < 0)


def values(
    labels: np.ndarray, predicted: np.ndarray, patient: np.ndarray, *, classes: int, draws: int
) -> dict[str, np.ndarray]:
    """The metrics of one run, float64 [1 + draws]: on all nuclei, then on drawn patients.

    Args:
        labels, predicted: int [n]; patient: [n]. The draws depend on the patients' names alone.

    Returns:
        By name of the metric; NaN in every draw where there is a single patient.
    """
    names, owner = np.unique(patient, return_inverse=True)
    weights = bootstrap.draw_counts(len(names), draws=draws)
    cells = owner * classes**2 + labels * classes + predicted
    counts = np.bincount(cells, minlength=len(names) * classes**2).reshape(len(names), -1)
    confusions = np.concatenate([counts.sum(0)[None], weights @ counts])
    confusions = confusions.reshape(-1, classes, classes)
    found = {name: metric(confusions) for name, metric in METRICS.items()}
    if len(names) < 2:
        for column in found.values():
            column[1:] = np.nan
    return found


def estimate(runs: np.ndarray, seeds_by: SeedsBy = "t") -> Estimate:
    """Mean and interval of a metric, or of a difference of two.

    Args:
        runs: float64 [S, 1 + draws], a row a seed, from `values`.
        seeds_by: how the seeds' part is drawn.
    """
    value = float(runs[:, 0].mean())
    mean = runs[:, 1:].mean(0)
    if np.isnan(mean).all():
        return Estimate(value, np.nan, np.nan, np.nan)
    drawn = mean if len(runs) == 1 else mean + _moved(runs[:, 1:], seeds_by)
    drawn = drawn[~np.isnan(drawn)]
    tail = (100 - bootstrap.LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))
    return Estimate(value, float(low), float(high), p)


def _moved(runs: np.ndarray, seeds_by: SeedsBy) -> np.ndarray:
    """How far other seeds may lie from the mean of these, float64 [draws], for each draw."""
    seeds, draws = runs.shape
    rng = np.random.default_rng(_SEEDS)
    if seeds_by == "t":
        error = runs.std(0, ddof=1) / np.sqrt(seeds)
        return np.asarray(rng.standard_t(seeds - 1, draws) * error)
    picked = rng.integers(0, seeds, (draws, seeds))
    return np.asarray(runs[picked, np.arange(draws)[:, None]].mean(1) - runs.mean(0))
