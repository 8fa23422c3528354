"""Intervals and paired comparisons that resample PATIENTS, not nuclei.

Nuclei of one patient resemble each other, so resampling nuclei would give far too narrow intervals.
Patients are drawn with replacement; all nuclei of a drawn patient come along. A class that
is absent from a draw is left out of that draw's mean (see `eval.metrics`). With a single patient
there is nothing to resample: interval and p are NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval import metrics

DRAWS = 1000
LEVEL = 95.0


@dataclass(frozen=True)
class Interval:
    """A metric on all nuclei and its percentile interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def draw_counts(patients: int, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each patient is drawn, float64 [draws, patients]; every row sums to `patients`."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, patients, (draws, patients))
    rows = np.arange(draws)[:, None] * patients + chosen
    counts = np.bincount(rows.ravel(), minlength=draws * patients)
    return counts.reshape(draws, patients).astype(np.float64)


def intervals(
    labels: np.ndarray,
    predicted: np.ndarray,
    scores: np.ndarray | None,
    patient: np.ndarray,
    *,
    classes: tuple[str, ...],
    fold: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Interval]:
    """Every metric with its 95 % interval.

    Args:
        labels, predicted: int [n], indices into `classes`.
        scores: float [n, K], higher is likelier; None leaves the AUROC out.
        patient: [n], any type; the unit that is resampled.
        fold: int [n], which fold scored a nucleus: the AUROC compares nuclei of one fold.

    Returns:
        accuracy, balanced_accuracy, macro_f1, weighted_f1, auroc (macro one-vs-rest) and f1/<class>
        for each class that has a true nucleus.
    """
    names, owner = np.unique(patient, return_inverse=True)
    weights = draw_counts(len(names), draws=draws, seed=seed)
    weights = np.concatenate([np.ones((1, len(names))), weights])
    matrices = _resampled(labels, predicted, owner, weights, classes=len(classes))
    values = {
        "accuracy": metrics.accuracy(matrices),
        "balanced_accuracy": metrics.balanced_accuracy(matrices),
        "macro_f1": metrics.macro_f1(matrices),
        "weighted_f1": metrics.weighted_f1(matrices),
    }
    if scores is not None:
        won, counts = metrics.auroc_pairs(labels, scores, owner, classes=len(classes), fold=fold)
        values["auroc"] = metrics.macro_auroc(won, counts, weights)
    f1 = metrics.class_f1(matrices)
    for k, name in enumerate(classes):
        if not np.isnan(f1[0, k]):
            values[f"f1/{name}"] = f1[:, k]
    return {name: _interval(column, people=len(names)) for name, column in values.items()}


def paired_difference(
    pred_a: np.ndarray,
    pred_b: np.ndarray,
    labels: np.ndarray,
    patient: np.ndarray,
    *,
    classes: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How much better A is than B on the same nuclei, both scored on the same resampled patients.

    Args:
        pred_a, pred_b, labels: int [n]; patient: [n].
        classes: number of classes; the largest label + 1 when None.

    Returns:
        For balanced_accuracy and macro_f1: difference (A - B on all nuclei), ci_low, ci_high (95 %)
        and p, two-sided: twice the share of draws on the far side of 0, both counts + 1.
    """
    if classes is None:
        classes = int(max(np.max(labels), np.max(pred_a), np.max(pred_b))) + 1
    names, owner = np.unique(patient, return_inverse=True)
    weights = draw_counts(len(names), draws=draws, seed=seed)
    weights = np.concatenate([np.ones((1, len(names))), weights])
    first = _resampled(labels, pred_a, owner, weights, classes=classes)
    second = _resampled(labels, pred_b, owner, weights, classes=classes)
    scored: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "balanced_accuracy": metrics.balanced_accuracy,
        "macro_f1": metrics.macro_f1,
    }
    out = {}
    for name, metric in scored.items():
        difference = metric(first) - metric(second)
        interval = _interval(difference, people=len(names))
        drawn = difference[1:]
        tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        out[name] = {
            "difference": interval.value,
            "ci_low": interval.low,
            "ci_high": interval.high,
            "p": min(1.0, 2 * (tail + 1) / (draws + 1)) if len(names) > 1 else float("nan"),
        }
    return out


def _resampled(
    labels: np.ndarray,
    predicted: np.ndarray,
    owner: np.ndarray,
    weights: np.ndarray,
    *,
    classes: int,
) -> np.ndarray:
    """Confusions float64 [R, K, K] of weighted patients: one product instead of R passes."""
    cells = classes * classes
    pairs = owner * cells + np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    per_patient = np.bincount(pairs, minlength=weights.shape[1] * cells)
    product = weights @ per_patient.reshape(weights.shape[1], cells)
    return product.reshape(-1, classes, classes)


def _interval(column: np.ndarray, *, people: int) -> Interval:
    """Row 0 is the value on all nuclei, the rest are the draws."""
    if people < 2 or np.isnan(column[1:]).all():
        return Interval(float(column[0]), float("nan"), float("nan"))
    tail = (100 - LEVEL) / 2
    low, high = np.nanpercentile(column[1:], [tail, 100 - tail])
    return Interval(float(column[0]), float(low), float(high))
