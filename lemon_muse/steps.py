"""What a step of a run is made of, as a function of (seed, step): its samples and its views.

The loop trains on it; whoever wants to look at a step comes here too, and sees the same.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lemon_muse.data.compose import select
from lemon_muse.data.reader import Batches, CropBatches
from lemon_muse.data.rois import RoiBatches
from lemon_muse.data.shards import Index
from lemon_muse.recipe import Train

Views = list[dict[str, torch.Tensor]]
Draw = Callable[[int, torch.Generator], Views]
VIEWS = 1 << 20  # salt of the views; the ranks' are below


def open_batches(
    cfg: Train,
    index: Index,
    reads: str,
    *,
    slides: bool = False,
    rank: int = 0,
    world: int = 1,
    rows: np.ndarray | None = None,
) -> Batches:
    """The batches of a run.

    Args:
        cfg: its settings.
        index: of its shards.
        reads: what the method reads, 'crops' or 'rois'.
        slides: whether batches of crops hold the number of each sample's slide.
        rank: which part.
        world: how many parts.
        rows: int64, ascending; read these rows of the global batch instead of a rank's part.
    """
    kind = RoiBatches if reads == "rois" else CropBatches
    batches: Batches = kind(
        index,
        seed=cfg.seed,
        batch=cfg.batch,
        window=cfg.shuffle_blocks,
        rank=rank,
        world=world,
        workers=cfg.workers,
        chosen=select(index, cfg.subset, reads="rois" if reads == "rois" else "crops"),
    )
    batches.with_slides = slides
    if rows is not None:
        batches.part = rows
    return batches


def views_of(cfg: Train, step: int, draw: Draw) -> Views:
    """Parameters of the views of a step for the global batch; `draw` is the method's."""
    return draw(cfg.batch, torch.Generator().manual_seed(mix(cfg.seed, step, VIEWS)))


def parts(batch: dict[str, torch.Tensor], views: Views, count: int) -> list[dict[str, Any]]:
    """A rank's batch and its rows of the views in `count` equal parts."""
    each = len(batch["pixels"]) // count
    cuts = [slice(i * each, (i + 1) * each) for i in range(count)]
    return [
        {
            **{k: v[c] for k, v in batch.items()},
            "views": [{k: v[c] for k, v in view.items()} for view in views],
        }
        for c in cuts
    ]


def precision(cfg: Train) -> torch.dtype:
    """What networks and views are computed in."""
    return torch.bfloat16 if cfg.precision == "bf16" else torch.float32


def mix(seed: int, step: int, salt: int) -> int:
    """One generator seed of three numbers (splitmix64 rounds; consecutive steps are unrelated)."""
    value = (
        seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + salt * 0x94D049BB133111EB
    ) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return (value ^ (value >> 31)) % 2**63
