"""Multinomial logistic regression on standardised features, C chosen inside train."""

import logging
from collections.abc import Sequence

import numpy as np

from eval import metrics
from eval.plans import FOLDS, group_folds
from eval.probes import Outcome, Part, Protocol, lbfgs, softmax

log = logging.getLogger(__name__)


def logistic(
    train: Part,
    val: Part,
    test: Part,
    *,
    classes: int,
    grid: Sequence[float] = lbfgs.GRID,
    folds: int = FOLDS,
    protocol: Protocol = "default",
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """Balanced L2 multinomial regression on standardised features.

    C is chosen by cross-validation inside train: folds grouped by patient and stratified by class,
    features standardised in each fold, balanced accuracy of the pooled held-out predictions (ties:
    the smaller C). The final fit is on train alone.

    protocol='paper': LEMON says 'logistic regression' and no more, so scikit-learn's defaults are
    taken for what it leaves open: C = 1, classes not weighted.
    """
    if protocol == "paper":
        c, scheme = 1.0, "nothing"
    else:
        c, scheme = choose_c(
            train, classes=classes, grid=grid, folds=folds, seed=seed, device=device
        )
    x, x_val, x_test = lbfgs.standardise(train.x, val.x, test.x)
    weights = lbfgs.fit(
        x,
        train.label,
        classes=classes,
        # Of two classes scikit-learn penalises one weight vector, the softmax here two: C / 2 here
        # is its C.
        grid=[c / (2 if protocol == "paper" and classes == 2 else 1)],
        balanced=protocol == "default",
        device=device,
    )
    scores = [softmax(lbfgs.decide(part, weights)[0]) for part in (x_val, x_test)]
    return Outcome(scores[0], scores[1], {"C": c, "chosen_on": scheme})


def choose_c(
    train: Part, *, classes: int, grid: Sequence[float], folds: int, seed: int, device: str = "cpu"
) -> tuple[float, str]:
    """The C of `grid` with the best pooled balanced accuracy, and how it was found, in words."""
    splits = group_folds(train.label, train.patient, folds=folds, seed=seed)
    if not splits:
        c = min(grid, key=lambda value: abs(np.log(value)))
        log.warning("train has a single patient: no folds to choose C on, C = %g is taken", c)
        return c, "nothing"
    pooled = np.zeros((len(grid), classes, classes), np.int64)
    start = None
    for fit_rows, held in splits:
        x, x_held = lbfgs.standardise(train.x[fit_rows], train.x[held])
        # The optimum is unique: starting from the last fold's only saves time.
        start = lbfgs.fit(
            x, train.label[fit_rows], classes=classes, grid=grid, start=start, device=device
        )
        for i, logits in enumerate(lbfgs.decide(x_held, start)):
            pooled[i] += metrics.confusion(train.label[held], logits.argmax(1), classes=classes)
    best = int(np.argmax(metrics.balanced_accuracy(pooled)))
    return float(grid[best]), f"{len(splits)} folds of train patients"
