"""Near-duplicates: nuclei that look all but the same as one that comes before them."""

from typing import Any

import numpy as np

PIECE = 2048  # vectors that are compared with all before them at once
EXACT = 60_000  # vectors up to which every pair is compared
LISTED = 100_000  # vectors that the lists of a larger set are made from
PROBED = 8  # lists that are searched


def distinct(vectors: np.ndarray, *, cosine: float, seed: int) -> np.ndarray:
    """Which vectors stay when, one after the other, those too near to one that stayed are removed.

    Up to 60,000 vectors every pair is compared; in a larger set only those of the 8 nearest lists
    of an inverted file, so that a few near-duplicates remain. A look of the same empty glass a
    million times costs no more than once: only vectors that stayed are searched.

    Args:
        vectors: float32 [n, d] of unit length.
        cosine: from which on two look the same.
        seed: of the lists.

    Returns:
        bool [n].
    """
    from tqdm import tqdm

    index = _empty_index(vectors, seed)
    keep = np.zeros(len(vectors), bool)
    with tqdm(total=len(vectors), unit=" nuclei", unit_scale=True, desc="alike", disable=None) as b:
        for start in range(0, len(vectors), PIECE):
            piece = np.ascontiguousarray(vectors[start : start + PIECE])
            new = np.ones(len(piece), bool)
            if index.ntotal:
                new = index.search(piece, 1)[0][:, 0] < cosine
            rows = np.flatnonzero(new)
            rows = rows[_first_of_alike(piece[rows], cosine)]
            keep[start + rows] = True
            if len(rows):
                index.add(piece[rows])
            b.update(len(piece))
    return keep


def _first_of_alike(piece: np.ndarray, cosine: float) -> np.ndarray:
    """The same among few vectors, bool [m]."""
    alike = np.tril(piece @ piece.T >= cosine, -1)
    keep = np.ones(len(piece), bool)
    # In order, since a vector that was removed removes none.
    for row in np.flatnonzero(alike.any(1)).tolist():
        keep[row] = not (alike[row] & keep).any()
    return keep


def _empty_index(vectors: np.ndarray, seed: int) -> Any:
    import faiss

    n, dims = vectors.shape
    if n <= EXACT:
        return faiss.IndexFlatIP(dims)
    lists = int(4 * n**0.5)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dims), dims, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.min_points_per_centroid, index.nprobe = seed, 1, PROBED
    some = np.random.default_rng([seed, 3]).permutation(n)[: max(LISTED, 40 * lists)]
    index.train(vectors[np.sort(some)])
    return index
