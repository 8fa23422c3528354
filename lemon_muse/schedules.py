"""Schedules: functions of the step and nothing else, so that resume needs no replay."""

import math


def cosine(step: int, steps: int, *, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps`."""
    share = min(max(step / max(steps, 1), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


def warmup_cosine(step: int, steps: int, *, warmup: int, peak: float, end: float = 0.0) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine to `end`.

    The learning-rate curve of the MoCo v3 reference, per step instead of per fractional epoch
    (facebookresearch/moco-v3, main_moco.py).
    """
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, steps - warmup, start=peak, end=end)


def linear_warmup(step: int, *, warmup: int, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at step `warmup`, then constant.

    The teacher temperature of DINO, per step instead of per epoch (facebookresearch/dino,
    main_dino.py). Its weight decay, 0.04 -> 0.4, is `cosine(step, steps, start=0.04, end=0.4)`.
    """
    share = min(max(step / warmup, 0.0), 1.0) if warmup > 0 else 1.0
    return start + (end - start) * share
