"""Run under torchrun by test_distributed.py: one rank of a short training; writes what it saw."""

import sys
from pathlib import Path

import numpy as np
import torch

from lemon_muse import distributed
from lemon_muse.config import load
from lemon_muse.data.shards import open_index
from lemon_muse.recipe import Train
from lemon_muse.train import Loop


def main(out: Path, words: list[str]) -> None:
    torch.set_num_threads(1)
    cfg = load(Train, words)
    with distributed.process_group("cpu") as device:
        loop = Loop(cfg, open_index(cfg.data), device, None)
        seen: dict[str, np.ndarray] = {}
        runner = loop._runner()
        for step, batch in enumerate(loop.batches.iterate(0, cfg.steps)):
            loop.step = step
            micro = loop._parts(batch)[0]
            loop.method.train()
            result = runner(micro, step)
            result["loss"].backward()
            seen[f"samples{step}"] = batch["samples"]
            seen[f"view{step}"] = loop.method.views.make(micro)[0].numpy()  # type: ignore[union-attr]
            seen[f"loss{step}"] = distributed.mean_over_ranks(
                result["loss"].detach().clone()
            ).numpy()
            grads = [p.grad.flatten() for p in loop.method.parameters() if p.grad is not None]
            seen[f"grad{step}"] = torch.cat(grads).numpy()
            for group in loop.optimiser.param_groups:
                group["lr"] = 1e-3
            loop.optimiser.step()
            loop.optimiser.zero_grad(set_to_none=True)
            loop.method.after_step(step)
        buffers = [b.flatten().float() for n, b in loop.method.named_buffers() if "running" in n]
        seen["buffers"] = torch.cat(buffers).numpy()
        np.savez(out / f"rank{distributed.rank()}.npz", **seen)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
