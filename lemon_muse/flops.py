"""Floating-point operations of a training step and the device's peak, for the MFU in the log."""

import copy
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lemon_muse.methods.contract import Method

# Dense bf16 peak, TFLOP/s, from the makers' data sheets.
PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "L40S": 362.1, "V100": 125.0}


def of_step(method: Method, batch: dict[str, Any]) -> float:
    """FLOPs a sample of forward and backward (matrix products, convolutions), on a copy."""
    rows = min(4, len(batch["pixels"]))
    small = {
        **{k: v[:rows] for k, v in batch.items() if k != "views"},
        "views": [{k: v[:rows] for k, v in view.items()} for view in batch["views"]],
    }
    twin = copy.deepcopy(method)
    with FlopCounterMode(display=False) as counter:
        twin(small, 0)["loss"].backward()
    return counter.get_total_flops() / rows


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the device can give: the data sheet where known, else a measured product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, value in PEAKS.items():
            if key in name:
                return value * 1e12
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best
