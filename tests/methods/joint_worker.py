"""One rank of test_joint_run.py: steps of joint training through DDP; writes what it saw."""

import sys
from pathlib import Path

import numpy as np
import torch

from lemon_muse import distributed
from lemon_muse.train import Loop
from tests.methods.joint_small import joint_loop, joint_of
from tests.methods.muse_small import a_batch
from tests.methods.muse_worker import WORDS, Arrays, observe


def watch(loop: Loop, first: int, last: int) -> Arrays:
    """What `observe` sees, and this rank's crops."""
    seen, method = {}, joint_of(loop)
    for step in range(first, last):
        batch = a_batch(loop, step)
        crops = method.make_crops(batch, method.make_views(batch))
        seen |= {f"{step} rows crops {v}": view.numpy() for v, view in enumerate(crops.views)}
    return seen | observe(loop, first, last)


def main(out: Path, data: Path) -> None:
    torch.set_num_threads(1)
    with distributed.process_group("cpu", timeout_minutes=3):
        out.mkdir(parents=True, exist_ok=True)
        seen = watch(joint_loop(data, out, *WORDS), 0, 2)
        np.savez(out / f"rank{distributed.rank()}.npz", **seen)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
