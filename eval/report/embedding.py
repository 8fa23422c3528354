"""The morphological map: a 2-D projection of the features with the nuclei drawn on it."""

from typing import Any

import numpy as np
from PIL import Image

from eval.report.gallery import Gallery
from eval.report.retrieval import framed, nearest, unit
from eval.report.style import (
    PALETTE,
    WIDTH,
    Picture,
    canvas,
    class_colour,
    drawn,
    photographed,
    short,
)
from lemon_muse.errors import UserError

COMPONENTS = 50
MOST_COLUMNS = 40  # cells across the map of nuclei, which is 4:3
_FEWEST = 50
_COLLAPSED = 1e-6  # spread of unit-length features below which they are all the same
_PATIENTS = 8


def principal(features: np.ndarray) -> np.ndarray | None:
    """Up to 50 principal components of the unit-length features, float32 [n, c]; None if collapsed.

    The sign of a component is fixed by its largest loading, so the result is deterministic.
    """
    rows = unit(features).astype(np.float64)
    rows -= rows.mean(0)
    if float(rows.std(0).max()) < _COLLAPSED:
        return None
    # The covariance is small (d x d), so this is exact and quick for any n.
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    order = np.argsort(-values)[: min(COMPONENTS, len(rows) - 1)]
    vectors = vectors[:, order]
    strongest = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    return (rows @ (vectors * np.sign(strongest))).astype(np.float32)


def project(components: np.ndarray, *, method: str, seed: int) -> np.ndarray:
    """Principal components [n, c] -> map float64 [n, 2], deterministic for a seed.

    'tsne' is scikit-learn's Barnes-Hut t-SNE from a PCA start, perplexity 30, 600 steps (on 4,000
    nuclei it then takes half the time of 1,000 steps and looks the same); 'umap' is umap-learn
    with 15 neighbours, cosine having been taken care of by the unit length; 'pca' the first two.
    """
    n = len(components)
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError:
            raise UserError(
                "projection=umap needs the package umap-learn; install it or use projection=tsne."
            ) from None
        place = UMAP(n_neighbors=min(15, n - 1), random_state=seed).fit_transform(components)
    elif method == "tsne" and components.shape[1] >= 2:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (n - 1) / 4)
        place = TSNE(
            init="pca", perplexity=perplexity, max_iter=600, angle=0.6, random_state=seed, n_jobs=1
        ).fit_transform(components)
    else:
        place = np.pad(components[:, :2], ((0, 0), (0, max(0, 2 - components.shape[1]))))
    return np.asarray(place, np.float64)


def to_unit_box(place: np.ndarray) -> np.ndarray:
    """Stretch a map onto [0, 1]^2, each axis on its own; the farthest 0.5 % are put on the rim."""
    low, high = np.percentile(place, [0.25, 99.75], axis=0)
    return np.clip((place - low) / np.maximum(high - low, 1e-12), 0, 1)


def snap(box: np.ndarray, *, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """One nucleus a grid cell: the one nearest to the cell's centre.

    Args:
        box: float [n, 2], x and y in [0, 1].

    Returns:
        chosen int64 [m], rows of `box`, and cells int64 [m, 2], (column, row), no cell twice.
    """
    size = np.array([columns, rows])
    cell = np.minimum((box * size).astype(np.int64), size - 1)
    away = ((box * size - cell - 0.5) ** 2).sum(1)
    flat = cell[:, 1] * columns + cell[:, 0]
    order = np.lexsort((away, flat))
    first = np.ones(len(order), bool)
    first[1:] = flat[order][1:] != flat[order][:-1]
    chosen = order[first]
    return chosen, cell[chosen]


def nuclei_map(gallery: Gallery, box: np.ndarray) -> tuple[Picture, int]:
    """The map with one nucleus drawn in each occupied cell, and how many were drawn."""
    # Few nuclei get larger cells: about as many cells as nuclei.
    across = int(np.clip(round(np.sqrt(len(box) * 4 / 3) / 4) * 4, 12, MOST_COLUMNS))
    down = across * 3 // 4
    chosen, cells = snap(box, columns=across, rows=down)
    side = 2 * WIDTH // across
    image = Image.new("RGB", (side * across, side * down), "white")
    for row, (column, line) in zip(chosen, cells, strict=True):
        # y grows upwards on the dot map and downwards in a picture.
        at = (int(column) * side + 1, (down - 1 - int(line)) * side + 1)
        image.paste(framed(gallery, int(row), side - 2, 3), at)
    alt = "Map of the feature space; in each cell the nucleus that lies nearest to its centre."
    return photographed(image, "map-nuclei", alt), len(chosen)


def dot_maps(gallery: Gallery, box: np.ndarray) -> Picture:
    """The same map as dots, by class and by patient."""
    with canvas(WIDTH, 470) as figure:
        left, right = figure.subplots(1, 2)
        order = np.random.default_rng(0).permutation(len(box))  # no class always on top
        size = float(np.clip(24000 / len(box), 5, 22))
        colours = np.array([class_colour(c) for c in range(len(gallery.classes))])
        left.scatter(*box[order].T, c=colours[gallery.labels[order]], s=size, lw=0, alpha=0.8)
        left.set_title("By class")
        counts = np.bincount(gallery.labels, minlength=len(gallery.classes))
        for cls, name in enumerate(gallery.classes):
            if counts[cls]:
                label = f"{short(name, 22)} ({counts[cls]:,})"
                left.scatter([], [], c=[colours[cls]], s=24, label=label)
        _patients(right, gallery, box, size)
        for ax in (left, right):
            ax.set(xticks=[], yticks=[], xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            ax.spines[:].set_visible(True)
            ax.legend(loc="upper left", bbox_to_anchor=(0, -0.01), ncol=3, handletextpad=0.1,
                      columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
        alt = "The same map as dots, coloured by class and by patient."
        return drawn(figure, "map-dots", alt)


def _patients(ax: Any, gallery: Gallery, box: np.ndarray, size: float) -> None:
    names, index, counts = np.unique(gallery.patient, return_inverse=True, return_counts=True)
    # Not the colours of the classes: a patient is not a class.
    most = np.argsort(-counts, kind="stable")[:_PATIENTS]
    ax.scatter(*box.T, c="#dfe3e9", s=size, lw=0)
    for i, patient in enumerate(most):
        mine = index == patient
        label = short(str(names[patient]), 18) if names[patient] else "(no name)"
        ax.scatter(*box[mine].T, c=PALETTE[8 + i], s=size * 1.3, lw=0, alpha=0.9)
        ax.scatter([], [], c=PALETTE[8 + i], s=24, label=label)
    ax.set_title(
        f"By patient: {len(most)} of {len(names)} in colour" if len(names) > 1 else "One patient"
    )


def patient_mixing(gallery: Gallery, k: int) -> tuple[float, float]:
    """How often a nucleus's k nearest are of its own patient, and how often by chance.

    Both are shares in [0, 1], over the whole feature space (not the map), the nucleus itself left
    out. The first far above the second means that stain or scanner is in the features.
    """
    n = len(gallery.patient)
    k = min(k, n - 1)
    found = nearest(gallery.features, gallery.features, k + 1)
    own = np.arange(n)[:, None]
    # The nucleus itself is usually first, but not where another has the same features.
    is_self = found == own
    is_self[~is_self.any(1), -1] = True
    others = found[~is_self].reshape(n, k)
    same = gallery.patient[others] == gallery.patient[:, None]
    _, counts = np.unique(gallery.patient, return_counts=True)
    chance = float((counts * (counts - 1)).sum() / (n * (n - 1)))
    return float(same.mean()), chance


def projectable(gallery: Gallery) -> str:
    """Why there can be no map, or '' if there can be one."""
    if len(gallery.labels) < _FEWEST:
        return f"the gallery holds {len(gallery.labels)} nuclei, a map needs {_FEWEST}"
    return ""
