"""Where the nuclei stand, of which kind, how large and how dark: one table for a whole slide."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from lemon_muse.synthetic.noise import Noise
from lemon_muse.synthetic.regions import MARGIN, Regions, Style

CLASSES = ("lymphocyte", "plasma_cell", "tumour", "fibroblast", "mitotic_figure")
LYMPHOCYTE, PLASMA, TUMOUR, FIBROBLAST, MITOSIS = range(5)
ADIPOCYTE, LUMEN, VACUOLE = range(3)
_CELLS = 104


@dataclass(frozen=True)
class Cells:
    """Nuclei of a slide, one row each.

    Attributes:
        xy: float32 [n, 2], centres in µm.
        kind: int64 [n], index in `CLASSES`.
        angle: float32 [n], long axis, radians.
        axes: float32 [n, 2], half axes in µm.
        dense: float32 [n], hematoxylin of the chromatin (optical density before the slide's
            strength).
        open: float32 [n], 0 evenly dense ... 1 vesicular (pale with a rim and nucleoli).
        soft: float32 [n], width of the outline in µm: nuclei above or below the focal plane.
        dice: float32 [n, 8], uniform draws that the drawing uses up.
    """

    xy: np.ndarray
    kind: np.ndarray
    angle: np.ndarray
    axes: np.ndarray
    dense: np.ndarray
    open: np.ndarray
    soft: np.ndarray
    dice: np.ndarray

    def take(self, rows: np.ndarray) -> "Cells":
        """The given rows."""
        return Cells(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Holes:
    """Round gaps without stain: xy float32 [m, 2] µm, radius float32 [m] µm, kind int64 [m]."""

    xy: np.ndarray
    radius: np.ndarray
    kind: np.ndarray
    dice: np.ndarray

    def take(self, rows: np.ndarray) -> "Holes":
        """The given rows."""
        return Holes(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def _places(
    rng: np.random.Generator, side: float, spacing: float, jitter: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points of a jittered hexagonal lattice over the world, x and y in µm."""
    low, high = -MARGIN * 0.6, side + MARGIN * 0.6
    row = spacing * np.sqrt(3) / 2
    y, x = np.meshgrid(np.arange(low, high, row), np.arange(low, high, spacing), indexing="ij")
    x = x + (np.arange(len(y)) % 2)[:, None] * spacing / 2
    shift = rng.uniform(-jitter, jitter, (2, *x.shape)) * spacing
    return (x + shift[0]).ravel(), (y + shift[1]).ravel()


def _thin(points: np.ndarray, reach: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Rows that stay when of two that come too close the later one goes.

    Two collide when their distance is below the sum of their `reach`; rows in `spare` may overlap.
    """
    if len(points) < 2:
        return np.arange(len(points))
    pairs = cKDTree(points).query_pairs(2 * float(reach.max()), output_type="ndarray")
    gap = np.hypot(*(points[pairs[:, 0]] - points[pairs[:, 1]]).T)
    close = pairs[gap < reach[pairs[:, 0]] + reach[pairs[:, 1]]]
    close = np.sort(close, axis=1)
    close = close[np.lexsort((close[:, 0], close[:, 1]))]
    keep = np.ones(len(points), bool)
    for first, second in close.tolist():
        if keep[first] and not spare[second]:
            keep[second] = False
    return np.flatnonzero(keep)


def scatter(
    seed: int, noise: Noise, look: Style, regions: Regions, side: float, *, mitotic_rate: float
) -> tuple[Cells, Holes]:
    """Place every nucleus and every hole of a world of `side` µm."""
    rng = np.random.default_rng([_CELLS, seed])
    holes = _holes(rng, look, regions, side)
    xs, ys, kinds = [], [], []

    def add(x: np.ndarray, y: np.ndarray, kind: np.ndarray) -> None:
        xs.append(x)
        ys.append(y)
        kinds.append(kind)

    x, y = _places(rng, side, look.diameter * look.crowding, 0.3)
    inside = (regions.at("tumour", x, y) > 3) & (rng.random(len(x)) < 0.95)
    x, y = x[inside], y[inside]
    roll = rng.random(len(x))
    kind = np.where(roll < mitotic_rate, MITOSIS, TUMOUR)
    add(x, y, np.where(roll > 1 - look.scatter * 0.3, LYMPHOCYTE, kind))

    x, y = _places(rng, side, 7.3, 0.36)
    stroma = regions.at("tumour", x, y) < -2
    plasma = regions.at("plasma", x, y)
    aggregate = regions.at("lymphoid", x, y)
    chance = np.where(stroma, 0.95 * aggregate * (1 - 0.55 * plasma), 0)
    keep = rng.random(len(x)) < chance
    kind = np.where(rng.random(len(x)) < 0.06 + 0.75 * plasma, PLASMA, LYMPHOCYTE)
    add(x[keep], y[keep], kind[keep])

    x, y = _places(rng, side, look.fibroblasts, 0.42)
    stroma = (regions.at("tumour", x, y) < -2.5) & (regions.at("fat", x, y) < 4)
    keep = stroma & (rng.random(len(x)) < 0.85 - 0.6 * regions.at("lymphoid", x, y))
    x, y = x[keep], y[keep]
    roll = rng.random(len(x))
    near = regions.at("plasma", x, y)
    kind = np.where(roll < look.scatter, LYMPHOCYTE, FIBROBLAST)
    kind = np.where((roll > 0.97) | (roll > 1 - 0.25 * near), PLASMA, kind)
    add(x, y, kind)

    x, y, kind = np.concatenate(xs), np.concatenate(ys), np.concatenate(kinds)
    cells = _describe(rng, look, regions, np.stack([x, y], 1), kind)
    keep = regions.at("tissue", x, y) > 4
    if len(holes.xy) and len(x):
        distance, nearest = cKDTree(holes.xy).query(cells.xy, k=min(3, len(holes.xy)))
        wall = holes.radius[nearest.reshape(len(x), -1)] + cells.axes[:, 1:]
        keep &= (distance.reshape(len(x), -1) > wall).all(axis=1)
    cells = cells.take(np.flatnonzero(keep))
    reach = np.where(cells.kind == FIBROBLAST, 3.4, 0.84 * cells.axes.mean(axis=1))
    reach = np.where(cells.kind == PLASMA, 4.3, reach)
    order = np.argsort(rng.random(len(reach)) + (cells.kind != MITOSIS))
    cells, reach = cells.take(order), reach[order]
    return cells.take(_thin(cells.xy, reach, rng.random(len(reach)) < 0.04)), holes


def _holes(rng: np.random.Generator, look: Style, regions: Regions, side: float) -> Holes:
    x, y = _places(rng, side, 46, 0.12)
    inside = regions.at("fat", x, y) > 6
    parts = [(x[inside], y[inside], rng.uniform(17, 23.5, inside.sum()), ADIPOCYTE)]
    x, y = _places(rng, side, 30, 0.4)
    deep = regions.at("tumour", x, y)
    inside = (deep > 16) & (rng.random(len(x)) < look.glands * 25)
    radius = np.clip(rng.uniform(0.25, 0.6, inside.sum()) * deep[inside], 4, 16)
    parts.append((x[inside], y[inside], radius, LUMEN))
    x, y = _places(rng, side, 16, 0.45)
    chance = np.where(regions.at("tumour", x, y) > 2, 0.05, 0.012)
    inside = rng.random(len(x)) < chance
    parts.append((x[inside], y[inside], rng.uniform(0.9, 2.4, inside.sum()), VACUOLE))
    count = sum(len(p[0]) for p in parts)
    return Holes(
        np.concatenate([np.stack(p[:2], 1) for p in parts]).astype(np.float32),
        np.concatenate([p[2] for p in parts]).astype(np.float32),
        np.concatenate([np.full(len(p[0]), p[3]) for p in parts]),
        rng.random((count, 8), dtype=np.float32),
    )


def _describe(
    rng: np.random.Generator, look: Style, regions: Regions, xy: np.ndarray, kind: np.ndarray
) -> Cells:
    """Draw size, shape and chromatin of each nucleus; the kinds overlap in each single measure."""
    n = len(kind)
    normal = rng.standard_normal((5, n))
    size = np.choose(
        kind,
        [
            3.25 * np.exp(0.1 * normal[0]),
            3.55 * np.exp(0.1 * normal[0]),
            look.diameter / 2 * np.exp(look.pleomorphism * normal[0]),
            1.75 * np.exp(0.2 * normal[0]),
            4.3 * np.exp(0.13 * normal[0]),
        ],
    )
    size = np.clip(size, 1.4, 9)
    # Half the nuclei of stroma are spindles, the others plump (active) and paler.
    ratio = np.choose(
        kind,
        [
            1 + 0.13 * np.abs(normal[1]),
            1 + 0.16 * np.abs(normal[1]),
            1.08 + 0.22 * np.abs(normal[1]),
            np.clip(3.9 + 1.2 * normal[1], 2.2, 6.8),
            np.ones(n),
        ],
    )
    plump = (kind == FIBROBLAST) & (rng.random(n) < 0.35)
    ratio = np.where(plump, 0.55 * ratio + 0.5, ratio)
    size = np.where(plump, size * 1.4, size)
    axes = np.stack([size * np.sqrt(ratio), size / np.sqrt(ratio)], 1)
    axes[kind == FIBROBLAST] = np.stack([size * ratio, size], 1)[kind == FIBROBLAST]
    axes[:, 0] = np.minimum(axes[:, 0], 11)
    fibre = regions.angle(*xy.T) + 0.16 * normal[2]
    angle = np.where(kind == FIBROBLAST, fibre, rng.uniform(0, 2 * np.pi, n))
    vesicular = np.clip(1 - look.chromatin + 0.3 * normal[3], 0, 1)
    open_ = np.choose(
        kind, [0.06 + 0.2 * rng.random(n) ** 2, 0.25, vesicular, 0.3 * plump + 0.15, 0]
    )
    dense = np.choose(kind, [0.82, 0.78, 0.74, 0.7, 0.84]) * np.exp(0.18 * normal[4])
    # Nuclei cut tangentially or out of focus: paler, with a soft outline.
    faint = rng.random(n) ** 5 * (kind != MITOSIS)
    dense = dense * (1 - 0.5 * faint)
    soft = 0.25 + 0.9 * faint
    values = (angle, axes, np.clip(dense, 0.35, 1.35), open_, soft, rng.random((n, 8)))
    return Cells(xy.astype(np.float32), kind, *(v.astype(np.float32) for v in values))
