"""The LEMON step: crops per second, share of time waiting for data, share of time making views.

Peer of the views: the same step fed by torchvision, image by image, in DataLoader workers. On a GPU
the batch is the recipe's; on a CPU it is small, and the ratio says how much of a step views cost.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lemon_muse.config import load
from lemon_muse.data.shards import open_index
from lemon_muse.data.writer import ShardWriter
from lemon_muse.recipe import Train
from lemon_muse.stop import Stop
from lemon_muse.train import Clock, Loop
from tests.performance.crops import real_crops
from tests.performance.views import UsualViews


def run(seconds: float = 40.0, batch: int | None = None) -> list[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = batch or (4096 if device.type == "cuda" else 128)
    crops, source = real_crops(max(8192, 2 * batch))
    with tempfile.TemporaryDirectory() as folder:
        _write(crops, Path(folder) / "crops")
        words = [
            f"data={folder}/crops",
            f"out={folder}/run",
            f"batch={batch}",
            "steps=100000",
            "workers=1",
        ]
        cfg = load(Train, [*words, f"compile={str(device.type == 'cuda').lower()}"])
        loop = Loop(cfg, open_index(cfg.data), device, None)
        ours = _ours(loop, seconds)
        usual = _usual(loop, crops, seconds)
    common = {
        "name": "training",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cores": torch.get_num_threads(), "data": source,
        "peer": "same step, views by torchvision in DataLoader workers",
    }  # fmt: skip
    what = f"ViT-S/8, batch {batch}, bf16"
    rows = [
        {**common, "what": f"{what}: crops/s",
         "ours": ours["rate"], "unit": "crops/s", "ratio": ours["rate"] / usual["rate"]},
        {**common, "what": f"{what}: waiting for data",
         "ours": 100 * ours["wait"], "unit": "% of the time", "ratio": None},
        {**common, "what": f"{what}: making views",
         "ours": 100 * ours["views"], "unit": "% of the time", "ratio": None},
        {**common, "what": f"{what}: waiting, usual way",
         "ours": 100 * usual["wait"], "unit": "% of the time", "ratio": None},
    ]  # fmt: skip
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.append(
            {**common, "what": f"{what}: peak memory", "ours": peak, "unit": "GiB", "ratio": None}
        )
    return rows


def _ours(loop: Loop, seconds: float) -> dict[str, float]:
    runner, clock, made = loop._runner(), Clock(), 0.0
    plain = loop.method._views

    def timed(batch: dict) -> list[torch.Tensor]:
        nonlocal made
        began = time.perf_counter()
        views = plain(batch)
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        made += time.perf_counter() - began
        return views

    loop.method._views = timed
    for batch in loop.batches.iterate(0, 100000):
        clock.got_data()
        loop._one_step(runner, batch, Stop())
        loop.step += 1
        clock.worked(loop.cfg.batch)
        if loop.step == 3:  # warmed up: files in the cache, kernels chosen
            clock.reset()
            made = 0.0
        if loop.step > 3 and clock.waited + clock.busy > seconds:
            break
        clock.start_waiting()
    loop.method._views = plain
    rates = clock.rates()
    total = clock.waited + clock.busy
    return {"rate": rates["crops_per_s"], "wait": rates["data_wait"], "views": made / total}


def _usual(loop: Loop, crops: np.ndarray, seconds: float) -> dict[str, float]:
    """The same networks and optimiser; views from PIL and torchvision in two worker processes."""
    views = UsualViews(crops)
    data = torch.utils.data.DataLoader(
        views,
        batch_size=loop.cfg.batch,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    clock, steps = Clock(), 0
    runner = loop._runner()
    plain = loop.method._views
    while True:
        for first, second in data:
            clock.got_data()
            pair = [first.to(loop.device), second.to(loop.device)]
            loop.method._views = lambda _, pair=pair: pair
            pixels = np.zeros((len(first), 2, 2, 3), np.uint8)
            loop._one_step(runner, {"pixels": pixels, "samples": np.arange(len(first))}, Stop())
            steps += 1
            clock.worked(loop.cfg.batch)
            if steps == 3:
                clock.reset()
            if steps > 3 and clock.waited + clock.busy > seconds:
                loop.method._views = plain
                rates = clock.rates()
                return {"rate": rates["crops_per_s"], "wait": rates["data_wait"]}
            clock.start_waiting()


def _write(crops: np.ndarray, folder: Path) -> None:
    from tests.conftest import blob_columns

    with ShardWriter(folder, size=64, mpp=0.25) as writer:
        for start in range(0, len(crops), 256):
            part = crops[start : start + 256]
            writer.write(part, blob_columns(start, len(part)))


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--seconds", type=float, default=40.0)
    words.add_argument("--batch", type=int)
    given = words.parse_args()
    print(*run(given.seconds, given.batch), sep="\n")
