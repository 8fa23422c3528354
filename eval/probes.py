"""The probes of frozen features: nearest neighbours, logistic regression, MUSE's linear layer.

Each takes features and labels of train, val and test and returns class scores of val and test. All
fit on train alone, so they see the same data; val serves to choose k and the epoch.
`protocol='muse'` is the published evaluation (alibaba-damo-academy/MUSE, linear_knn_eval.py), which
chooses k on the test set: its figures are optimistic and serve only for comparison.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from eval import logistic as lbfgs
from eval import metrics

log = logging.getLogger(__name__)

Protocol = Literal["default", "muse"]
TEMPERATURE = 0.07
KNN_GRID = (10, 20, 50, 100, 200)
MUSE_GRID = (10, 20, 100, 200, 500)
FOLDS = 5


@dataclass(frozen=True)
class Part:
    """One split: features float32 [n, d], labels int64 [n], patient [n] (any type)."""

    x: np.ndarray
    label: np.ndarray
    patient: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Outcome:
    """Scores float32 [n, K] of val and test (higher is likelier) and what the probe has chosen."""

    val: np.ndarray
    test: np.ndarray
    params: dict[str, float | int | str] = field(default_factory=dict)


Probe = Callable[..., Outcome]


def knn(
    train: Part,
    val: Part,
    test: Part,
    *,
    classes: int,
    protocol: Protocol = "default",
    grid: Sequence[int] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """Cosine nearest neighbours with votes exp(similarity / 0.07).

    k is chosen on val by balanced accuracy (ties: the smaller k), or with protocol='muse' on TEST
    by accuracy. Values of `grid` above the number of training nuclei count as that number. `seed`
    and `device` are not used: the search is exact.
    """
    del seed, device
    muse = protocol == "muse"
    wanted = grid or (MUSE_GRID if muse else KNN_GRID)
    ks = sorted({min(k, len(train)) for k in wanted})
    votes = {
        name: knn_votes(train.x, train.label, part.x, classes=classes, ks=ks)
        for name, part in (("val", val), ("test", test))
    }
    judge = test if muse else val
    metric = metrics.accuracy if muse else metrics.balanced_accuracy
    if len(judge):
        values = [
            float(metric(metrics.confusion(judge.label, vote.argmax(1), classes=classes)))
            for vote in votes["test" if muse else "val"]
        ]
        best = int(np.argmax(values))
    else:
        best = min(range(len(ks)), key=lambda i: abs(ks[i] - 20))
        log.warning("there is no val split to choose k on: k = %d is taken", ks[best])
    return Outcome(
        votes["val"][best],
        votes["test"][best],
        {"k": ks[best], "chosen_on": "test" if muse else "val" if len(judge) else "nothing"},
    )


def knn_votes(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, classes: int, ks: Sequence[int]
) -> np.ndarray:
    """Normalised votes float32 [len(ks), n, K]; one search with the largest k serves every k.

    Args:
        bank: float [m, d]; labels: int [m]; queries: float [n, d].
        ks: ascending, none above m.
    """
    import faiss

    out = np.zeros((len(ks), len(queries), classes), np.float32)
    if not len(queries):
        return out
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(unit_rows(bank))
    similarity, neighbour = index.search(unit_rows(queries), max(ks))
    # A factor common to all votes of a query changes nothing and keeps exp in range.
    weight = np.exp((similarity - similarity[:, :1]) / TEMPERATURE)
    near = labels[neighbour]
    for k in range(classes):
        running = np.cumsum(np.where(near == k, weight, 0), 1, dtype=np.float64)
        for i, size in enumerate(ks):
            out[i, :, k] = running[:, size - 1]
    return out / out.sum(-1, keepdims=True)


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of float [n, d] scaled to length 1, float32; a zero row stays zero."""
    x = np.ascontiguousarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def logistic(
    train: Part,
    val: Part,
    test: Part,
    *,
    classes: int,
    grid: Sequence[float] = lbfgs.GRID,
    folds: int = FOLDS,
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """Balanced L2 multinomial regression on standardised features.

    C is chosen by cross-validation inside train: folds grouped by patient and stratified by class,
    features standardised in each fold, balanced accuracy of the pooled held-out predictions (ties:
    the smaller C). The final fit is on train alone.
    """
    c, scheme = choose_c(train, classes=classes, grid=grid, folds=folds, seed=seed, device=device)
    x, x_val, x_test = lbfgs.standardise(train.x, val.x, test.x)
    weights = lbfgs.fit(x, train.label, classes=classes, grid=[c], device=device)
    scores = [_softmax(lbfgs.decide(part, weights)[0]) for part in (x_val, x_test)]
    return Outcome(scores[0], scores[1], {"C": c, "chosen_on": scheme})


def choose_c(
    train: Part, *, classes: int, grid: Sequence[float], folds: int, seed: int, device: str = "cpu"
) -> tuple[float, str]:
    """The C of `grid` with the best pooled balanced accuracy, and how it was found, in words."""
    splits = patient_folds(train.label, train.patient, folds=folds, seed=seed)
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


def patient_folds(
    labels: np.ndarray, patient: np.ndarray, *, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(fit rows, held-out rows) of each fold, disjoint by patient; [] with a single patient."""
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(folds, len(np.unique(patient)))
    if count < 2:
        return []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    # A class rarer than the number of folds only makes the stratification approximate.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pairs = list(splitter.split(labels, labels, patient))
    return [(fit_rows, held) for fit_rows, held in pairs if len(fit_rows) and len(held)]


def linear(
    train: Part,
    val: Part,
    test: Part,
    *,
    classes: int,
    epochs: int = 100,
    batch: int = 256,
    lr: float = 0.01,
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """MUSE's linear probe: a layer on raw features, SGD, best epoch by val accuracy (ties: later).

    Weights N(0, 0.01), bias 0, momentum 0.9, no weight decay, cosine to 0 over `epochs`, shuffled
    batches without the ragged last one. A train split smaller than `batch` is one batch.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, train.x.shape[1], generator=generator) * 0.01
    layer = torch.nn.Linear(train.x.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    layer.to(device)
    x, x_val, x_test = (
        torch.from_numpy(np.ascontiguousarray(part.x, np.float32)).to(device)
        for part in (train, val, test)
    )
    target = torch.from_numpy(train.label).to(device)
    val_target = torch.from_numpy(val.label).to(device)
    batch = min(batch, len(train))
    optimiser = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    best, scores, at = -1, (np.empty(0), np.empty(0)), 0
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator).to(device)
        for start in range(0, len(train) - batch + 1, batch):
            rows = order[start : start + batch]
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(layer(x[rows]), target[rows]).backward()
            optimiser.step()
        schedule.step()
        with torch.no_grad():
            guess = layer(x_val)
            right = int((guess.argmax(1) == val_target).sum())
            if right >= best:
                best, at = right, epoch + 1
                scores = (guess.cpu().numpy(), layer(x_test).cpu().numpy())
    chosen = "val" if len(val) else "nothing"
    return Outcome(_softmax(scores[0]), _softmax(scores[1]), {"epoch": at, "chosen_on": chosen})


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True)) if logits.size else logits
    return (shifted / shifted.sum(1, keepdims=True)).astype(np.float32)


PROBES: dict[str, Probe] = {"knn": knn, "logistic": logistic, "linear": linear}
