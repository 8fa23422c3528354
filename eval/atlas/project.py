"""From features to a map: neighbours, principal components, 2-D projection, clusters."""

import random
from typing import Any

import numpy as np

from eval.progress import Progress
from eval.report.embedding import principal
from lemon_muse.errors import UserError

# Above it t-SNE takes too long to be of use: scikit-learn's needs minutes for 20,000.
TSNE_MOST = 20_000
UMAP_NEIGHBOURS = 15
KMEANS = 12
_BLOCK = 4096


def neighbours(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most alike nuclei of each, by cosine, exact (faiss).

    Args:
        features: float32 [n, d].
        k: how many, at most n - 1.

    Returns:
        rows int32 [n, k], nearest first, never the nucleus itself, and cosines float32 [n, k].
    """
    import faiss

    unit = np.ascontiguousarray(features, np.float32).copy()
    faiss.normalize_L2(unit)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    n = len(unit)
    rows = np.empty((n, k), np.int32)
    near = np.empty((n, k), np.float32)
    with Progress(n, what="neighbours", unit="nuclei") as progress:
        for start in range(0, n, _BLOCK):
            cosine, found = index.search(unit[start : start + _BLOCK], k + 1)
            own = found == np.arange(start, start + len(found))[:, None]
            # A nucleus with twins may not be among its own nearest: then the last one goes.
            own[~own.any(1), -1] = True
            rows[start : start + len(found)] = found[~own].reshape(-1, k)
            near[start : start + len(found)] = cosine[~own].reshape(-1, k)
            progress.update(len(found))
    return rows, np.clip(near, -1, 1)


def components(features: np.ndarray) -> np.ndarray:
    """Up to 50 principal components of the unit-length features, float32 [n, c].

    Raises:
        UserError: all features are the same.
    """
    found = principal(features)
    if found is None:
        raise UserError(
            "the features of all nuclei are the same, the encoder has collapsed; there is no map "
            "to draw: embed with another encoder."
        )
    return found


def place(
    parts: np.ndarray, graph: tuple[np.ndarray, np.ndarray], *, method: str, seed: int
) -> np.ndarray:
    """Map float32 [n, 2], inside [0, 1] but for outliers, one scale for both axes, y upwards.

    Args:
        parts: principal components float32 [n, c].
        graph: `neighbours` of the features, at least 15 each where there are so many nuclei.
        method: 'umap' (umap-learn, 15 neighbours, started from the principal components), 'tsne'
            (scikit-learn, perplexity 30, started likewise), 'pca'.

    Raises:
        UserError: umap-learn is not installed; too many nuclei for t-SNE.
    """
    n = len(parts)
    flat = np.pad(parts[:, :2], ((0, 0), (0, max(0, 2 - parts.shape[1]))))
    start = (flat / max(float(flat[:, 0].std()), 1e-12)).astype(np.float32)
    if method == "umap":
        flat = _umap(parts, graph, start, seed)
    elif method == "tsne":
        if n > TSNE_MOST:
            raise UserError(
                f"projection=tsne is for up to {TSNE_MOST} nuclei, here are {n}; take umap, pca or "
                f"nuclei={TSNE_MOST}."
            )
        from sklearn.manifold import TSNE

        tsne = TSNE(
            init=start * 1e-4, perplexity=min(30.0, (n - 1) / 4), random_state=seed, n_jobs=1
        )
        flat = tsne.fit_transform(parts)
    # Single outliers must not shrink the rest of the map to a dot.
    low, high = np.percentile(flat, [0.1, 99.9], axis=0)
    span = max(float((high - low).max()), 1e-12)
    return np.asarray((flat - (low + high) / 2) / span + 0.5, np.float32)


def _umap(
    parts: np.ndarray, graph: tuple[np.ndarray, np.ndarray], start: np.ndarray, seed: int
) -> np.ndarray:
    try:
        from umap import UMAP
    except ImportError:
        raise UserError(
            "projection=umap needs the extra 'embed': pip install lemon-muse[embed], or take "
            "projection=tsne."
        ) from None
    import warnings

    n = len(parts)
    k = min(UMAP_NEIGHBOURS, n - 1)
    more: dict[str, Any] = {}
    if n >= 4096 and graph[0].shape[1] >= k - 1:
        # umap counts the nucleus itself as the first of its neighbours. Unit vectors with cosine c
        # are sqrt(2 - 2 c) apart.
        rows = np.concatenate([np.arange(n, dtype=np.int32)[:, None], graph[0][:, : k - 1]], 1)
        away = np.sqrt(np.maximum(0, 2 - 2 * graph[1][:, : k - 1]))
        away = np.concatenate([np.zeros((n, 1), np.float32), away], 1)
        more["precomputed_knn"] = (rows, away.astype(np.float32))
    with warnings.catch_warnings():
        # It says that a seed costs threads and that new nuclei cannot be placed: both are wanted.
        warnings.simplefilter("ignore")
        umap = UMAP(n_neighbors=k, init=start * 5, random_state=seed, n_jobs=1, **more)
        return np.asarray(umap.fit_transform(parts))


def cluster(
    parts: np.ndarray, graph: tuple[np.ndarray, np.ndarray], *, seed: int
) -> tuple[np.ndarray, str]:
    """Clusters int64 [n], 0 the largest, and how they were found, in words.

    Leiden (python-igraph, modularity, resolution 1) on the neighbour graph; without igraph k-means
    on the principal components.
    """
    n = len(parts)
    try:
        import igraph
    except ImportError:
        from sklearn.cluster import KMeans

        k = min(KMEANS, n)
        found = KMeans(k, n_init=4, random_state=seed).fit_predict(parts)
        return by_size(found), f"k-means with {k} centres"
    rows, cosine = (part[:, :UMAP_NEIGHBOURS] for part in graph)
    edges = np.stack([np.repeat(np.arange(n), rows.shape[1]), rows.reshape(-1)], 1)
    weight = np.clip(cosine.reshape(-1), 1e-3, 1)
    # Neighbours of each other are one edge, not two.
    pairs, first = np.unique(np.sort(edges, 1), axis=0, return_index=True)
    net = igraph.Graph(n=n, edges=pairs)
    igraph.set_random_number_generator(random.Random(seed))
    try:
        parted = net.community_leiden("modularity", weights=weight[first].tolist(), n_iterations=4)
    finally:
        igraph.set_random_number_generator(random)
    return by_size(np.array(parted.membership)), "Leiden"


def by_size(codes: np.ndarray) -> np.ndarray:
    """The same division int64 [n] with numbers from the largest part to the smallest."""
    _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return rank[inverse]


def along_curve(xy: np.ndarray) -> np.ndarray:
    """Order int64 [n] along a Z curve: what lies together on the map shares a sprite sheet.

    Args:
        xy: float [n, 2], mostly within [0, 1].
    """
    cell = (np.clip(xy, 0, 1) * 1023).astype(np.int64)
    key = np.zeros(len(xy), np.int64)
    for bit in range(10):
        key |= ((cell[:, 0] >> bit) & 1) << (2 * bit) | ((cell[:, 1] >> bit) & 1) << (2 * bit + 1)
    return np.argsort(key, kind="stable")
