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
