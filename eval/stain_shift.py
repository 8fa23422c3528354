"""How stable features are when the same tissue is stained otherwise.

Images are taken apart into hematoxylin and eosin (Macenko, `lemon_muse.data.stain`) and put
together again with the stain vectors of an image of another slide, each stain up to 20 % weaker or
stronger. A pixel's density is linear in both, so that all of it is one 3 × 3 matrix on densities;
what the two stains do not explain stays as it was, and with the own vectors and factors of 1 the
image is unchanged. Tissue and nuclei stay in place: a feature that moves has seen the stain.
"""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.bootstrap import Interval
from eval.probes.knn import unit_rows
from eval.robustness import K, Ratio, draw_evenly, neighbours, ratio_interval
from eval.sources import Source
from lemon_muse.data import stain
from lemon_muse.data.table import COLUMNS, Table, image_size, is_large, read_image

log = logging.getLogger(__name__)

VERSION = "1"
MOST = 2000  # nuclei
IMAGES, PIXELS = 200, 400_000_000  # at most so many images, and px of them all
FACTOR = 0.2
PLAUSIBLE = 0.65  # share of images whose stain vectors are given to others
SAMPLE = 100_000  # pixels that the stain vectors of an image are estimated from
BLOCK = 2**20  # pixels of one multiplication


def measure(
    source: Source,
    table: Table,
    used: np.ndarray,
    *,
    benchmark: str,
    version: str,
    folder: Path,
    seed: int = 0,
) -> dict[str, Interval]:
    """`stain/cosine`, `stain/retrieved`, `stain/vote_changed` and `stain/nearest_changed`, with
    95 % intervals over patients; see `stability`. {} where no image can be stained otherwise.

    Features of both copies are computed together, so that a floor that is fitted has one fit.

    Args:
        used: rows int [n] to draw nuclei from.
        folder: of cached features; the stained images are deleted afterwards.
    """
    rows = draw(table, used, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="stained-") as place:
        stained, kept = stained_table(table, rows, Path(place), seed=seed)
        if len(kept) < 2:
            log.warning("no image has two stains that can be told apart: no stain stability")
            return {}
        both = _joined(table.take(kept), stained)
        x = source.load(both, benchmark=benchmark, version=f"{version}/{VERSION}", folder=folder)
    ratios = stability(x[: len(kept)], x[len(kept) :], table.label[kept], table.patient[kept])
    return {
        f"stain/{name}": ratio_interval(ratio, table.patient[kept], seed=seed)
        for name, ratio in ratios.items()
    }


def stability(
    before: np.ndarray, after: np.ndarray, label: np.ndarray, patient: np.ndarray, *, k: int = K
) -> dict[str, Ratio]:
    """How features move between two copies of the same nuclei.

    Args:
        before, after: float [n, d]; row i is the same nucleus.
        label: int [n], 0 or more.
        patient: [n]; neighbours are other patients' nuclei, or, of a single patient, all others.

    Returns:
        cosine: mean cosine of a nucleus' two features, both minus the mean of `before`: 1 unmoved,
            0 as far apart as two nuclei drawn blindly.
        retrieved: share of nuclei whose `after` is nearest to its own `before` of all (cosine).
        vote_changed, nearest_changed: share whose k = 20 neighbours in `before` vote for another
            class (a tie: the first class), whose nearest has another class.
    """
    import faiss

    mean = before.mean(0, dtype=np.float64)
    pair = unit_rows(before - mean), unit_rows(after - mean)
    found = {"cosine": (pair[0] * pair[1]).sum(1, dtype=np.float64)}
    _, nearest = faiss.knn(
        unit_rows(after), unit_rows(before), 1, metric=faiss.METRIC_INNER_PRODUCT
    )
    found["retrieved"] = nearest[:, 0] == np.arange(len(before))
    owner = np.unique(patient, return_inverse=True)[1]
    k = min(k, len(before) - 1)
    apart = owner if len(before) - np.bincount(owner).max() >= k else None
    votes, nearest_class = [], []
    for queries in (before, after):
        near = label[neighbours(before, apart, k=k, queries=queries)]
        counts = np.stack([(near == c).sum(1) for c in range(int(label.max()) + 1)], 1)
        votes.append(counts.argmax(1))
        nearest_class.append(near[:, 0])
    found["vote_changed"] = votes[0] != votes[1]
    found["nearest_changed"] = nearest_class[0] != nearest_class[1]
    ones = np.ones(len(before))
    return {name: Ratio(np.asarray(v, np.float64), ones) for name, v in found.items()}


def draw(table: Table, used: np.ndarray, *, seed: int) -> np.ndarray:
    """At most 2,000 of the rows, ascending, evenly over classes, of at most 200 images.

    Images that are read part by part (slides, more than 16 Mpx) are left out: a copy of them would
    take too long.
    """
    names = np.unique(table.image[used])
    large = [name for name in names.tolist() if is_large(Path(name))]
    if large:
        log.warning("%d images are too large for a stained copy, as %s", len(large), large[0])
    names = np.random.default_rng(seed).permutation(np.setdiff1d(names, large))[:IMAGES]
    sides = np.array([image_size(Path(name)) for name in names.tolist()]).reshape(-1, 2)
    names = names[np.cumsum(sides.prod(1)) <= PIXELS]
    rows = used[np.isin(table.image[used], names)]
    return draw_evenly(table.label[rows], rows, most=MOST, seed=seed)


def stained_table(
    table: Table, rows: np.ndarray, folder: Path, *, seed: int = 0
) -> tuple[Table, np.ndarray]:
    """Write stained copies (PNG) of the images of some rows into a folder.

    Returns:
        The table of these rows in the copies, and the rows int64 [m] that it holds: those of images
        without two stains that can be told apart are left out.

    Raises:
        UserError: an image is missing or does not decode.
    """
    generator = np.random.default_rng(seed)
    names = np.unique(table.image[rows]).tolist()
    slide = dict(zip(table.image[rows].tolist(), table.slide[rows].tolist(), strict=True))
    found = {name: stain_vectors(read_image(Path(name))) for name in names}
    own = {name: vectors for name, vectors in found.items() if vectors is not None}
    givers = plausible(own)
    copies = {}
    for number, (name, vectors) in enumerate(own.items()):
        others = [other for other in givers if slide[other] != slide[name]]
        others = others or [other for other in givers if other != name] or [name]
        new = own[others[int(generator.integers(len(others)))]]
        factors = generator.uniform(1 - FACTOR, 1 + FACTOR, 2)
        copies[name] = folder / f"{number:04d}.png"
        _write(copies[name], restained(read_image(Path(name)), vectors, new, factors))
    kept = rows[np.isin(table.image[rows], list(copies))]
    if len(kept) < len(rows):
        log.warning("%d images show no two stains and get no copy", len(names) - len(copies))
    images = np.array([str(copies[name]) for name in table.image[kept].tolist()])
    return replace(table.take(kept), image=images), kept


def stain_vectors(image: np.ndarray) -> np.ndarray | None:
    """Macenko's vectors float64 [2, 3], hematoxylin first, of uint8 [H, W, 3]; None: no two."""
    pixels = image.reshape(-1, 3)
    found = stain.macenko(pixels[:: -(-len(pixels) // SAMPLE)])
    return None if found is None else found[0]


def plausible(vectors: dict[str, np.ndarray]) -> list[str]:
    """The names of the 65 % of images whose stain vectors [2, 3] lie nearest to the median ones.

    An image with hardly any eosin, or with pigment, gives a vector that is no stain's: with it,
    collagen of other images would turn grey or brown, as no laboratory stains it.
    """
    if not vectors:
        return []
    every = np.stack(list(vectors.values()))
    middle = np.median(every, 0)
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    nearness = (every * middle).sum(2).min(1)
    best = np.argsort(-nearness, kind="stable")[: max(1, int(len(every) * PLAUSIBLE))]
    return [name for i, name in enumerate(vectors) if i in set(best.tolist())]


def restained(
    image: np.ndarray, own: np.ndarray, new: np.ndarray, factors: np.ndarray
) -> np.ndarray:
    """An image uint8 [H, W, 3] in other stain vectors.

    Args:
        own, new: float [2, 3], hematoxylin first.
        factors: float [2], of the amounts of both stains.
    """
    # Density d = c V + rest with c = d pinv(V) becomes c (f V') + rest.
    matrix = np.eye(3) + np.linalg.pinv(own) @ (np.asarray(factors)[:, None] * new - own)
    pixels = image.reshape(-1, 3)
    out = np.empty_like(pixels)
    for start in range(0, len(pixels), BLOCK):
        density = stain.optical_density(pixels[start : start + BLOCK])
        out[start : start + BLOCK] = stain.compose(density, matrix)
    return out.reshape(image.shape)


def _write(path: Path, image: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(image).save(path, compress_level=1)


def _joined(first: Table, second: Table) -> Table:
    """The rows of two tables of the same columns and classes."""
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in COLUMNS
    }
    groups = {
        name: np.concatenate([column, second.groups[name]]) for name, column in first.groups.items()
    }
    return replace(first, **columns, groups=groups)
