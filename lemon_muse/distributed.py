"""One process or many on the same path: without torchrun every function here is the identity.

Ranks come from the environment that torchrun or the SLURM launcher sets (RANK, WORLD_SIZE,
LOCAL_RANK and either MASTER_ADDR, MASTER_PORT or, from the launcher, a file to meet at).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce as all_reduce_with_gradient

from lemon_muse import rendezvous
from lemon_muse.errors import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str, *, timeout_minutes: float = 30) -> Iterator[torch.device]:
    """Join the other ranks (if there are any) and yield this rank's device.

    Args:
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        timeout_minutes: a collective that waits longer than this fails instead of hanging.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        rendezvous.join(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield chosen
    finally:
        if started and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """'auto' is the rank's own GPU where there is one, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device '{device}' is not known; use auto, cpu, cuda or cuda:0.") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "device=cuda, but torch sees no GPU here; use device=cpu or device=auto."
            )
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank)
    return chosen


@torch.no_grad()
def gather(x: torch.Tensor) -> torch.Tensor:
    """Rows of all ranks in rank order, [n, …] -> [world * n, …]; no gradient; n is equal on all."""
    if world() == 1:
        return x
    out = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(out, x.contiguous())
    return torch.cat(out)


@torch.no_grad()
def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise mean over ranks of a float tensor."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


@torch.no_grad()
def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over ranks; `values` is overwritten where there are several."""
    if world() > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def logsumexp_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise log of the sum over ranks of exp(values); -inf stands for a rank with nothing."""
    if world() == 1:
        return values
    top = values.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    top = torch.where(top.isfinite(), top, 0.0)
    total = (values - top).exp()
    dist.all_reduce(total)
    return total.log() + top


def agree(flags: list[bool], device: torch.device) -> list[bool]:
    """True where any rank says so, the same on all ranks."""
    if world() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(v) for v in votes.tolist()]


def objects_of_ranks(item: Any) -> list[Any]:
    """A small picklable item of every rank, in rank order."""
    if world() == 1:
        return [item]
    items: list[Any] = [None] * world()
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    if world() > 1:
        dist.barrier()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batch of all ranks, on any device.

    torch's own SyncBatchNorm runs on GPUs only; this one serves CPU ranks (and the tests that
    K ranks equal one). Equal local batch sizes are assumed. What timm puts behind the normalisation
    inside its batch norms (`drop`, `act`) stays: under the same names, so that weights load.
    """

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """What timm's BatchNormAct2d does next; nothing behind a plain batch norm."""
        for name in ("drop", "act"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x

    def _check_input_dim(self, x: torch.Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.dim()}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or world() == 1:
            return self.after(super().forward(x))
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.float()
        count = x.numel() // x.shape[1] * world()
        mean = all_reduce_with_gradient(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = all_reduce_with_gradient(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None and self.running_var is not None
                self.num_batches_tracked += 1
                momentum = self.momentum if self.momentum is not None else 0.1
                unbiased = variance * count / max(count - 1, 1)
                self.running_mean.lerp_(mean.to(self.running_mean), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var), momentum)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.float().view(shape) + self.bias.float().view(shape)
        return self.after(out.to(x.dtype))


def sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Turn the module's batch norms into ones over all ranks; unchanged with one rank."""
    if world() == 1:
        return module
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        # torch's own would lose the activations inside timm's batch norms.
        return convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            new = SyncBatchNorm(
                child.num_features,
                eps=child.eps,
                momentum=child.momentum,
                affine=child.affine,
                track_running_stats=child.track_running_stats,
            )
            new.load_state_dict(child.state_dict())
            for copied, own in zip(new.parameters(), child.parameters(), strict=True):
                copied.requires_grad_(own.requires_grad)  # a momentum copy stays frozen
            for part in ("drop", "act"):
                if hasattr(child, part):
                    setattr(new, part, getattr(child, part))
            setattr(module, name, new)
        else:
            sync_batch_norm(child, device)
    return module
