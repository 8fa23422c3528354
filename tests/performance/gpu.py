"""All that needs a GPU, in one go: `python -m tests.performance.gpu DATA OUT [SECONDS]`.

DATA is a folder of images with nuclei (BRCA-M2C). Prints and writes to OUT/gpu.json: the LEMON step
(ViT-S/8, batch 4096, bf16, compile) for SECONDS (default 600): crops/s, data wait, peak memory,
the same step fed by torchvision in DataLoader workers; steps of all recipes of the studies, small;
the probe table of the trained encoder. Then
the MUSE step (ViT-S/16, 2 x 224 + 8 x 96 px): its rows, SECONDS of training, its probe table.
"""

import json
import sys
from pathlib import Path

import torch

from launch import cli
from tests.performance import muse, recipes, training
from tests.performance.__main__ import line


def main(data: Path, out: Path, seconds: float) -> int:
    if not torch.cuda.is_available():
        print("this needs a GPU", file=sys.stderr)
        return 2
    rows = training.run(seconds=60.0)
    rate = rows[0]["ours"]
    rows += recipes.run()
    for row in rows:
        print(line(row), flush=True)
    crops, run = out / "crops", out / "run"
    steps = max(200, int(rate * seconds / 4096))
    words = [f"data={crops}", f"out={run}", f"steps={steps}", "optim.warmup=0.1", "watch.every=20"]
    jobs = [
        ["prep", "crops", f"data={data}", f"out={crops}", "split=train", "types=false"],
        ["train", "lemon_vits8.yaml", *words, "probe.benchmark=brcam2c", f"probe.root={data}"],
        ["eval", f"encoder={run}", "benchmark=brcam2c", f"root={data}", f"out={out / 'eval'}"],
    ]
    for job in jobs:
        code = cli.main(job)
        if code:
            return code
    result = {"bench": rows, "steps": steps, "last": last_metrics(run)}
    (out / "gpu.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result["last"], indent=1))
    return train_muse(data, out, seconds, result)


def train_muse(data: Path, out: Path, seconds: float, result: dict) -> int:
    """MUSE at its published view sizes; ROIs are 114 µm, so that small images give enough."""
    rows = muse.run()
    for row in rows:
        print(line(row), flush=True)
    rate = next(row["ours"] for row in rows if "ViT-S/16" in row["what"] and "speed" in row["what"])
    rois, run = out / "rois", out / "muse"
    steps = max(200, int(rate * seconds / 128))
    words = [f"data={rois}", f"out={run}", f"steps={steps}", "batch=128", "watch.every=20"]
    cut = ["split=train", "side=114", "mpp=0.25", "min_nuclei=4", "types=false"]
    jobs = [
        ["prep", "rois", f"data={data}", f"out={rois}", *cut],
        ["train", "muse_vits16.yaml", *words],
        ["eval", f"encoder={run}", "benchmark=brcam2c", f"root={data}", f"out={out / 'eval-muse'}"],
    ]
    for job in jobs:
        code = cli.main(job)
        if code:
            return code
    result |= {"muse": rows, "muse_steps": steps, "muse_last": last_metrics(run)}
    (out / "gpu.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result["muse_last"], indent=1))
    return 0


def last_metrics(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), float((*sys.argv[3:], "600")[0])))
