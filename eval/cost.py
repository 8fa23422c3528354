"""What a forward pass of an encoder costs: multiply-accumulates and parameters."""

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.readers import ClassToken, Tokens
from eval.samplers import Look
from lemon_muse.dense import DenseEncoder

log = logging.getLogger(__name__)


def cost(encoder: Any, look: Look) -> dict[str, float | int | str]:
    """GMACs of one forward pass, and parameters.

    Counted are matrix products, attention and convolutions of one window in evaluation mode, where
    the encoder lies; half of torch's FLOPs. With samplers map and tokens a window holds many
    nuclei, which share that cost.

    Args:
        encoder: the Encoder contract or a `DenseEncoder`; it is put into evaluation mode.
        look: how features are read off it.

    Returns:
        gmacs: 10⁹ multiply-accumulates of a window; left out, with a warning in the log, where the
            pass fails, or where nothing of it can be counted.
        gmacs_of: 'nucleus' (a window each) or 'window' (shared by the nuclei in it).
        parameters: how many, of the parts that such features need.
    """
    dense = isinstance(encoder, DenseEncoder)
    whole = look.valid is None
    used = encoder.network.encoder if dense and look.sampler != "map" else encoder
    parameters = {"parameters": sum(p.numel() for p in used.parameters())}
    try:
        gmacs = _flops(encoder, look) / 2e9
    except Exception as error:  # networks of users raise many kinds; the figures matter more
        first = str(error).split("\n")[0]
        log.warning("GMACs of %s cannot be counted: %s", getattr(encoder, "name", "?"), first)
        return {**parameters}
    if not gmacs:
        log.warning("%s runs nothing that can be counted", getattr(encoder, "name", "?"))
        return {**parameters}
    return {"gmacs": float(f"{gmacs:.6g}"), "gmacs_of": "nucleus" if whole else "window",
            **parameters}  # fmt: skip


@torch.no_grad()
def _flops(encoder: Any, look: Look) -> int:
    """FLOPs as torch counts them: two a multiply-accumulate."""
    parameter = next(encoder.parameters(), torch.empty(0))
    images = parameter.new_zeros((1, 3, look.side, look.side), dtype=torch.float32)
    images = images.to(parameter.dtype) if parameter.is_floating_point() else images
    runs = _runner(encoder.eval(), look)
    # torch counts the fused attention kernel of CPUs as nothing; the plain products are counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if look.valid is None:
            runs(images)
        else:
            middle = images.new_full((1, 2), look.side / 2)
            runs.nuclei(images, middle, torch.zeros(1, dtype=torch.int64, device=images.device))
    return counter.get_total_flops()


def _runner(encoder: Any, look: Look) -> Any:
    """The module that makes the features; what precedes the network costs next to nothing."""
    if look.sampler == "tokens":
        return Tokens(encoder, look.window, look.align)
    if look.sampler == "cls":
        return ClassToken(encoder, look.window, look.mpp)
    assert isinstance(encoder, nn.Module)
    return encoder
