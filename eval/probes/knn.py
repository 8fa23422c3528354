"""Cosine nearest neighbours, one exact search for every k."""

import logging
from collections.abc import Sequence

import numpy as np

from eval import metrics
from eval.plans import group_folds
from eval.probes import Outcome, Part, Protocol

log = logging.getLogger(__name__)

TEMPERATURE = 0.07
GRID = (10, 20, 50, 100, 200)
MUSE_GRID = (10, 20, 100, 200, 500)
INNER = 5
# Without a val split k is chosen on at most so many train nuclei: the search costs their number.
INNER_QUERIES = 10_000


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

    k is chosen on val by balanced accuracy (ties: the smaller k); without val on folds of train,
    grouped by patient; with protocol='paper' on TEST by accuracy, as MUSE does. Values of `grid`
    above the number of training nuclei count as that number. `device` is not used: the search is
    exact.
    """
    del device
    paper = protocol == "paper"
    wanted = grid or (MUSE_GRID if paper else GRID)
    ks = sorted({min(k, len(train)) for k in wanted})
    votes = {
        name: knn_votes(train.x, train.label, part.x, classes=classes, ks=ks)
        for name, part in (("val", val), ("test", test))
    }
    if paper:
        found = [metrics.confusion(test.label, v.argmax(1), classes=classes) for v in votes["test"]]
        best, where = int(np.argmax([metrics.accuracy(m) for m in found])), "test"
    elif len(val):
        found = [metrics.confusion(val.label, v.argmax(1), classes=classes) for v in votes["val"]]
        best, where = int(np.argmax([metrics.balanced_accuracy(m) for m in found])), "val"
    else:
        best, where = choose_k(train, classes=classes, ks=ks, seed=seed)
    return Outcome(votes["val"][best], votes["test"][best], {"k": ks[best], "chosen_on": where})


def choose_k(train: Part, *, classes: int, ks: Sequence[int], seed: int) -> tuple[int, str]:
    """Place in `ks` with the best pooled balanced accuracy on held-out train patients, and how."""
    splits = group_folds(train.label, train.patient, folds=INNER, seed=seed)
    if not splits:
        best = min(range(len(ks)), key=lambda i: abs(ks[i] - 20))
        log.warning("train has a single patient: nothing to choose k on, k = %d is taken", ks[best])
        return best, "nothing"
    generator = np.random.default_rng(seed)
    pooled = np.zeros((len(ks), classes, classes), np.int64)
    for fit_rows, held in splits:
        held = np.sort(generator.permutation(held)[: INNER_QUERIES // len(splits)])
        sizes = [min(k, len(fit_rows)) for k in ks]
        label = train.label[fit_rows]
        votes = knn_votes(train.x[fit_rows], label, train.x[held], classes=classes, ks=sizes)
        for i, vote in enumerate(votes):
            pooled[i] += metrics.confusion(train.label[held], vote.argmax(1), classes=classes)
    best = int(np.argmax(metrics.balanced_accuracy(pooled)))
    return best, f"{len(splits)} folds of train patients"


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
    # Without an index: it would hold a second copy of the bank.
    similarity, neighbour = faiss.knn(
        unit_rows(queries), unit_rows(bank), max(ks), metric=faiss.METRIC_INNER_PRODUCT
    )
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
    # numpy's norm writes the squares of all values first: five times the time and memory.
    length = np.sqrt(np.einsum("nd,nd->n", x, x))
    return x / np.maximum(length, 1e-12)[:, None]
