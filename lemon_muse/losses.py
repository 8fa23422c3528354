"""Losses. Everything here is computed in fp32, whatever the autocast around it."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from lemon_muse import distributed


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    *,
    temperature: float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrast each query with the keys of all ranks; its own key is the positive one.

    MoCo v3, algorithm 1 (facebookresearch/moco-v3, moco/builder.py): cosine similarity over T,
    labels offset by the rank, mean cross-entropy times 2 T.

    Args:
        queries: float [n, d], with gradient.
        keys: float [n, d], row i belongs to query i; gathered over ranks without gradient.
        temperature: T.
        groups: int64 [n], of query and key i. A key of the query's own group is no negative: it is
            left out of the sum, unless it is the positive. None = every other key is a negative.

    Returns:
        A scalar; chance level is `2 T ln(n * world)`, with groups `group_info_nce_chance`.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(queries.float(), dim=1)
        keys = distributed.gather(F.normalize(keys.detach().float(), dim=1))
        logits = queries @ keys.T / temperature  # [n, n * world]
        labels = (
            torch.arange(len(queries), device=logits.device) + len(queries) * distributed.rank()
        )
        if groups is not None:
            left_out = same_group(groups)
            left_out.scatter_(1, labels[:, None], False)
            logits = logits.masked_fill(left_out, -torch.inf)
        return F.cross_entropy(logits, labels) * (2 * temperature)


def same_group(groups: torch.Tensor) -> torch.Tensor:
    """Which samples of all ranks share the group of a sample of this rank: bool [n, n * world]."""
    return groups[:, None] == distributed.gather(groups)[None]


def info_nce_chance(batch: int, temperature: float) -> float:
    """Value of `info_nce` when all features are equal: 2 T ln(global batch)."""
    return 2 * temperature * math.log(batch)


def group_info_nce_chance(batch: int, temperature: float, sizes: Sequence[int]) -> float:
    """About the value of `info_nce` with groups when all features are equal.

    A sample of a group with the share p of the set meets (batch - 1) (1 - p) negatives on average,
    if the batch is a random part of the set. The logarithm of that average stands for the average
    of the logarithm, and a batch that is mixed from few blocks holds fewer groups than the set.

    Args:
        batch: global batch.
        temperature: T.
        sizes: samples of each group in the set.
    """
    total = sum(sizes)
    negatives = [(batch - 1) * (1 - size / total) for size in sizes]
    logs = [size / total * math.log1p(n) for size, n in zip(sizes, negatives, strict=True)]
    return 2 * temperature * sum(logs)
