"""A tree of clusters: k-means, and k-means of its centres (Vo et al. 2024).

"Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach", TMLR 2024,
section 3: plain k-means puts most centres where most points are. K-means of points that were drawn
evenly from the clusters, a few times over, spreads the centres over all looks that occur.
"""

from dataclasses import dataclass

import numpy as np

TURNS = 20  # of k-means
NEAREST = 32  # points of a cluster that a further round sees


@dataclass(frozen=True)
class Tree:
    """Clusters of n points.

    Attributes:
        leaf: cluster of every point, int32 [n], 0 to leaves - 1, none empty.
        above: for each level but the last, the node of the next one that holds a node, int32.
    """

    leaf: np.ndarray
    above: tuple[np.ndarray, ...]

    @property
    def leaves(self) -> int:
        return int(self.leaf.max()) + 1


def grow(points: np.ndarray, levels: tuple[int, ...], *, rounds: int, seed: int) -> Tree:
    """Cluster points, then the centres, then theirs.

    Args:
        points: float32 [n, d].
        levels: clusters of each level, falling; the first is at most n.
        rounds: how often k-means is repeated on points drawn evenly from the clusters.
        seed: of k-means.
    """
    assigned: list[np.ndarray] = []
    for number, k in enumerate(levels):
        centres = _means(points, min(k, len(points)), seed + number)
        for turn in range(rounds):
            some = _evenly(points, centres, NEAREST)
            if len(some) < len(centres):
                break
            centres = _means(points[some], len(centres), seed + number + 1000 * (turn + 1))
        found, node = np.unique(_nearest(points, centres)[0], return_inverse=True)
        assigned.append(node.astype(np.int32))
        points = centres[found]  # without those that are nobody's nearest
    return Tree(assigned[0], tuple(assigned[1:]))


def default_levels(count: int) -> tuple[int, ...]:
    """About √n leaves, 4 to 10,000, and a tenth of that a level, as long as it is 4 or more."""
    found = [int(np.clip(round(count**0.5), min(4, count), 10_000))]
    while len(found) < 3 and found[-1] // 10 >= 4:
        found.append(found[-1] // 10)
    return tuple(found)


def even_shares(tree: Tree, *, by_level: bool) -> np.ndarray:
    """Share of each leaf, float64 [leaves], sum 1.

    Args:
        tree: the clusters.
        by_level: the top clusters get the same, each divides its part evenly among those below it;
            False: every leaf gets the same.
    """
    if not by_level:
        return np.full(tree.leaves, 1 / tree.leaves)
    share = np.ones(1)
    above = [np.zeros(int(tree.above[-1].max()) + 1 if tree.above else tree.leaves, np.int32)]
    for parent in [*above, *reversed(tree.above)]:
        share = share[parent] / np.bincount(parent)[parent]
    return share


def capped(share: np.ndarray, size: np.ndarray, most: float) -> np.ndarray:
    """How often a member of each cluster comes in a pass, float64 [k], at most `most` times.

    What a cluster may not have is divided among the others in proportion to their shares. A pass
    has as many samples as there are members.

    Args:
        share: of the samples that each cluster gets, float [k], sum 1.
        size: members, int [k], > 0.
        most: >= 1.
    """
    times = share * size.sum() / size
    full = np.zeros(len(size), bool)
    while ((over := times > most * (1 + 1e-9)) & ~full).any():
        full |= over
        left = size.sum() - most * size[full].sum()
        rest = (share[~full]).sum()
        times = np.where(full, most, share * (left / rest if rest else 0) / size)
    return times


def _means(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Centres of k-means, float32 [k, d]; of at most 256 points a centre."""
    import faiss

    means = faiss.Kmeans(
        points.shape[1], k, niter=TURNS, seed=seed % 2**31, min_points_per_centroid=1
    )
    means.train(np.ascontiguousarray(points))
    return np.array(means.centroids, np.float32)


def _nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the nearest centre, int64 [n], and the squared distance to it."""
    import faiss

    index = faiss.IndexFlatL2(centres.shape[1])
    index.add(np.ascontiguousarray(centres))
    far, found = index.search(np.ascontiguousarray(points), 1)
    return found[:, 0], far[:, 0]


def _evenly(points: np.ndarray, centres: np.ndarray, most: int) -> np.ndarray:
    """Rows of the `most` points of each cluster that are nearest to its centre, int64, sorted."""
    node, far = _nearest(points, centres)
    order = np.lexsort((far, node))
    size = np.bincount(node, minlength=len(centres))
    place = np.arange(len(node)) - np.repeat(np.cumsum(size) - size, size)
    return np.sort(order[place < most])
