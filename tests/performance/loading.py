"""Crops per second per core from shards, and bytes a crop, against one image per sample.

Peer: WebDataset with one PNG and one JSON a nucleus, `.decode("pil")`, as these data sets are
usually stored. Everything is read from the page cache; figures are process CPU time on one thread.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from lemon_muse.data.reader import CropBatches
from lemon_muse.data.shards import open_index
from lemon_muse.data.writer import ShardWriter
from tests.performance.crops import real_crops

COUNT, ROUNDS = 8192, 5


def run() -> list[dict]:
    torch.set_num_threads(1)
    crops, source = real_crops(COUNT)
    with tempfile.TemporaryDirectory() as folder:
        candidates = _write(crops, Path(folder))
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(ROUNDS):  # interleaved: all candidates meet the same machine
            for name, (read, _) in candidates.items():
                began = time.process_time()
                seen = read()
                times[name].append((time.process_time() - began) / seen)
    rates = {name: 1 / statistics.median(t) for name, t in times.items()}
    peer = "PNG per sample, webdataset, PIL"
    rows = []
    for name, (_, size) in candidates.items():
        common = {"name": "loading", "cores": 1, "device": "cpu", "data": source}
        rows.append(
            {
                **common,
                "what": f"read: {name}",
                "peer": peer,
                "ours": rates[name],
                "unit": "crops/s/core",
            }
            | {"ratio": rates[name] / rates[peer]}
        )
        rows.append(
            {**common, "what": f"disk: {name}", "peer": peer, "ours": size, "unit": "bytes/crop"}
            | {"ratio": size / candidates[peer][1]}
        )
    return rows


def _write(crops: np.ndarray, folder: Path) -> dict[str, tuple[Callable[[], int], float]]:
    """name: (function that reads every crop into uint8 arrays and counts them, bytes a crop)."""
    out: dict[str, tuple[Callable[[], int], float]] = {}
    for name, ending, options in (
        ("PNG per sample, webdataset, PIL", "png", {}),
        ("JPEG q90 per sample, webdataset, PIL", "jpg", {"quality": 90, "subsampling": 0}),
    ):
        path = folder / f"{ending}.tar"
        with webdataset.TarWriter(str(path), mtime=0) as tar:
            for i, crop in enumerate(crops):
                buffer = io.BytesIO()
                Image.fromarray(crop).save(buffer, "JPEG" if ending == "jpg" else "PNG", **options)
                meta = {"slide": "s", "x": 1.0, "y": 2.0, "mpp": 0.25}
                tar.write(
                    {
                        "__key__": f"{i:09d}",
                        ending: buffer.getvalue(),
                        "json": json.dumps(meta).encode(),
                    }
                )
        out[name] = (lambda p=path, e=ending: _read_samples(p, e), path.stat().st_size / len(crops))
    for name, encoding, quality in (
        ("block of 256, raw", "raw", 95),
        ("block of 256, JPEG sheet q95 4:4:4", "jpeg", 95),
        ("block of 256, JPEG sheet q90 4:4:4", "jpeg", 90),
    ):
        place = folder / f"{encoding}{quality}"
        with ShardWriter(place, size=64, mpp=0.25, encoding=encoding, quality=quality) as writer:
            for start in range(0, len(crops), 256):
                part = crops[start : start + 256]
                n = np.arange(start, start + len(part))
                writer.write(
                    part,
                    {
                        "slide": np.full(len(n), "slide"), "patient": np.full(len(n), "patient"),
                        "id": n, "x": n, "y": n, "mpp": np.full(len(n), 0.25),
                        "source_mpp": np.full(len(n), 0.5), "type": np.full(len(n), ""),
                        "score": np.ones(len(n)),
                    },
                )  # fmt: skip
        size = sum(p.stat().st_size for p in place.iterdir()) / len(crops)
        out[name] = (lambda p=place: _read_shards(p), size)
    return out


def _read_samples(path: Path, ending: str) -> int:
    count = 0
    for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"):
        np.asarray(sample[ending])
        count += 1
    return count


def _read_shards(folder: Path) -> int:
    """Shuffled batches of 1024 through the index, in this thread; with checksums of all blocks."""
    index = open_index(folder)
    reader = CropBatches(index, seed=0, batch=1024, window=8, rank=0, world=1, workers=0)
    count = 0
    for _ in range(2):  # two passes: the checksum of a block is taken once a run
        for step in range(reader.order.steps_a_pass):
            count += len(reader.batch_at(step)["pixels"])
    return count
