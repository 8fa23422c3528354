"""The momentum (teacher) copy of a network."""

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def momentum_copy(network: Network) -> Network:
    """An equal copy without gradients. It stays in training mode: its BN uses batch statistics."""
    copied = copy.deepcopy(network)
    copied.requires_grad_(False)
    return copied


@torch.no_grad()
def update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- m * teacher + (1 - m) * student, parameters only.

    Buffers are left alone: the teacher's BN statistics follow its own forward passes, as in the
    MoCo v3 and DINO references.
    """
    ours: list[torch.Tensor] = list(teacher.parameters())
    theirs = [p.detach() for p in student.parameters()]
    torch._foreach_lerp_(ours, theirs, 1.0 - momentum)
