"""What spreads features against plain loops; its sign; equal rows; precision."""

import math

import numpy as np
import pytest
import torch

from lemon_muse.spread import kde, koleo


def rows(n: int = 9, d: int = 6, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(n, d)) * rng.uniform(0.5, 4, (n, 1)))


def plain_koleo(x: np.ndarray, eps: float) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    total = 0.0
    for i in range(len(x)):
        nearest = min(np.linalg.norm(unit[i] - unit[j]) for j in range(len(x)) if j != i)
        total -= math.log(nearest + eps)
    return total / len(x)


def plain_kde(x: np.ndarray, kappa: float) -> float:
    total = 0.0
    for i in range(len(x)):
        density = 0.0
        for j in range(len(x)):
            if j != i:
                cosine = x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
                density += math.exp(kappa * cosine)
        total += math.log(density / (len(x) - 1))
    return total / len(x)


@pytest.mark.parametrize("n", [2, 3, 40])
def test_they_equal_plain_loops(n: int) -> None:
    x = rows(n)
    assert float(koleo(x, eps=1e-3)) == pytest.approx(plain_koleo(x.numpy(), 1e-3), rel=1e-9)
    assert float(kde(x)) == pytest.approx(plain_kde(x.numpy(), 5.0), rel=1e-9)
    assert float(kde(x, kappa=2.0)) == pytest.approx(plain_kde(x.numpy(), 2.0), rel=1e-9)


def test_their_gradients_are_those_of_finite_differences() -> None:
    x = rows(6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: koleo(v, eps=1e-2), x)
    assert torch.autograd.gradcheck(kde, x)


@pytest.mark.parametrize("term", [koleo, kde])
def test_a_step_down_drives_rows_apart(term: object) -> None:
    """The right sign: one step of gradient descent lowers the mean cosine, one up raises it."""
    start = torch.tensor([1.0, 0, 0, 0]) + 0.3 * rows(32, 4).float()
    before = mean_cosine(start)
    for sign in (1, -1):
        x = start.clone().requires_grad_()
        term(x).backward()  # type: ignore[operator]
        with torch.no_grad():
            x -= sign * 0.5 * x.grad  # type: ignore[operator]
        assert (mean_cosine(x) < before) == (sign == 1)


def mean_cosine(x: torch.Tensor) -> float:
    unit = torch.nn.functional.normalize(x.detach(), dim=1)
    n = len(x)
    return float((unit @ unit.T).sum() - n) / (n * (n - 1))


def test_a_row_is_no_neighbour_of_its_own() -> None:
    right = torch.eye(2)
    assert float(kde(right)) == pytest.approx(0.0, abs=1e-6)  # exp(5) of itself would be 148
    assert float(koleo(right)) == pytest.approx(-math.log(math.sqrt(2) + 1e-4), rel=1e-6)


@pytest.mark.parametrize("term", [koleo, kde])
def test_equal_rows_stay_finite(term: object) -> None:
    """Near-duplicates are common: neighbouring tiles hold the same nucleus."""
    x = rows(8, 5).float()
    x[3], x[5] = x[2], x[2] * 3
    x.requires_grad_()
    value = term(x)  # type: ignore[operator]
    value.backward()
    assert value.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_values_when_all_rows_are_equal() -> None:
    ones = torch.ones(600, 4, requires_grad=True)  # 600 times exp(5) overflows fp16
    assert float(kde(ones).detach()) == pytest.approx(5.0, rel=1e-5)
    assert float(koleo(ones, eps=1e-4).detach()) == pytest.approx(-math.log(1e-4), rel=0.02)
    (kde(ones) + koleo(ones)).backward()
    assert ones.grad is not None and ones.grad.isfinite().all()


def test_one_row_has_nothing_to_be_apart_from() -> None:
    x = rows(1).requires_grad_()
    for term in (koleo, kde):
        value = term(x)
        value.backward()
        assert float(value.detach()) == 0 and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("term", [koleo, kde])
def test_autocast_changes_nothing(term: object) -> None:
    x = rows(50, 16).float()
    plain = term(x)  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        inside = term(x)  # type: ignore[operator]
        low = term(x.bfloat16())  # type: ignore[operator]
    assert inside.dtype == low.dtype == torch.float32
    assert torch.equal(inside, plain) and low != plain


def test_a_sphere_has_the_density_of_its_dimension() -> None:
    x = rows(2000, 64).float()
    assert float(kde(x)) == pytest.approx(25 / (2 * 64), rel=0.1)
