"""One rank of test_dinov2_run.py: steps of DINOv2 through DDP; writes what it saw."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lemon_muse import distributed
from lemon_muse.spread import kde, koleo
from lemon_muse.train import Loop
from tests.methods.dinov2_small import method_of, open_loop

# Plain SGD: Adam would blow rounding up to whole steps where a gradient is 0 but for rounding.
WORDS = ["optim={name: sgd, lr: 0.02, warmup: 0, weight_decay: 0}", "method.momentum=0.9"]
VARIANTS = {
    "koleo": ["method.centring=centre"],
    "kde": ["method={spread: kde, locals: 0, spread_weight: 1}"],
}
Arrays = dict[str, np.ndarray]


class Features(nn.Module):
    """A linear layer whose outputs are spread."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.linear(x)
        return {"koleo": koleo(found), "kde": kde(found)}


def terms() -> Arrays:
    """Value and gradient of each term alone, as DDP means them."""
    rank, world, seen = distributed.rank(), distributed.world(), {}
    inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    inputs[5] = inputs[20] * 1.001  # the nearest row is on another rank
    for name in ("koleo", "kde"):
        net = Features()
        runner = DistributedDataParallel(net) if world > 1 else net
        value = runner(inputs.chunk(world)[rank])[name]
        value.backward()
        seen[f"{name} value"] = distributed.mean_over_ranks(value.detach().clone()).numpy()
        seen[f"{name} grad"] = net.linear.weight.grad.numpy().copy()  # type: ignore[union-attr]
    return seen


def observe(loop: Loop, steps: int) -> Arrays:
    """Masks, loss, gradients and centres of the first steps; in step 1 half a batch has no mask."""
    method, seen, runner = method_of(loop), {}, loop._runner()
    for step in range(steps):
        loop.step = step
        micro = loop._parts(loop.batches.batch_at(step))[0]
        mask = micro["views"][-1]["mask"]
        if step == 1:
            first = distributed.rank() * len(mask)
            mask[(torch.arange(len(mask)) + first) < loop.cfg.batch // 2] = False
        method.train()
        out = runner(micro, step)
        out["loss"].backward()
        seen[f"{step} rows mask"] = mask.numpy()
        for name, value in out.items():
            if value.ndim == 0:
                mean = distributed.mean_over_ranks(value.detach().clone().float())
                seen[f"{step} {name}"] = mean.numpy()
        for name, p in method.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, name
                seen[f"{step} grad {name}"] = p.grad.numpy().copy()
        loop.optimiser.step()
        loop.optimiser.zero_grad(set_to_none=True)
        method.after_step(step)
        for name, b in method.named_buffers():
            seen[f"{step} buffer {name}"] = b.numpy().copy()
        for name, p in method.teacher.named_parameters():
            seen[f"{step} teacher {name}"] = F.normalize(p, dim=-1).numpy().copy()
    return seen


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with distributed.process_group("cpu", timeout_minutes=3):
        rank = distributed.rank()
        np.savez(out / f"terms{rank}.npz", **terms())  # type: ignore[arg-type]
        for name, words in VARIANTS.items():
            seen = observe(open_loop(data, out / name, *WORDS, *words), 3)
            np.savez(out / f"{name}{rank}.npz", **seen)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
