"""Losses. Everything here is computed in fp32, whatever the autocast around it."""

import math

import torch
from torch.nn import functional as F

from lemon_muse import distributed


def info_nce(queries: torch.Tensor, keys: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Contrast each query with the keys of all ranks; its own key is the positive one.

    MoCo v3, algorithm 1 (facebookresearch/moco-v3, moco/builder.py): cosine similarity over T,
    labels offset by the rank, mean cross-entropy times 2 T.

    Args:
        queries: float [n, d], with gradient.
        keys: float [n, d], row i belongs to query i; gathered over ranks without gradient.
        temperature: T.

    Returns:
        A scalar; chance level is `2 T ln(n * world)`.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = F.normalize(queries.float(), dim=1)
        keys = distributed.gather(F.normalize(keys.detach().float(), dim=1))
        logits = queries @ keys.T / temperature  # [n, n * world]
        labels = (
            torch.arange(len(queries), device=logits.device) + len(queries) * distributed.rank()
        )
        return F.cross_entropy(logits, labels) * (2 * temperature)


def info_nce_chance(batch: int, temperature: float) -> float:
    """Value of `info_nce` when all features are equal: 2 T ln(global batch)."""
    return 2 * temperature * math.log(batch)
