"""Multinomial logistic regression for a whole grid of C at once.

Same optimum as scikit-learn's `LogisticRegression(solver='lbfgs', class_weight='balanced')` with
three or more classes. (For two classes scikit-learn penalises one weight vector and the softmax
here two: the same fit needs half its C here.)

One product of the features with the weights of every C costs little more than with one C, and the
Gram matrix of the features bounds the Hessian of each C from above (Böhning 1992), which makes
L-BFGS converge in tens of iterations instead of hundreds.
"""

from collections.abc import Sequence

import numpy as np
import torch

# Half decades from 1e-4 to 10.
GRID = tuple(float(f"{10 ** (exponent / 2):.6g}") for exponent in range(-8, 3))
HISTORY = 10
# Rows at a time: on a CPU their class scores for ten C stay in its cache.
CHUNK = 2048


def standardise(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centre and scale columns by mean and std of `train`; constant columns become 0."""
    mean = train.mean(0, dtype=np.float64)
    std = train.std(0, dtype=np.float64)
    # A constant column keeps rounding noise as its std: dividing by it would blow noise up to 1.
    constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, std)).astype(np.float32)
    shift = mean.astype(np.float32)
    return tuple((part.astype(np.float32) - shift) * scale for part in (train, *others))


def balanced_weights(labels: np.ndarray, *, classes: int) -> np.ndarray:
    """Weight of each row so that every class that occurs weighs the same; mean 1. float32 [n]."""
    counts = np.bincount(labels, minlength=classes)
    present = int((counts > 0).sum())
    return (len(labels) / (present * counts[labels])).astype(np.float32)


def decide(features: np.ndarray, weights: torch.Tensor) -> np.ndarray:
    """Logits float32 [A, n, K] of standardised features [n, d] for fitted weights [A, d + 1, K]."""
    x = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(weights.device)
    logits = torch.stack([torch.addmm(w[-1], x, w[:-1]) for w in weights])
    return logits.cpu().numpy()


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int,
    grid: Sequence[float] = GRID,
    start: torch.Tensor | None = None,
    balanced: bool = True,
    tolerance: float = 1e-5,
    iterations: int = 500,
    device: str = "cpu",
) -> torch.Tensor:
    """Fit one model per C.

    Args:
        features: float [n, d], standardised.
        labels: int [n], 0 … classes-1.
        grid: A values of C as in scikit-learn: inverse strength against the *sum* of losses.
        start: weights [A, d + 1, K] to start from, zeros when None; the optimum is the same.
        balanced: weight classes so that each counts the same.
        tolerance: a C has converged when no entry of the gradient of its mean loss is larger.
        iterations: at most so many for each C.

    Returns:
        float32 [A, d + 1, K]; the last row is the intercept, which is not penalised.
    """
    problem = _Problem(
        features, labels, classes=classes, grid=grid, balanced=balanced, device=device
    )
    shape = (len(grid), problem.x.shape[1], classes)
    w = torch.zeros(shape, device=device) if start is None else start.clone().to(device)
    history: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    active = torch.arange(len(grid), device=device)
    f, g = problem.evaluate(w, active)
    for _ in range(iterations):
        active = torch.nonzero(g.abs().amax((1, 2)) > tolerance)[:, 0]
        if not len(active):
            break
        step = _direction(problem, history, g, active)
        slope = (g[active].double() * step.double()).sum((1, 2))
        new_w, new_f, new_g, moved = _search(problem, w, f, active, step, slope)
        if not moved.any():
            # float32 can take none of them further down.
            break
        s, y = torch.zeros_like(w), torch.zeros_like(w)
        s[active], y[active] = new_w - w[active], new_g - g[active]
        curvature = (s.double() * y.double()).sum((1, 2))
        rho = torch.where(curvature > 1e-20, 1 / curvature.clamp_min(1e-20), 0.0)
        history = [*history[-HISTORY + 1 :], (s, y, rho)]
        w[active], f[active], g[active] = new_w, new_f, new_g
        # A C that cannot move has converged as far as float32 allows.
        g[active[~moved]] = 0
    return w


class _Problem:
    """Loss and gradient for any subset of the grid, and the preconditioner of each C."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        *,
        classes: int,
        grid: Sequence[float],
        balanced: bool,
        device: str,
    ) -> None:
        n = len(labels)
        ones = np.ones((n, 1), np.float32)
        self.x = torch.from_numpy(np.concatenate([features, ones], 1, dtype=np.float32)).to(device)
        self.labels = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
        weight = np.ones(n, np.float32)
        if balanced:
            weight = balanced_weights(np.asarray(labels), classes=classes)
        self.weight = torch.from_numpy(weight / n).to(device)
        self.classes = classes
        self.penalty = 1 / (torch.tensor(grid, dtype=torch.float64, device=device) * n)
        gram = torch.zeros(self.x.shape[1], self.x.shape[1], dtype=torch.float64, device=device)
        for x, s in zip(self.x.split(CHUNK), self.weight.split(CHUNK), strict=True):
            gram += (x.T @ (x * s[:, None])).double()
        self.inverse = torch.stack([self._factor(gram, float(c)) for c in self.penalty])

    def _factor(self, gram: torch.Tensor, penalty: float) -> torch.Tensor:
        """L^-1 of L L^T = gram / 2 + penalty: applying it twice stays positive in float32."""
        diagonal = torch.full((len(gram),), penalty, dtype=torch.float64, device=gram.device)
        diagonal[-1] = 1e-12
        lower = torch.linalg.cholesky(gram / 2 + torch.diag(diagonal))
        eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False).float()

    def precondition(self, g: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        inverse = self.inverse[active]
        return inverse.transpose(1, 2) @ (inverse @ g)

    def evaluate(self, w: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss float64 [a] and gradient float32 [a, D, K] at weights of `which` Cs."""
        count, width, k = w.shape
        flat = w.transpose(1, 2).reshape(count * k, width)
        total = torch.zeros(count, dtype=torch.float64, device=w.device)
        gradient = torch.zeros_like(flat)
        for x, label, s in zip(
            self.x.split(CHUNK), self.labels.split(CHUNK), self.weight.split(CHUNK), strict=True
        ):
            # Rows last: a softmax over the middle axis is twenty times as fast as over 12 values.
            log_p = (flat @ x.T).view(count, k, len(x)).log_softmax(1)
            target = label.expand(count, 1, len(x))
            total -= (log_p.gather(1, target)[:, 0] * s).sum(1, dtype=torch.float64)
            error = log_p.exp_()
            error.scatter_add_(1, target, torch.full_like(target, -1, dtype=error.dtype))
            gradient.addmm_(error.mul_(s).view(count * k, len(x)), x)
        penalty = self.penalty[which]
        total += penalty / 2 * w[:, :-1].double().square().sum((1, 2))
        out = gradient.view(count, k, width).transpose(1, 2).contiguous()
        out[:, :-1] += penalty.float()[:, None, None] * w[:, :-1]
        return total, out


def _direction(
    problem: _Problem,
    history: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    g: torch.Tensor,
    active: torch.Tensor,
) -> torch.Tensor:
    """The L-BFGS step (two-loop recursion), every C with its own history, preconditioned."""
    q = g[active].clone()
    kept = [(s[active], y[active], rho[active].float()) for s, y, rho in history]
    alphas = []
    for s, y, rho in reversed(kept):
        alpha = rho * (s * q).sum((1, 2))
        alphas.append(alpha)
        q -= alpha[:, None, None] * y
    q = problem.precondition(q, active)
    if kept:
        s, y, rho = kept[-1]
        bend = (y * problem.precondition(y, active)).sum((1, 2))
        known = (rho > 0) & (bend > 0)
        scale = torch.where(known, (s * y).sum((1, 2)) / bend.clamp_min(1e-30), 1.0)
        q *= scale[:, None, None]
    for (s, y, rho), alpha in zip(kept, reversed(alphas), strict=True):
        beta = rho * (y * q).sum((1, 2))
        q += (alpha - beta)[:, None, None] * s
    return -q


def _search(
    problem: _Problem,
    w: torch.Tensor,
    f: torch.Tensor,
    active: torch.Tensor,
    step: torch.Tensor,
    slope: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Halve the step of each C until the loss falls enough; a C that never falls stays put."""
    size = torch.ones(len(active), device=w.device)
    new_w = w[active] + step
    new_f, new_g = problem.evaluate(new_w, active)
    old_f = f[active]
    # float32 logits leave about 1e-7 of relative noise in the loss.
    slack = 2e-7 * old_f.abs()
    moved = torch.ones(len(active), dtype=torch.bool, device=w.device)
    for _ in range(20):
        bad = torch.nonzero(~(new_f <= old_f + 1e-4 * size * slope + slack))[:, 0]
        if not len(bad):
            return new_w, new_f, new_g, moved
        size[bad] /= 2
        new_w[bad] = w[active[bad]] + size[bad, None, None] * step[bad]
        new_f[bad], new_g[bad] = problem.evaluate(new_w[bad], active[bad])
    moved[bad] = False
    new_w[bad] = w[active[bad]]
    new_f[bad], new_g[bad] = problem.evaluate(new_w[bad], active[bad])
    return new_w, new_f, new_g, moved
