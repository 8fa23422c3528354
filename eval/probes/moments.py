"""Moments of groups of rows, from which ridge regression on any union of groups follows exactly.

What a fit needs of its rows is their number, their means and their scatter. These are gathered once
for each group (patient, slide), in float64 and about the group's own mean, so that offsets and
differences between groups cost no digits. A fold that leaves groups out takes theirs away from the
total: the same numbers as a pass over its rows would give. One eigendecomposition then serves every
alpha, and the Pearson correlation on a held-out group follows from the moments of that group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lemon_muse.errors import UserError

CHUNK = 8192
# Taking groups away that leaves less than this share of a column costs digits: it is summed anew.
LOST = 1e-4


@dataclass(frozen=True)
class Scatter:
    """Moments of n rows: means [d], [G] and, about them, sums xx [d, d], xy [d, G], yy [G]."""

    n: int
    mean_x: np.ndarray
    mean_y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray


@dataclass(frozen=True)
class Fits:
    """A fit for each of A alphas: weights [d, A, G] of x - mean_x [d], intercepts mean_y [G]."""

    weight: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Predictions float32 [A, n, G] for features [n, d]."""
        d, count, genes = self.weight.shape
        flat = self.weight.reshape(d, count * genes)
        out = np.empty((count, len(x), genes), np.float32)
        for start in range(0, len(x), CHUNK):
            part = (x[start : start + CHUNK] - self.mean_x) @ flat
            part = part.reshape(-1, count, genes) + self.mean_y
            out[:, start : start + CHUNK] = part.transpose(1, 0, 2)
        return out


@dataclass(frozen=True)
class Bank:
    """Moments of P disjoint parts, float64, as in `Scatter` with a leading axis of parts."""

    n: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    @cached_property
    def total(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._within(np.ones(len(self.n), bool))

    def pool(self, mask: np.ndarray) -> Scatter:
        """Moments of all rows of the parts that a mask, bool [P], names."""
        xx, xy, yy = self._left(mask)
        n = self.n[mask]
        x, y = self.mean_x[mask], self.mean_y[mask]
        mean_x, mean_y = (n / n.sum()) @ x, (n / n.sum()) @ y
        # Scatter of all rows = within the parts + of the parts' means about the common one.
        x, y = (x - mean_x) * np.sqrt(n)[:, None], (y - mean_y) * np.sqrt(n)[:, None]
        return Scatter(int(n.sum()), mean_x, mean_y, xx + x.T @ x, xy + x.T @ y, yy + (y**2).sum(0))

    def _left(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scatter within the named parts: the total without the others where that is exact."""
        if 2 * mask.sum() > len(mask):
            xx, xy, yy = (a - b for a, b in zip(self.total, self._within(~mask), strict=True))
            kept = xx.diagonal() >= LOST * self.total[0].diagonal()
            if kept.all() and (yy >= LOST * self.total[2]).all():
                return xx, xy, yy
        return self._within(mask)

    def _within(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums xx, xy, yy over parts, each about its own means."""
        xx, xy, yy = (np.zeros(a.shape[1:]) for a in (self.xx, self.xy, self.yy))
        for place in np.flatnonzero(mask).tolist():
            xx += self.xx[place]
            xy += self.xy[place]
            yy += self.yy[place]
        return xx, xy, yy

    def pearson(self, fits: Fits, place: int) -> np.ndarray:
        """Pearson r [A, G] of predictions and targets on one part; 0 where either is constant."""
        d, count, genes = fits.weight.shape
        flat = fits.weight.reshape(d, count * genes)
        spread = np.einsum("dk,dk->k", flat, self.xx[place] @ flat).reshape(count, genes)
        both = np.einsum("dag,dg->ag", fits.weight, self.xy[place])
        still = constant(self.yy[place], int(self.n[place]), self.mean_y[place])
        scale = np.sqrt(np.maximum(spread, 0) * np.where(still, 0, self.yy[place]))
        return np.divide(both, scale, out=np.zeros_like(both), where=scale > 0)


def gather(x: np.ndarray, targets: np.ndarray, parts: Sequence[np.ndarray]) -> Bank:
    """Moments of each part, given by its rows of x float [n, d] and targets float [n, G].

    Raises:
        UserError: a value is not finite.
    """
    d, genes = x.shape[1], targets.shape[1]
    shapes = ((d,), (genes,), (d, d), (d, genes), (genes,))
    mean_x, mean_y, xx, xy, yy = (np.zeros((len(parts), *shape)) for shape in shapes)
    for place, rows in enumerate(parts):
        mean_x[place] = x[rows].mean(0, dtype=np.float64)
        mean_y[place] = targets[rows].mean(0, dtype=np.float64)
        for what, given, mean in (("feature", x, mean_x), ("target", targets, mean_y)):
            if not np.isfinite(mean[place]).all():
                bad = rows[~np.isfinite(given[rows]).all(1)][0]
                raise UserError(f"a {what} of nucleus {bad} (from 0) is not a finite number.")
        for start in range(0, len(rows), CHUNK):
            here = rows[start : start + CHUNK]
            a, b = x[here] - mean_x[place], targets[here] - mean_y[place]
            xx[place] += a.T @ a
            xy[place] += a.T @ b
            yy[place] += (b**2).sum(0)
    return Bank(np.array([len(rows) for rows in parts]), mean_x, mean_y, xx, xy, yy)


def solve(train: Scatter, alphas: Sequence[float] | np.ndarray) -> Fits:
    """Ridge on standardised features for every alpha (scikit-learn's) by one eigendecomposition."""
    from scipy.linalg import eigh

    still = constant(train.xx.diagonal(), train.n, train.mean_x)
    std = np.sqrt(np.where(still, 1, train.xx.diagonal()) / train.n)
    scale = np.where(still, 0, 1 / std)
    # A target that is constant in train is predicted as that constant, not as its rounding.
    xy = np.where(constant(train.yy, train.n, train.mean_y), 0, train.xy)
    value, vector = eigh(
        train.xx * scale * scale[:, None], overwrite_a=True, check_finite=False, driver="evd"
    )
    turned = vector.T @ (xy * scale[:, None])
    shrunk = np.maximum(value, 0)[:, None] + np.asarray(alphas, np.float64)
    inner = (turned[:, None] / shrunk[..., None]).reshape(len(value), -1)
    weight = (vector @ inner) * scale[:, None]
    return Fits(weight.reshape(len(value), len(alphas), -1), train.mean_x, train.mean_y)


def constant(scatter: np.ndarray, n: int, mean: np.ndarray) -> np.ndarray:
    """Columns whose std is rounding noise of their mean, as in `lbfgs.standardise`."""
    std = np.sqrt(np.maximum(scatter, 0) / n)
    still: np.ndarray = std <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    return still
