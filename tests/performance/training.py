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
from PIL import Image

from lemon_muse.config import load
from lemon_muse.data.augment import ViewConfig
from lemon_muse.data.shards import open_index
from lemon_muse.data.writer import ShardWriter
from lemon_muse.recipe import Train
from lemon_muse.stop import Stop
from lemon_muse.train import Clock, Loop
from tests.performance.crops import real_crops
from tests.performance.views import pil_chain


class UsualViews(torch.utils.data.Dataset):
    """Two views of an image by PIL and torchvision, as a DataLoader worker makes them."""

    def __init__(self, crops: np.ndarray) -> None:
        self.crops, self.chain = crops, pil_chain(ViewConfig())

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.fromarray(self.crops[i])
        return self.chain(image), self.chain(image)


def run(seconds: float = 40.0, batch: int | None = None) -> list[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    batch = batch or (4096 if gpu else 128)
    steps = {
        f"ViT-S/8, batch {batch}": [f"batch={batch}", f"compile={str(gpu).lower()}"],
        "demo's ResNet, batch 256": ["demo.yaml", "view={policy: a1+gray}"],
    }
    crops, source = real_crops(max(8192, 2 * batch))
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        _write(crops, Path(folder) / "crops")
        places = [f"data={folder}/crops", f"out={folder}/run", "steps=100000", "workers=1"]
        for what, words in steps.items():
            file = [w for w in words if w.endswith(".yaml")]
            cfg = load(Train, [*file, *places, *[w for w in words if w not in file]])
            loop = Loop(cfg, open_index(cfg.data), device, None)
            rows += _rows(what, _ours(loop, seconds), _usual(loop, crops, seconds))
    name = torch.cuda.get_device_name() if gpu else "cpu"
    about = {"name": "training", "device": name, "cores": torch.get_num_threads(), "data": source}
    return [{**about, **row} for row in rows]


def _rows(what: str, ours: dict[str, float], usual: dict[str, float]) -> list[dict]:
    peer = {"peer": "the same step, views by torchvision in 2 DataLoader workers"}
    share = {"unit": "% of the time", "ratio": None, **peer}
    rate = {"unit": "crops/s", "ratio": ours["rate"] / usual["rate"], **peer}
    rows = [
        {"what": f"{what}: speed", "ours": ours["rate"], **rate},
        {"what": f"{what}: waiting for data", "ours": 100 * ours["wait"], **share},
        {"what": f"{what}: making views", "ours": 100 * ours["views"], **share},
        {"what": f"{what}: waiting, usual way", "ours": 100 * usual["wait"], **share},
    ]
    if torch.cuda.is_available():
        memory = {"unit": "GiB", "ratio": None, **peer}
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.append({"what": f"{what}: peak memory", "ours": peak, **memory})
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
