"""Probes on generated features, each against how it is usually done; one thread, CPU time.

Features have 384 columns, 12 unequal classes that overlap (a linear fit gets about 0.85 of the
train rows right) and, for ridge, 20 slides of unequal size and 50 genes that the features explain
partly. Eigenvalues of their correlations fall as i^-1.5; those of small encoders on BRCA-M2C were
seen to fall as i^-1.2 to i^-2.5. The steeper, the longer scikit-learn's logistic regression takes,
so that one is run on i^-1 too. Candidates take turns in one process; each figure is the median of
its turns. Peers are written here from what they do: MUSE's KNN (one pass over the bank for each k,
similarities of a chunk of queries by one product, top-k of them) and plain scikit-learn loops.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from eval.plans import Fold
from eval.probes import lbfgs, moments
from eval.probes.knn import MUSE_GRID, TEMPERATURE, knn_votes
from eval.probes.ridge import GRID, ridge, shared_banks

DIM, CLASSES = 384, 12
BANK, ALL_QUERIES = 500_000, 50_000
QUERIES, MORE = 500, 1500  # MUSE's chunk is 1/100 of all queries
ROWS, CS = 40_000, lbfgs.GRID[:10]
NUCLEI, SLIDES, GENES = 100_000, 20, 50
ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # for each train row
TURNS = 3


def run() -> list[dict]:
    import faiss
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        with threadpool_limits(1):
            return [*_knn(), *_logistic(1.5), *_logistic(1.0), *_ridge()]
    finally:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(threads)


def features(n: int, *, seed: int = 0, decay: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [n, 384] and classes int64 [n]; the seed draws rows, not the classes."""
    fixed = np.random.default_rng(99)
    spectrum = (np.arange(DIM) + 1.0) ** (-decay / 2)
    centres = fixed.normal(size=(CLASSES, DIM)) * spectrum * 0.137
    mix = np.linalg.qr(fixed.normal(size=(DIM, DIM)))[0].astype(np.float32)
    share = np.geomspace(1, 0.05, CLASSES)
    rng = np.random.default_rng(seed)
    label = rng.choice(CLASSES, n, p=share / share.sum())
    x = np.empty((n, DIM), np.float32)
    for start in range(0, n, 50_000):
        here = label[start : start + 50_000]
        z = rng.standard_normal((len(here), DIM), np.float32) * spectrum.astype(np.float32)
        x[start : start + 50_000] = (z + centres[here].astype(np.float32)) @ mix + 0.1
    return x, label


def _turns(*jobs: Callable[[], Any]) -> tuple[list[float], list[Any]]:
    """Median CPU seconds of each job, taking turns, and what each returned last."""
    times: list[list[float]] = [[] for _ in jobs]
    found: list[Any] = [None] * len(jobs)
    for _ in range(TURNS):
        for i, job in enumerate(jobs):
            began = time.process_time()
            found[i] = job()
            times[i].append(time.process_time() - began)
    return [statistics.median(t) for t in times], found


def _knn() -> list[dict]:
    bank, labels = features(BANK)
    queries, truth = features(MORE, seed=1)
    norm_bank, norm_queries = (
        torch.nn.functional.normalize(torch.from_numpy(x), dim=1) for x in (bank, queries[:QUERIES])
    )
    target = torch.from_numpy(labels)

    def chunk(k: int) -> torch.Tensor:
        similarity, near = torch.mm(norm_queries, norm_bank.T).topk(k, dim=1)
        votes = torch.zeros(QUERIES, CLASSES)
        return votes.scatter_add_(1, target[near], (similarity / TEMPERATURE).exp())

    def search(count: int) -> np.ndarray:
        ks = sorted(MUSE_GRID)
        return knn_votes(bank, labels, queries[:count], classes=CLASSES, ks=ks)

    (grid, one, some, more), (theirs, _, ours, _) = _turns(
        lambda: [chunk(k) for k in sorted(MUSE_GRID)],
        lambda: chunk(20),
        lambda: search(QUERIES),
        lambda: search(MORE),
    )
    for a, b in zip(theirs, ours, strict=True):
        agree = float((a.numpy().argmax(1) == b.argmax(1)).mean())
        assert agree > 0.99, agree
    each = (more - some) / (MORE - QUERIES)
    right = float((ours[1].argmax(1) == truth[:QUERIES]).mean())
    peer, rate = "MUSE-style torch.mm + topk, one pass a k", QUERIES / grid
    shape = f"bank of {BANK:,} x {DIM}, accuracy {right:.2f}"
    minutes = (some + (ALL_QUERIES - QUERIES) * each) / 60
    theirs_minutes = grid * ALL_QUERIES / QUERIES / 60
    return [
        _row("knn, five k: one search", 1 / each, 1 / each / rate, peer, "queries/s", shape),
        _row("knn, k = 20 alone: MUSE-style", QUERIES / one, QUERIES / one / rate, peer,
             "queries/s", shape),
        _row(f"knn, five k, {ALL_QUERIES:,} queries, extrapolated from {MORE:,}", minutes,
             theirs_minutes / minutes, peer, "minutes", shape),
    ]  # fmt: skip


def _logistic(decay: float) -> list[dict]:
    from sklearn.linear_model import LogisticRegression

    raw, labels = features(ROWS, decay=decay)
    (x,) = lbfgs.standardise(raw)

    def loop() -> list[np.ndarray]:
        out = []
        for c in CS:
            model = LogisticRegression(C=c, class_weight="balanced", max_iter=5000)
            model.fit(x, labels)
            out.append(np.concatenate([model.coef_, model.intercept_[:, None]], 1).T)
        return out

    def path() -> list[np.ndarray]:
        return list(lbfgs.fit(x, labels, classes=CLASSES, grid=CS).numpy())

    (theirs, ours), (their_w, our_w) = _turns(loop, path)
    excess = []
    for c, a, b in zip(CS, their_w, our_w, strict=True):
        excess.append(_loss(b, x, labels, c) - _loss(a, x, labels, c))
    right = float(((x @ our_w[-1][:-1] + our_w[-1][-1]).argmax(1) == labels).mean())
    peer, shape = "scikit-learn lbfgs, C by C", f"{ROWS:,} x {DIM}, train accuracy {right:.2f}"
    what = f"logistic, ten C, spectrum i^-{decay:g}"
    return [
        _row(f"{what}: one batched solve", ours, theirs / ours, peer, "s", shape),
        _row(f"{what}: objective minus theirs, largest", max(excess), None, peer,
             "nats", shape),
    ]  # fmt: skip


def _loss(w: np.ndarray, x: np.ndarray, labels: np.ndarray, c: float) -> float:
    """scikit-learn's objective for balanced classes, divided by the rows, in float64."""
    logits = x.astype(np.float64) @ w[:-1] + w[-1]
    top = logits.max(1)
    cost = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(x)), labels]
    counts = np.bincount(labels, minlength=CLASSES)
    weight = len(x) / (CLASSES * counts[labels])
    penalty = (w[:-1].astype(np.float64) ** 2).sum() / (2 * c * len(x))
    return float((weight * cost).mean() + penalty)


def _ridge() -> list[dict]:
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    x, _ = features(NUCLEI)
    rng = np.random.default_rng(5)
    slide = rng.choice(SLIDES, NUCLEI, p=rng.dirichlet(np.full(SLIDES, 4)))
    x += (rng.normal(size=(SLIDES, DIM)) * x.std(0) * 0.2)[slide].astype(np.float32)
    y = ((x - x.mean(0)) / x.std(0)) @ rng.normal(size=(DIM, GENES)) / np.sqrt(DIM)
    y = (y + rng.normal(size=y.shape) * 3).astype(np.float32)
    none = np.empty(0, np.int64)
    folds = [
        Fold(str(s), np.flatnonzero(slide != s), none, np.flatnonzero(slide == s))
        for s in range(SLIDES)
    ]

    def loop(kind: type, only: list[Fold]) -> list[np.ndarray]:
        out = []
        for fold in only:
            scaler = StandardScaler().fit(x[fold.train].astype(kind))
            train, test = (scaler.transform(x[r].astype(kind)) for r in (fold.train, fold.test))
            for alpha in ALPHAS:
                model = Ridge(alpha=alpha * len(train)).fit(train, y[fold.train].astype(kind))
                out.append(model.predict(test))
        return out

    def path() -> list[np.ndarray]:
        out: list[np.ndarray] = []
        for which, rows, masks in shared_banks(slide, folds):
            bank = moments.gather(x, y, rows)
            for number, mask in zip(which, masks, strict=True):
                train = bank.pool(mask)
                fits = moments.solve(train, np.array(ALPHAS) * train.n)
                out.extend(fits.predict(x[folds[number].test]))
        return out

    (theirs, ours, chosen), (_, found, _) = _turns(
        lambda: loop(np.float32, folds), path, lambda: ridge(x, y, slide, folds)
    )
    exact = loop(np.float64, folds[:1])
    gap = max(float(np.abs(a - b).max() / b.std()) for a, b in zip(found, exact, strict=False))
    peer = "scikit-learn, fold by fold and alpha by alpha"
    shape = f"{NUCLEI:,} x {DIM} to {GENES} genes, {SLIDES} slides"
    inner = f"ridge, alpha of {len(GRID)} chosen on inner folds, all included"
    nested = theirs * (SLIDES - 1) * len(GRID) / len(ALPHAS)
    return [
        _row("ridge, five alphas, leave one slide out", ours, theirs / ours, peer, "s", shape),
        _row("ridge: largest difference to float64, one fold", gap, None, peer, "std", shape),
        _row(inner, chosen, nested / chosen, f"{peer}, inner folds worked out", "s", shape),
    ]


def _row(
    what: str, ours: float, ratio: float | None, peer: str, unit: str, data: str
) -> dict[str, Any]:
    about = {"name": "probes", "peer": peer, "cores": 1, "device": "cpu", "data": data}
    return {**about, "what": what, "ours": ours, "unit": unit, "ratio": ratio}
