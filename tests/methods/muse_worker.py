"""One rank of test_muse_run.py: steps of MUSE through DDP; writes what it saw."""

import sys
from pathlib import Path

import numpy as np
import torch

from lemon_muse import distributed
from lemon_muse.train import Loop
from tests.methods.muse_small import method_of, open_loop

# Plain SGD: Adam would blow rounding up to whole steps where a gradient is 0 but for rounding.
WORDS = ["optim={name: sgd, lr: 0.3, warmup: 0, weight_decay: 0}", "method.momentum=0.9"]
Arrays = dict[str, np.ndarray]


def observe(loop: Loop, first: int, last: int) -> Arrays:
    """Samples, views, loss, gradients, centres and BN statistics of the steps [first, last)."""
    method, seen, runner = method_of(loop), {}, loop._runner()
    for step in range(first, last):
        loop.step = step
        batch = loop.batches.batch_at(step)
        micro = loop._parts(batch)[0]
        method.train()
        out = runner(micro, step)
        out["loss"].backward()
        views = method.make_views(micro)
        # Of this rank; how many slots it has for nuclei is its own affair.
        seen[f"{step} rows samples"] = batch["samples"]
        seen[f"{step} rows counts"] = batch["counts"]
        seen[f"{step} rows images"] = views[0].images.numpy()
        seen[f"{step} rows inside"] = torch.stack([v.inside.sum(1) for v in views], 1).numpy()
        for name, value in out.items():
            if value.ndim == 0:
                mean = distributed.mean_over_ranks(value.detach().clone().float())
                seen[f"{step} {name}"] = mean.numpy()
        for name, p in method.student.named_parameters():
            assert p.grad is not None, name
            seen[f"{step} grad {name}"] = p.grad.numpy().copy()
        loop.optimiser.step()
        loop.optimiser.zero_grad(set_to_none=True)
        method.after_step(step)
        for name, b in method.named_buffers():
            if "running" in name or "centres" in name:
                seen[f"{step} buffer {name}"] = b.numpy().copy()
    loop.step = last
    return seen


def main(out: Path, steps: int, sets: list[str]) -> None:
    torch.set_num_threads(1)
    with distributed.process_group("cpu", timeout_minutes=3):
        for data in sets:
            folder = out / Path(data).name
            loop = open_loop(Path(data), folder, *WORDS)
            seen = observe(loop, 0, steps)
            loop.save()
            np.savez(folder / f"rank{distributed.rank()}.npz", **seen)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
