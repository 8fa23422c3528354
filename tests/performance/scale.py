"""What grows with the number of nuclei: memory of `prep crops`, opening and ordering large sets.

`prep crops` runs on generated slides of 100,000 random points each, 10^5 to 10^6 of them, and 10^7
with LEMON_MUSE_SCALE=1e7 in the environment (20 GB of disk, LEMON_MUSE_SCRATCH says where). Its
peak memory is the sum of VmHWM over the processes of the job: an upper bound, since they do not
peak together. Indices of 10^6 and 10^8 nuclei are simulated; their shards are sparse files.
"""

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tests.performance.big import copy_as, write_repeated

EACH = 100_000  # nuclei of a slide
FIELD, TIMES = 2048, 4  # a slide is 8,192 px
SIZE, QUALITY = 32, 80  # of the crops: small ones, so that 10^7 fit on a disk
POLL = 0.2  # seconds
STEPS, SAMPLES, ROUNDS = 20, 4096, 3


def run() -> list[dict]:
    most = int(float(os.environ.get("LEMON_MUSE_SCALE", "1e6")))
    counts = [n for n in (10**5, 3 * 10**5, 10**6, 10**7) if n <= most]
    return [*_preparing(counts), *_indices((10**6, 10**8))]


def _preparing(counts: list[int]) -> list[dict]:
    """Rows of `prep crops` at each count."""
    rows: list[dict] = []
    base: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("LEMON_MUSE_SCRATCH")) as name:
        folder = Path(name)
        data = folder / "nuclei"
        data.mkdir()
        first = folder / "first.svs"
        write_repeated(first, field=FIELD, times=TIMES)
        slides: dict[str, Any] = {}
        for count in counts:
            for number in range(len(slides), count // EACH):
                slides |= _slide(first, data, number)
            index = {"schema": 1, "count": count, "slides": slides}
            (data / "nuclei.json").write_text(json.dumps(index), encoding="utf-8")
            seen = _prepare(data, folder / "crops", count)
            shutil.rmtree(folder / "crops")
            base = base or seen
            for what, value in seen.items():
                unit = {"peak memory": "MiB", "disk": "bytes/crop"}.get(what, "crops/s")
                row = _row(f"prep crops, {count:,} nuclei: {what}", value, unit)
                peer = {"peer": f"prep crops, {counts[0]:,} nuclei"}
                rows.append(row | peer | {"ratio": value / base[what]})
    return rows


def _slide(first: Path, data: Path, number: int) -> dict[str, Any]:
    """A slide of its own bytes and its table of random points; its entry of nuclei.json."""
    from data_prep.nuclei_formats.record import nuclei
    from data_prep.nuclei_table import write_table

    name, side = f"slide{number:04d}", FIELD * TIMES
    path = data.parent / f"{name}.svs"
    copy_as(first, path, number)
    points = np.random.default_rng(number).uniform(0, side - 1, (EACH, 2))
    about = {
        "slide": name, "path": str(path), "mpp": 0.25, "width": side, "height": side,
        "patient": f"patient{number // 2:04d}", "key": f"{number:016x}", "count": EACH,
    }  # fmt: skip
    found = nuclei(points, score=np.ones(EACH), kind=np.full(EACH, "neoplastic"))
    write_table(data / f"{name}.parquet", found, about)
    return {name: {"file": f"{name}.parquet", **about}}


def _prepare(data: Path, out: Path, count: int) -> dict[str, float]:
    """Run the job as users do; rates count its own CPU time, of all its processes."""
    words = [f"data={data}", f"out={out}", f"size={SIZE}", "encoding=jpeg", f"quality={QUALITY}"]
    command = [sys.executable, "-m", "launch.cli", "prep", "crops", *words, "workers=1"]
    began = time.perf_counter()
    # Files, not pipes: nobody reads while the job runs.
    with tempfile.TemporaryFile() as said:
        job = subprocess.Popen([*command, "scratch_gb=4"], stdout=said, stderr=said)
        peaks: dict[int, int] = {}
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(job.pid, peaks, done))
        watch.start()
        _, status, usage = os.wait4(job.pid, 0)
        wall = time.perf_counter() - began
        done.set()
        watch.join()
        if status:
            said.seek(0)
            raise RuntimeError(said.read().decode()[-2000:])
    files = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {
        "peak memory": sum(peaks.values()) / 1024,
        "rate in CPU time": count / (usage.ru_utime + usage.ru_stime),
        "rate in wall time, machine shared": count / wall,
        "disk": files / count,
    }


def _watch(job: int, peaks: dict[int, int], done: threading.Event) -> None:
    """Note the peak memory of a process and its descendants, kB by process id, until `done`."""
    while not done.wait(POLL):
        waiting = [job]
        while waiting:
            pid = waiting.pop()
            try:
                text = Path(f"/proc/{pid}/status").read_text()
                for task in Path(f"/proc/{pid}/task").iterdir():
                    waiting += [int(p) for p in (task / "children").read_text().split()]
            except OSError:  # it has ended meanwhile
                continue
            peak = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")]
            if peak:
                peaks[pid] = max(peaks.get(pid, 0), int(peak[0]))


def _indices(counts: tuple[int, ...]) -> list[dict]:
    """Rows of opening, ordering and locating at each count."""
    rows = []
    base: dict[str, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(dir=os.environ.get("LEMON_MUSE_SCRATCH")) as folder:
            _write_index(Path(folder), count)
            with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                found = [pool.apply(_use, (folder,)) for _ in range(ROUNDS)]
        seen = {what: statistics.median(f[what] for f in found) for what in found[0]}
        base = base or seen
        for what, value in seen.items():
            unit = "MiB" if what == "memory" else "ms"
            row = _row(f"index of {count:,} nuclei: {what}", value, unit)
            peer = f"index of {counts[0]:,} nuclei"
            rows.append(row | {"peer": peer, "ratio": value / base[what]})
    return rows


def _write_index(folder: Path, count: int) -> None:
    """An index as `write_index` makes it, and sparse files of the sizes that it states."""
    from lemon_muse.data.shards import BLOCK, SCHEMA

    blocks = np.zeros(count // 256, BLOCK)
    a_shard, each = 83, 256 * 64 * 64 * 3 + 40960  # blocks in 256 MiB; bytes of a block
    number = np.arange(len(blocks))
    blocks["shard"], blocks["count"], blocks["inner"] = number // a_shard, 256, 256
    blocks["offset"], blocks["length"] = number % a_shard * each, each - 40960
    buffer = io.BytesIO()
    np.save(buffer, blocks)
    shards = [
        {"name": f"crops-{i // 24:05d}-{i % 24:03d}.tar", "bytes": a_shard * each + 1024}
        for i in range(-(-len(blocks) // a_shard))
    ]
    for shard in shards:
        with (folder / str(shard["name"])).open("wb") as file:
            file.truncate(int(shard["bytes"]))
    stain = {"vectors": [[0.65, 0.7, 0.29], [0.07, 0.99, 0.11]], "strength": [1.1, 0.8]}
    about = {"source_mpp": 0.25, "count": 10_000, "dropped": 0, "stain": stain}
    slides = {
        f"TCGA-{i:06d}-01Z-00-DX1": {"patient": f"TCGA-{i // 2:06d}", **about}
        for i in range(max(1, count // 10_000))
    }
    header = {
        "schema": SCHEMA, "kind": "crops", "mpp": 0.25, "size": 64, "encoding": "raw",
        "quality": None, "count": len(blocks) * 256, "blocks": len(blocks),
        "blocks_crc": zlib.crc32(buffer.getvalue()), "mean": [0.7, 0.5, 0.6],
        "std": [0.2, 0.2, 0.2], "groups": [0], "slides": slides, "shards": shards,
    }  # fmt: skip
    (folder / "blocks.npy").write_bytes(buffer.getvalue())
    (folder / "index.json").write_text(json.dumps(header, indent=1), encoding="utf-8")


def _use(folder: str) -> dict[str, float]:
    """CPU time in ms, memory in MiB, of what training does with an index, in its own process."""
    from lemon_muse.data.order import Order
    from lemon_muse.data.shards import open_index

    before = _memory()
    found = {}
    seconds, index = _timed(lambda: open_index(Path(folder)))
    found["open"] = 1e3 * seconds
    seconds, order = _timed(lambda: Order(index.blocks["count"], 0, 4096, 256))
    found["order: make"] = 1e3 * seconds
    last = order.steps_a_pass
    for what, step in (("first step", 0), ("middle step", last // 2), ("next pass", last)):
        seconds, _ = _timed(lambda step=step: order.batch_at(step))  # type: ignore[misc]
        found[f"order: {what}"] = 1e3 * seconds
    seconds, _ = _timed(lambda: [order.batch_at(last + 1 + step) for step in range(STEPS)])
    found["order: a step after another"] = 1e3 * seconds / STEPS
    samples = np.random.default_rng(0).integers(0, index.count, SAMPLES)
    seconds, _ = _timed(lambda: index.locate(samples))
    found[f"locate {SAMPLES} samples"] = 1e3 * seconds
    found["memory"] = (_memory() - before) / 1024
    return found


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def _memory() -> int:
    """Peak memory of this process, kB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")))


def _row(what: str, ours: float, unit: str) -> dict[str, Any]:
    about = {"name": "scale", "cores": 1, "device": "cpu", "data": "generated"}
    return {**about, "what": what, "ours": ours, "unit": unit}
