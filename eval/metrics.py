"""Metrics of a classification, from confusion matrices so that thousands of resamples are cheap.

Every function takes confusions with any number of leading axes: [..., K, K], row = truth.
A class without a true nucleus has no recall and no F1: it is left out of the mean of that matrix.
scikit-learn counts a class that is only predicted as F1 = 0; with every class present both agree.
"""

import numpy as np

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")


def confusion(labels: np.ndarray, predicted: np.ndarray, *, classes: int) -> np.ndarray:
    """Counts int64 [K, K] of (true, predicted) for int labels [n] in 0 … K-1."""
    pairs = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def accuracy(matrix: np.ndarray) -> np.ndarray:
    """Share of correct nuclei, [...]; NaN without nuclei."""
    return _divide(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum((-2, -1)))


def balanced_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that have true nuclei, [...]."""
    return _mean_present(np.diagonal(matrix, axis1=-2, axis2=-1), matrix)


def class_f1(matrix: np.ndarray) -> np.ndarray:
    """F1 of each class, [..., K]; NaN where a class has no true nucleus."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    truth, guess = matrix.sum(-1), matrix.sum(-2)
    return np.where(truth > 0, _divide(2 * hits, truth + guess), np.nan)


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that have true nuclei, [...]."""
    f1 = class_f1(matrix)
    return _divide(np.nansum(f1, -1), (~np.isnan(f1)).sum(-1))


def weighted_f1(matrix: np.ndarray) -> np.ndarray:
    """Mean F1 over classes, weighted by their true nuclei, [...]."""
    truth = matrix.sum(-1)
    return _divide((np.nan_to_num(class_f1(matrix)) * truth).sum(-1), truth.sum(-1))


def auroc_pairs(
    labels: np.ndarray,
    scores: np.ndarray,
    patient: np.ndarray,
    *,
    classes: int,
    fold: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Won comparisons between patients, from which the AUROC of any resample follows exactly.

    Args:
        labels: int [n]; scores: float [n, K]; patient: int [n], 0 … P-1.
        fold: int [n], 0 … F-1; None = one. Scores of different folds are of different models and
            are not compared: the shares of classes in train, for one, would order them wrongly.

    Returns:
        won: float64 [K, P, P]; won[k, p, q] counts the pairs of a nucleus of class k of patient p
            and a nucleus of another class of patient q that the score of k orders rightly (1/2 for
            a tie), both of the same fold.
        counts: float64 [K, F, P, 2]; nuclei of class k, and of the other classes, of each patient.

    With weights c [P] the one-vs-rest AUROC of class k is c·won[k]·c / Σ_f (c·pos_f)(c·neg_f).
    """
    people = int(patient.max()) + 1 if len(patient) else 0
    fold = np.zeros(len(labels), np.int64) if fold is None else fold
    folds = int(fold.max()) + 1 if len(fold) else 0
    won = np.zeros((classes, people, people))
    counts = np.zeros((classes, folds, people, 2))
    for f in range(folds):
        here = np.flatnonzero(fold == f)
        for k in range(classes):
            positive = labels[here] == k
            yes, no = here[positive], here[~positive]
            counts[k, f, :, 0] = np.bincount(patient[yes], minlength=people)
            counts[k, f, :, 1] = np.bincount(patient[no], minlength=people)
            won[k] += _won(scores[yes, k], patient[yes], scores[no, k], patient[no], people=people)
    return won, counts


def _won(
    mine: np.ndarray, owner: np.ndarray, others: np.ndarray, theirs: np.ndarray, *, people: int
) -> np.ndarray:
    """Pairs of `mine` above `others`, a tie 1/2, by the patients of both: float64 [P, P]."""
    out = np.zeros((people, people))
    order = np.lexsort((others, theirs))
    groups = np.split(others[order], np.cumsum(np.bincount(theirs, minlength=people))[:-1])
    for q, values in enumerate(groups):
        if not len(values):
            continue
        below = np.searchsorted(values, mine, "left") + np.searchsorted(values, mine, "right")
        out[:, q] = np.bincount(owner, weights=below / 2, minlength=people)
    return out


def macro_auroc(won: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean one-vs-rest AUROC [R] for patient weights [R, P]; classes with one side drop out."""
    values = []
    for k in range(len(won)):
        wins = np.einsum("rp,rp->r", weights @ won[k], weights)
        positive, negative = (weights @ counts[k, :, :, side].T for side in (0, 1))
        values.append(_divide(wins, (positive * negative).sum(1)))
    stacked = np.stack(values, -1)
    return _divide(np.nansum(stacked, -1), (~np.isnan(stacked)).sum(-1))


def _mean_present(hits: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    truth = matrix.sum(-1)
    present = truth > 0
    recall = np.where(present, _divide(hits, truth), 0.0)
    return _divide(recall.sum(-1), present.sum(-1))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0)
