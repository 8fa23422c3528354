"""All that needs a GPU, in one go: `python -m tests.performance.gpu DATA OUT [SECONDS]`.

DATA is a folder of images with nuclei (BRCA-M2C). Prints and writes to OUT/gpu.json: the LEMON step
(ViT-S/8, batch 4096, bf16, compile) for SECONDS (default 600): crops/s, data wait, peak memory,
the same step fed by torchvision in DataLoader workers; the probe table of the trained encoder.
"""

import json
import sys
from pathlib import Path

import torch

from launch import cli
from tests.performance import training
from tests.performance.__main__ import line


def main(data: Path, out: Path, seconds: float) -> int:
    if not torch.cuda.is_available():
        print("this needs a GPU", file=sys.stderr)
        return 2
    rows = training.run(seconds=60.0)
    rate = rows[0]["ours"]
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
    metrics = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    result = {"bench": rows, "steps": steps, "last": metrics[-1]}
    (out / "gpu.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result["last"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), float((*sys.argv[3:], "600")[0])))
