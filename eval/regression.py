"""Metrics of a regression: Pearson's r of each gene inside each held-out slide.

Correlations are never taken over several slides at once: staining and depth of sequencing differ
between slides, and a model that only tells slides apart would look good. The mean goes over genes,
then over slides. What is resampled are patients, so slides of one patient are drawn together.
"""

import logging
from collections.abc import Sequence

import numpy as np

from eval.bootstrap import DRAWS, LEVEL, Interval, draw_counts
from lemon_muse.errors import RunError

log = logging.getLogger(__name__)

# A column whose spread is this small beside its mean says nothing: float32 cannot resolve it.
FLAT = 1e-6


def pearson(
    targets: np.ndarray, predicted: np.ndarray, owner: np.ndarray, slides: int
) -> np.ndarray:
    """Pearson's r of every gene inside every slide, float64 [S, G].

    Where target or prediction is constant r is not defined and counts as 0: a model that predicts
    nothing gets nothing. How often that was so is logged; `constant` says where.

    Args:
        targets, predicted: float [n, G].
        owner: int [n], the slide of each nucleus, 0 … S-1.
        slides: S.

    Raises:
        RunError: a prediction or target is not finite.
        ValueError: shapes that do not fit, or a slide without a nucleus.
    """
    values = np.zeros((slides, np.shape(targets)[1]))
    flat = 0
    for s, (a, b) in enumerate(_slides(targets, predicted, owner, slides)):
        values[s], undefined = _correlation(a, b)
        flat += int(undefined.sum())
    if flat:
        log.warning(
            "%d of %d correlations (slides x genes) have a constant target or prediction and "
            "count as 0",
            flat,
            values.size,
        )
    return values


def constant(
    targets: np.ndarray, predicted: np.ndarray, owner: np.ndarray, slides: int
) -> np.ndarray:
    """Where r is not defined, and `pearson` says 0: bool [S, G]; arguments as there."""
    parts = _slides(targets, predicted, owner, slides)
    return np.stack([_correlation(a, b)[1] for a, b in parts])


def intervals(
    values: np.ndarray,
    genes: Sequence[str],
    *,
    patient: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Interval]:
    """Mean correlations with their 95 % intervals over patients.

    Args:
        values: float [S, G], from `pearson`.
        genes: G names.
        patient: [S], any type, the patient of each slide; None = each slide is one.

    Returns:
        'pearson' (mean over genes, then slides) and 'pearson/<gene>' (mean over slides). With a
        single patient there is nothing to resample: the interval is NaN.
    """
    if len(genes) != values.shape[1]:
        raise ValueError(f"{len(genes)} names for {values.shape[1]} genes")
    columns = np.concatenate([values.mean(1, keepdims=True), values], 1)
    drawn, people = _resampled(columns, patient, draws=draws, seed=seed)
    names = ["pearson", *(f"pearson/{gene}" for gene in genes)]
    means = columns.mean(0)
    return {
        name: _interval(float(means[k]), drawn[:, k], people=people) for k, name in enumerate(names)
    }


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    seed: int = 0,
    *,
    patient: np.ndarray | None = None,
    draws: int = DRAWS,
) -> dict[str, dict[str, float]]:
    """How much better A is than B on the same slides, both scored on the same resampled patients.

    Args:
        a, b: float [S, G], from `pearson`, rows and columns in the same order.
        patient: as for `intervals`.

    Returns:
        For 'pearson': difference (A - B), ci_low, ci_high (95 %) and p, two-sided: twice the share
        of draws on the far side of 0, both counts + 1 (as `eval.bootstrap.paired_difference`).
    """
    if a.shape != b.shape:
        raise ValueError(f"two encoders on the same slides and genes, not {a.shape} and {b.shape}")
    gain = a.mean(1, keepdims=True) - b.mean(1, keepdims=True)
    drawn, people = _resampled(gain, patient, draws=draws, seed=seed)
    interval = _interval(float(gain.mean()), drawn[:, 0], people=people)
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return {
        "pearson": {
            "difference": interval.value,
            "ci_low": interval.low,
            "ci_high": interval.high,
            "p": min(1.0, 2 * (tail + 1) / (draws + 1)) if people > 1 else float("nan"),
        }
    }


def _slides(
    targets: np.ndarray, predicted: np.ndarray, owner: np.ndarray, slides: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Targets and predictions of each slide, float [n_s, G]."""
    if targets.shape != predicted.shape or len(owner) != len(targets):
        raise ValueError(
            f"targets {targets.shape}, predictions {predicted.shape} and {len(owner)} owners do "
            f"not fit"
        )
    for what, column in (("predictions", predicted), ("targets", targets)):
        bad = int((~np.isfinite(column)).sum())
        if bad:
            raise RunError(
                f"{bad} of {column.size} {what} are not finite; the features or the probe are "
                f"broken: look for NaN in the features."
            )
    counts = np.bincount(owner, minlength=slides)
    if len(counts) != slides or not counts.all():
        raise ValueError(f"nuclei of slides 0 … {slides - 1}, each with one or more: not {counts}")
    parts = np.split(np.argsort(owner, kind="stable"), np.cumsum(counts)[:-1])
    return [(targets[rows], predicted[rows]) for rows in parts]


def _correlation(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r float64 [G] of two [n, G], 0 where it is not defined; and where that is, bool [G]."""
    centred, flat = [], np.zeros(a.shape[1], bool)
    for column in (a, b):
        column = column.astype(np.float64)
        mean = column.mean(0)
        column -= mean
        spread = np.sqrt((column**2).mean(0))
        flat |= spread <= FLAT * np.abs(mean)
        centred.append(column / np.where(spread > 0, spread, 1))
    r = (centred[0] * centred[1]).mean(0)
    return np.where(flat, 0.0, r.clip(-1, 1)), flat


def _resampled(
    columns: np.ndarray, patient: np.ndarray | None, *, draws: int, seed: int
) -> tuple[np.ndarray, int]:
    """Means over the slides of drawn patients, float64 [draws, K]; and how many patients."""
    if patient is not None and len(patient) != len(columns):
        raise ValueError(f"{len(patient)} patients for {len(columns)} slides")
    names = np.arange(len(columns)) if patient is None else np.asarray(patient)
    people, owner = np.unique(names, return_inverse=True)
    weights = draw_counts(len(people), draws=draws, seed=seed)[:, owner]
    return weights @ columns / weights.sum(1, keepdims=True), len(people)


def _interval(value: float, drawn: np.ndarray, *, people: int) -> Interval:
    if people < 2:
        return Interval(value, float("nan"), float("nan"))
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
