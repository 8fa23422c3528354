"""The MUSE step: where its time goes, what NuLo costs beside plain DINO, memory with many nuclei.

Process CPU time on one thread (a GPU: wall time), medians over steps, all variants in turn in one
run. ROIs are generated tissue unless real ones are there. The peer is the same step without the
nucleus loss: DINO on the same views.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_prep import rois
from lemon_muse.config import load
from lemon_muse.recipe import Train
from lemon_muse.stop import Stop
from lemon_muse.train import Loop
from tests.performance.big import write_repeated
from tests.performance.crops import REAL

DINO = "the same step without the nucleus loss (DINO)"
SMALL = ["brca_muse.yaml"]
# The published sizes; the batch is what a CPU can hold.
FULL = ["muse_vits16.yaml", "view.local_size=96"]
MEMORY = """
import sys, torch
from pathlib import Path
from lemon_muse import dino
from lemon_muse.matching import Teacher
torch.manual_seed(0)
chunk, prototypes, nuclei = (int(v) for v in sys.argv[1:4])
unit = torch.nn.functional.normalize
w = unit(torch.randn(prototypes, 256), dim=1).requires_grad_()
keys = [torch.arange(nuclei)] * 2 + [torch.arange(i, i + nuclei // 8) for i in range(8)]
x = [unit(torch.randn(len(k), 256), dim=1).requires_grad_() for k in keys]
y = [unit(torch.randn(nuclei, 256), dim=1) for _ in range(2)]
def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
target = Teacher(w.detach(), torch.zeros(prototypes), 0.04)
out = dino.nucleus_loss(x, y, keys, w, target, rois=1, slots=2 * nuclei, chunk=chunk)
out["loss"].backward()
print(resident("VmHWM") - before)
"""


def run() -> list[dict]:
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        small = _real(Path(folder) / "small") if REAL.is_dir() else None
        large = _generated(Path(folder) / "large", fields=8 if gpu else 2)
        # (recipe, ROIs, words, steps); a CPU takes half a minute for a step of the published size.
        plans = [("ViT-S/16, 2 x 224 + 8 x 96", FULL, large, 64 if gpu else 2, 8 if gpu else 2)]
        if small is not None:
            plans.insert(0, ("small (brca_muse.yaml)", SMALL, small, 30, 8))
        for what, recipe, data, batch, steps in plans:
            words = [*recipe, f"data={data}", f"out={folder}/run", f"batch={batch}", "workers=0"]
            rows += _compare(what, words, device, steps)
    rows += _memory()
    name = torch.cuda.get_device_name() if gpu else "cpu"
    return [{"name": "muse", "cores": 1, "device": name, **row} for row in rows]


def _real(out: Path) -> Path:
    settings = {"side": 228.0, "mpp": 0.5, "min_nuclei": 8, "types": False, "workers": 0}
    return rois.run(rois.Rois(data=REAL, out=out, split="train", **settings))  # type: ignore[arg-type]


def _generated(out: Path, *, fields: int) -> Path:
    """`fields` x `fields` ROIs of the published size, 2048 px at 0.25: one field, repeated."""
    from data_prep import manifest, nuclei

    slides, found = out / "slides", out / "found"
    slides.mkdir(parents=True)
    found.mkdir()
    xy = write_repeated(slides / "a.svs", field=2048, times=fields)
    lines = [f"{x},{y}" for x, y in xy.tolist()]
    (found / "a.csv").write_text("x,y\n" + "\n".join(lines) + "\n")
    table = manifest.run(manifest.Manifest(data=str(slides), out=out / "m.csv", workers=0))
    tables = nuclei.run(nuclei.Nuclei(data=table, out=out / "nuclei", detections=found, workers=0))
    settings = {"quality_check": False, "min_tissue": 0.0, "min_nuclei": 1, "workers": 0}
    return rois.run(rois.Rois(data=tables, out=out / "rois", **settings))  # type: ignore[arg-type]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _compare(what: str, words: list[str], device: torch.device, steps: int) -> list[dict]:
    variants = {"nucleus + image": [], "image": ["method.nucleus_weight=0"]}
    loops: dict[str, Loop] = {}
    for name, more in variants.items():
        cfg = load(Train, [*words, *more])
        loops[name] = Loop(cfg, cfg.open_data(), device, None)
    spent: dict[str, dict[str, list[float]]] = {
        name: {"read": [], "views": [], "step": []} for name in loops
    }
    runners = {name: loop._runner() for name, loop in loops.items()}
    for step in range(steps + 1):
        for name, loop in loops.items():
            times = _one(loop, runners[name], step, device)
            if step:  # the first one warms up
                for key, value in times.items():
                    spent[name][key].append(value)
    middle = {n: {k: statistics.median(v) for k, v in t.items()} for n, t in spent.items()}
    ours = middle["nucleus + image"]
    total = ours["read"] + ours["step"]
    batch = loops["image"].cfg.batch
    share = {"unit": "% of the time", "ratio": None, "peer": "the whole step"}
    rate = batch / total
    plain = batch / (middle["image"]["read"] + middle["image"]["step"])
    rows: list[dict[str, Any]] = [
        {"what": f"{what}: speed", "ours": rate, "unit": "ROIs/s/core", "ratio": rate / plain,
         "peer": DINO},
        {"what": f"{what}: reading and decoding", "ours": 100 * ours["read"] / total, **share},
        {"what": f"{what}: making views", "ours": 100 * ours["views"] / total, **share},
    ]  # fmt: skip
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.append({"what": f"{what}: peak memory", "ours": peak, **share, "unit": "GiB"})
    return rows


def _one(
    loop: Loop, runner: Callable[..., Any], step: int, device: torch.device
) -> dict[str, float]:
    """CPU seconds of a step: reading, making views (part of the step), the step."""
    method: Any = loop.method
    plain, views = method.make_views, [0.0]

    def timed(batch: dict[str, Any]) -> Any:
        began = _clock(device)
        made = plain(batch)
        views[0] += _clock(device) - began
        return made

    method.make_views = timed
    loop.step = step
    began = _clock(device)
    batch = loop.batches.batch_at(step)
    read = _clock(device) - began
    loop._one_step(runner, batch, Stop())
    method.make_views = plain
    return {"read": read, "views": views[0], "step": _clock(device) - began - read}


def _memory() -> list[dict]:
    """Peak memory of the nucleus loss, forward and backward, in a process of its own."""
    rows = []
    for nuclei in (500, 4000):
        logits = (2 * nuclei + 8 * (nuclei // 8) + 2 * nuclei) * 65_536 * 4 / 2**20
        for chunk in (256, 1024):
            words = [str(chunk), "65536", str(nuclei)]
            done = subprocess.run(
                [sys.executable, "-c", MEMORY, *words], capture_output=True, text=True, check=True
            )
            peak = float(done.stdout)
            rows.append(
                {
                    "what": f"NuLo, 65,536 outputs, {nuclei} nuclei a global view, chunk {chunk}",
                    "ours": peak,
                    "unit": "MiB",
                    "ratio": peak / logits,
                    "peer": f"all logits at once ({logits:,.0f} MiB, without their gradients)",
                }
            )
    return rows


if __name__ == "__main__":
    for row in run():
        print(row)
