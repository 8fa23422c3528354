"""UNI's probe against its formula, written in numpy and minimised by scipy."""

import logging

import numpy as np
import pytest
from scipy.optimize import minimize

from eval import probes
from eval.probes import Part
from eval.probes.uni import fit, uni


def overlapping(
    n: int, *, classes: int, dim: int, seed: int = 0, scale: float = 1.0, apart: float = 0.15
) -> Part:
    """Gaussian classes of unequal size, columns correlated and of unequal scale, an offset."""
    fixed = np.random.default_rng(7)
    centres = fixed.normal(size=(classes, dim)) * apart
    mix = np.linalg.qr(fixed.normal(size=(dim, dim)))[0] * np.geomspace(2, 0.2, dim)
    generator = np.random.default_rng(seed)
    share = np.arange(classes, 0, -1) / sum(range(classes + 1))
    label = generator.choice(classes, n, p=share)
    x = ((centres[label] + generator.normal(size=(n, dim))) @ mix.T + 0.5) * scale
    return Part(x.astype(np.float32), label.astype(np.int64), generator.integers(0, 9, n))


def objective(
    flat: np.ndarray, x: np.ndarray, y: np.ndarray, classes: int
) -> tuple[float, np.ndarray]:
    """Mean cross-entropy + 0.5 / C · ||W||, C = d · K / 100, and its gradient, float64."""
    n, d = x.shape
    w, b = flat[:-classes].reshape(classes, d), flat[-classes:]
    logits = x @ w.T + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    norm, force = np.linalg.norm(w), 0.5 / (d * classes / 100)
    value = -np.log(p[np.arange(n), y]).mean() + force * norm
    p[np.arange(n), y] -= 1
    slope = p.T @ x / n + (force * w / norm if norm else 0)
    return value, np.concatenate([slope.ravel(), p.mean(0)])


def best_of_scipy(x: np.ndarray, y: np.ndarray, classes: int) -> tuple[float, np.ndarray]:
    # A start beside W = 0, where the formula has no gradient.
    start = np.random.default_rng(1).normal(size=classes * (x.shape[1] + 1)) * 0.01
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9}
    given = (x.astype(np.float64), y, classes)
    found = minimize(objective, start, given, jac=True, method="L-BFGS-B", options=options)
    return float(found.fun), found.x


@pytest.mark.parametrize(("classes", "dim"), [(2, 200), (4, 120)])
def test_the_minimum_is_the_one_that_scipy_finds(classes: int, dim: int) -> None:
    train = overlapping(900, classes=classes, dim=dim)
    test = overlapping(300, classes=classes, dim=dim, seed=1)
    weight, bias, _ = fit(train.x, train.label)
    ours = np.concatenate([weight.double().numpy().ravel(), bias.double().numpy()])
    value = objective(ours, train.x.astype(np.float64), train.label, classes)[0]
    least, flat = best_of_scipy(train.x, train.label, classes)
    assert abs(value - least) < 1e-5
    # Not vacuous: the start is far from the minimum, and so is that of the squared norm.
    assert objective(np.zeros_like(flat), train.x, train.label, classes)[0] > least + 0.05
    found = uni(train, train, test, classes=classes)
    logits = test.x @ flat[:-classes].reshape(classes, dim).T + flat[-classes:]
    share = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(found.test, share / share.sum(1, keepdims=True), atol=4e-3)
    assert found.val.shape == (900, classes)
    assert found.params["C"] == pytest.approx(dim * classes / 100)
    assert 5 < int(found.params["iterations"]) < 1000


def test_a_class_without_train_nuclei_is_left_out_of_the_formula() -> None:
    two = overlapping(400, classes=2, dim=100)
    apart = Part(two.x, two.label * 2, two.patient)
    plain, gap = uni(two, two, two, classes=2), uni(apart, apart, apart, classes=4)
    assert gap.params == plain.params
    np.testing.assert_array_equal(gap.test[:, [0, 2]], plain.test)
    assert not gap.test[:, [1, 3]].any()


@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_a_penalty_that_is_too_strong_leaves_the_class_shares(
    scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    train = overlapping(500, classes=3, dim=6, scale=scale, apart=0.5)
    with caplog.at_level(logging.WARNING):
        found = uni(train, train, train, classes=3)
    assert "all weights at 0" in caplog.text
    share = np.bincount(train.label) / 500
    np.testing.assert_allclose(found.test, np.tile(share, (500, 1)), rtol=1e-5)
    zero = np.concatenate([np.zeros(18), np.log(share)])
    value = objective(zero, train.x.astype(np.float64), train.label, 3)[0]
    assert value <= best_of_scipy(train.x, train.label, 3)[0] + 1e-7


def test_it_converges_where_the_penalty_is_nearly_too_strong() -> None:
    # The classes pull W away from 0 by 3 % more than the norm holds it.
    train = overlapping(500, classes=3, dim=20, scale=0.6, apart=0.8)
    weight, bias, _ = fit(train.x, train.label)
    ours = np.concatenate([weight.double().numpy().ravel(), bias.double().numpy()])
    value = objective(ours, train.x.astype(np.float64), train.label, 3)[0]
    assert 0 < float(weight.norm()) < 0.2
    assert abs(value - best_of_scipy(train.x, train.label, 3)[0]) < 1e-5


def test_it_is_in_the_table_and_reads_no_label_of_val_or_test() -> None:
    train, other = (overlapping(300, classes=2, dim=100, seed=s) for s in (0, 1))
    turned = Part(other.x, 1 - other.label, other.patient)
    first = probes.get("uni")(train, other, other, classes=2, protocol="paper", seed=1)
    second = probes.get("uni")(train, turned, turned, classes=2)
    np.testing.assert_array_equal(first.test, second.test)
    np.testing.assert_array_equal(first.val, second.val)
