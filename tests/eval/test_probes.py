"""Probes against plain loops and scikit-learn, and what they must not see."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from eval import probes
from eval.plans import group_folds
from eval.probes import Part, lbfgs
from eval.probes.knn import knn, knn_votes
from eval.probes.linear import linear
from eval.probes.logistic import choose_c, logistic


def blobs(
    n: int, *, classes: int = 3, dim: int = 12, people: int = 10, seed: int = 0, apart: float = 1.0
) -> Part:
    """Overlapping classes of unequal size, with an offset of each patient."""
    generator = np.random.default_rng(seed)
    share = np.arange(classes, 0, -1) / sum(range(classes + 1))
    label = generator.choice(classes, n, p=share)
    patient = generator.integers(0, people, n)
    centres = np.random.default_rng(99).normal(size=(classes, dim)) * apart
    offset = generator.normal(size=(people, dim)) * 0.3
    x = centres[label] + offset[patient] + generator.normal(size=(n, dim))
    return Part(x.astype(np.float32), label.astype(np.int64), patient + 1000 * seed)


def plain_knn(train: Part, x: np.ndarray, k: int, classes: int) -> np.ndarray:
    """Votes, one query at a time."""
    bank = [v / np.linalg.norm(v) for v in train.x.astype(np.float64)]
    out = np.zeros((len(x), classes))
    for i, query in enumerate(x.astype(np.float64)):
        unit = query / np.linalg.norm(query)
        similarity = [float(unit @ v) for v in bank]
        nearest = sorted(range(len(bank)), key=lambda j: -similarity[j])[:k]
        for j in nearest:
            out[i, train.label[j]] += np.exp(similarity[j] / 0.07)
    return out / out.sum(1, keepdims=True)


def test_knn_votes_equal_a_plain_loop() -> None:
    train, queries = blobs(150), blobs(40, seed=1)
    ks = [1, 7, 50]
    votes = knn_votes(train.x, train.label, queries.x, classes=3, ks=ks)
    for i, k in enumerate(ks):
        np.testing.assert_allclose(votes[i], plain_knn(train, queries.x, k, 3), atol=2e-5)


def test_knn_chooses_k_on_val_by_balanced_accuracy_and_the_paper_on_test() -> None:
    train, val, test = blobs(300, apart=0.6), blobs(90, seed=1), blobs(110, seed=2)
    ks = [1, 3, 10, 40, 120]

    def best(part: Part, score: object) -> int:
        values = [
            score(part.label, plain_knn(train, part.x, k, 3).argmax(1))  # type: ignore[operator]
            for k in ks
        ]
        return ks[int(np.argmax(values))]

    found = knn(train, val, test, classes=3, grid=ks)
    assert found.params == {"k": best(val, balanced_accuracy_score), "chosen_on": "val"}
    np.testing.assert_allclose(
        found.test, plain_knn(train, test.x, int(found.params["k"]), 3), atol=2e-5
    )
    paper = knn(train, val, test, classes=3, grid=ks, protocol="paper")
    assert paper.params == {
        "k": best(test, lambda a, b: float((a == b).mean())),
        "chosen_on": "test",
    }


def test_the_default_knn_never_looks_at_test_labels() -> None:
    train, val, test = blobs(200, apart=0.5), blobs(80, seed=1), blobs(80, seed=2)
    turned = Part(test.x, (test.label + 1) % 3, test.patient)
    first = knn(train, val, test, classes=3)
    second = knn(train, val, turned, classes=3)
    assert first.params == second.params
    np.testing.assert_array_equal(first.test, second.test)


def test_without_val_k_is_chosen_on_folds_of_train_patients() -> None:
    train, test = blobs(300, apart=0.5, people=12), blobs(110, seed=2)
    none = Part(train.x[:0], train.label[:0], train.patient[:0])
    ks = [1, 3, 10, 40, 120]
    found = knn(train, none, test, classes=3, grid=ks, seed=4)
    pooled: list[list[np.ndarray]] = [[] for _ in ks]
    truth = []
    for rows, held in group_folds(train.label, train.patient, folds=5, seed=4):
        bank = Part(train.x[rows], train.label[rows], train.patient[rows])
        held = np.sort(held)
        truth.append(train.label[held])
        for i, k in enumerate(ks):
            pooled[i].append(plain_knn(bank, train.x[held], k, 3).argmax(1))
    values = [balanced_accuracy_score(np.concatenate(truth), np.concatenate(p)) for p in pooled]
    assert found.params == {
        "k": ks[int(np.argmax(values))],
        "chosen_on": "5 folds of train patients",
    }
    k = int(found.params["k"])
    np.testing.assert_allclose(found.test, plain_knn(train, test.x, k, 3), atol=2e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_papers_logistic_is_scikit_learns_default(classes: int) -> None:
    train, test = blobs(400, classes=classes, apart=0.5), blobs(90, classes=classes, seed=2)
    none = Part(train.x[:0], train.label[:0], train.patient[:0])
    found = logistic(train, none, test, classes=classes, protocol="paper")
    scaler = StandardScaler().fit(train.x.astype(np.float64))
    model = LogisticRegression(tol=1e-10, max_iter=5000)
    model.fit(scaler.transform(train.x), train.label)
    expected = model.predict_proba(scaler.transform(test.x))
    np.testing.assert_allclose(found.test, expected, atol=2e-4)


def test_k_is_clipped_to_the_bank() -> None:
    train, val, test = blobs(15), blobs(20, seed=1), blobs(20, seed=2)
    found = knn(train, val, test, classes=3)
    assert found.params["k"] in (10, 15)
    assert np.isfinite(found.test).all()


def balanced(labels: np.ndarray) -> dict[int, float]:
    counts = np.bincount(labels)
    return {k: len(labels) / (len(counts) * c) for k, c in enumerate(counts)}


def loss_of(w: np.ndarray, x: np.ndarray, y: np.ndarray, c: float) -> float:
    """scikit-learn's objective divided by n, in float64; the last row of w is the intercept."""
    logits = x.astype(np.float64) @ w[:-1] + w[-1]
    top = logits.max(1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    weight = np.array([balanced(y)[k] for k in y])
    return float((weight * (lse - logits[np.arange(len(y)), y])).mean()) + float(
        (w[:-1] ** 2).sum()
    ) / (2 * c * len(y))


@pytest.mark.parametrize("correlated", [False, True])
def test_the_grid_solver_reaches_scikit_learns_optimum(correlated: bool) -> None:
    train = blobs(600, dim=20)
    x = train.x
    if correlated:
        # Nearly dependent columns: the case that a plain gradient method does not finish.
        mix = np.random.default_rng(3).normal(size=(20, 30)).astype(np.float32)
        x = np.maximum(x @ mix, 0)
    (x,) = lbfgs.standardise(x)
    weights = lbfgs.fit(x, train.label, classes=3, grid=lbfgs.GRID, tolerance=1e-6)
    for i, c in enumerate(lbfgs.GRID):
        model = LogisticRegression(C=c, class_weight="balanced", tol=1e-8, max_iter=20_000)
        model.fit(x.astype(np.float64), train.label)
        theirs = np.concatenate([model.coef_, model.intercept_[:, None]], 1).T
        ours = weights[i].double().numpy()
        assert loss_of(ours, x, train.label, c) <= loss_of(theirs, x, train.label, c) + 1e-6
        np.testing.assert_allclose(ours[:-1], theirs[:-1], atol=5e-3)
        scores = lbfgs.decide(x, weights[i][None])[0]
        assert (scores.argmax(1) == model.predict(x)).mean() > 0.995


def test_two_classes_equal_scikit_learn_at_twice_the_c() -> None:
    train = blobs(400, classes=2, apart=0.5)
    (x,) = lbfgs.standardise(train.x)
    weights = lbfgs.fit(x, train.label, classes=2, grid=[0.05], tolerance=1e-6)[0].numpy()
    model = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8, max_iter=5000)
    model.fit(x.astype(np.float64), train.label)
    np.testing.assert_allclose(weights[:-1, 1] - weights[:-1, 0], model.coef_[0], atol=2e-3)


def test_a_start_changes_nothing_but_the_time() -> None:
    train = blobs(300)
    (x,) = lbfgs.standardise(train.x)
    cold = lbfgs.fit(x, train.label, classes=3, tolerance=1e-6)
    start = torch.randn(cold.shape, generator=torch.Generator().manual_seed(0))
    warm = lbfgs.fit(x, train.label, classes=3, start=start, tolerance=1e-6)
    # A constant added to all intercepts is no difference.
    gap = (warm - cold) - (warm - cold).mean(2, keepdim=True)
    assert float(gap.abs().max()) < 5e-3


def test_choosing_c_equals_scikit_learn_on_the_same_folds() -> None:
    # Few nuclei in many dimensions: here the strength of the penalty matters.
    train = blobs(200, dim=60, apart=0.35, people=12)
    grid = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    chosen, _ = choose_c(train, classes=3, grid=grid, folds=5, seed=4)
    values = []
    folds = group_folds(train.label, train.patient, folds=5, seed=4)
    for c in grid:
        guess = np.full(len(train), -1)
        for rows, held in folds:
            scaler = StandardScaler().fit(train.x[rows].astype(np.float64))
            model = LogisticRegression(C=c, class_weight="balanced", tol=1e-8, max_iter=5000)
            model.fit(scaler.transform(train.x[rows]), train.label[rows])
            guess[held] = model.predict(scaler.transform(train.x[held]))
        values.append(balanced_accuracy_score(train.label, guess))
    # Borderline nuclei may flip between two solvers: the choice must be as good, not the same.
    assert values[grid.index(chosen)] >= max(values) - 0.003
    assert max(values) - min(values) > 0.01


def test_no_patient_is_on_both_sides_of_a_fold() -> None:
    train = blobs(300, people=9)
    folds = group_folds(train.label, train.patient, folds=5, seed=0)
    assert len(folds) == 5
    held_all = np.concatenate([held for _, held in folds])
    np.testing.assert_array_equal(np.sort(held_all), np.arange(300))
    for rows, held in folds:
        assert not set(train.patient[rows]) & set(train.patient[held])


def test_logistic_with_one_patient_says_so_and_works(caplog: pytest.LogCaptureFixture) -> None:
    train, val, test = blobs(100, people=1), blobs(30, seed=1), blobs(30, seed=2)
    found = logistic(train, val, test, classes=3)
    assert found.params["C"] == 1.0
    assert "single patient" in caplog.text
    np.testing.assert_allclose(found.test.sum(1), 1, rtol=1e-5)


def test_standardise_silences_constant_columns() -> None:
    train = np.array([[1, 1e4 + 0.1], [3, 1e4 + 0.1], [5, 1e4 + 0.1]], np.float32)
    scaled, other = lbfgs.standardise(train, np.array([[3, 7.0]], np.float32))
    np.testing.assert_allclose(scaled[:, 0], [-1.2247449, 0, 1.2247449], rtol=1e-6)
    assert (scaled[:, 1] == 0).all() and (other == 0).all()


def plain_linear(
    train: Part, val: Part, test: Part, *, epochs: int, seed: int
) -> tuple[np.ndarray, int]:
    """MUSE's probe with the gradient, momentum and schedule written out in numpy."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(3, train.x.shape[1], generator=generator) * 0.01).double().numpy()
    b, moves = np.zeros(3), [np.zeros_like(w), np.zeros(3)]
    best, out, at = -1, np.empty(0), 0
    for epoch in range(epochs):
        lr = 0.01 * (1 + np.cos(np.pi * epoch / epochs)) / 2
        order = torch.randperm(len(train), generator=generator).numpy()
        for start in range(0, len(order) - len(order) % 256, 256):
            rows = order[start : start + 256]
            logits = train.x[rows] @ w.T + b
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(256), train.label[rows]] -= 1
            moves[0] = 0.9 * moves[0] + p.T @ train.x[rows] / 256
            moves[1] = 0.9 * moves[1] + p.mean(0)
            w, b = w - lr * moves[0], b - lr * moves[1]
        right = int(((val.x @ w.T + b).argmax(1) == val.label).sum())
        if right >= best:
            best, out, at = right, test.x @ w.T + b, epoch + 1
    return out, at


def test_linear_equals_sgd_written_out() -> None:
    train, val, test = blobs(700, apart=0.4), blobs(200, seed=1), blobs(150, seed=2)
    found = linear(train, val, test, classes=3, epochs=8, seed=5)
    logits, at = plain_linear(train, val, test, epochs=8, seed=5)
    share = np.exp(logits - logits.max(1, keepdims=True))
    assert found.params["epoch"] == at
    np.testing.assert_allclose(found.test, share / share.sum(1, keepdims=True), atol=1e-4)


def patients_only(split: str, *, people: int, each: int) -> Part:
    """Features that tell the patient exactly and nothing else; classes differ between patients."""
    generator = np.random.default_rng({"train": 0, "val": 1, "test": 2}[split])
    offset = {"train": 0, "val": people, "test": 2 * people}[split]
    x, label, patient = [], [], []
    for person in range(people):
        one_hot = np.zeros((each, 3 * people))
        one_hot[:, offset + person] = 3
        x.append(one_hot + generator.normal(size=one_hot.shape) * 0.1)
        # Nearly all nuclei of a patient are of one class: easy if a patient leaks, else useless.
        own = person % 3
        label.append(np.where(generator.random(each) < 0.9, own, generator.integers(0, 3, each)))
        patient.append(np.full(each, f"{split}{person}"))
    return Part(
        np.concatenate(x).astype(np.float32), np.concatenate(label), np.concatenate(patient)
    )


@pytest.mark.parametrize("name", ["knn", "logistic", "linear"])
def test_features_of_the_patient_alone_score_at_chance(name: str) -> None:
    train, val, test = (patients_only(s, people=12, each=40) for s in ("train", "val", "test"))
    found = probes.get(name)(train, val, test, classes=3, seed=0)
    score = balanced_accuracy_score(test.label, found.test.argmax(1))
    assert abs(score - 1 / 3) < 0.12
    # The same features are worth a lot where the patient is known: the test is not vacuous.
    half = np.arange(len(train)) % 2 == 0
    inside = [Part(train.x[m], train.label[m], train.patient[m]) for m in (half, ~half)]
    leaked = probes.get(name)(inside[0], inside[1], inside[1], classes=3, seed=0)
    assert balanced_accuracy_score(inside[1].label, leaked.test.argmax(1)) > 0.8


def test_choosing_c_does_not_reward_knowing_the_patient() -> None:
    train = patients_only("train", people=12, each=40)
    folds = group_folds(train.label, train.patient, folds=5, seed=0)
    guess = np.full(len(train), -1)
    for rows, held in folds:
        x, x_held = lbfgs.standardise(train.x[rows], train.x[held])
        weights = lbfgs.fit(x, train.label[rows], classes=3, grid=[1.0])
        guess[held] = lbfgs.decide(x_held, weights)[0].argmax(1)
    assert abs(balanced_accuracy_score(train.label, guess) - 1 / 3) < 0.12
