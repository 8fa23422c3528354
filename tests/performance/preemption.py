"""From the scheduler's signal to the next step of the requeued run, and what a checkpoint costs.

Needs a SLURM, which tests/slurm/up.sh starts on this machine.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lemon_muse import checkpoint, optim
from lemon_muse.config import load
from lemon_muse.methods import METHODS
from lemon_muse.recipe import Train
from tests.conftest import write_blob_shards
from tests.slurm.drill import Cluster, last_step

STATE = Path("/tmp/lemon-bench")
SCRIPTS = Path(__file__).resolve().parents[1] / "slurm"
TURNS = 3
RECIPES = ("lemon_vits8.yaml", "muse_vits16.yaml", "muse_vitb16.yaml")


def run() -> list[dict[str, Any]]:
    """Rows of both measurements."""
    return [*checkpoints(), *preemptions()]


def row(what: str, ours: float, unit: str, peer: str = "-") -> dict[str, Any]:
    facts = {"peer": peer, "unit": unit, "ratio": None, "cores": os.cpu_count(), "device": "cpu"}
    return {"name": "preemption", "what": what, "ours": ours, **facts}


def checkpoints() -> list[dict[str, Any]]:
    """Size, and seconds of writing (with sync) and reading."""
    rows = []
    for recipe in RECIPES:
        cfg = load(Train, [recipe, "data=none"])
        grey = (0.5, 0.5, 0.5)
        setting = cfg.told({"stored": 64, "mpp": 0.25, "mean": grey, "std": grey})
        method = METHODS[cfg.method.name][1](cfg.method, setting)
        optimiser = optim.build(method.param_groups(), cfg.optim)
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        state = {"method": method.state_dict(), "optimiser": optimiser.state_dict()}
        with tempfile.TemporaryDirectory() as folder:
            spent = []
            for step in range(TURNS):
                began = time.perf_counter()
                checkpoint.save(Path(folder), step, state, keep=1)
                spent.append(time.perf_counter() - began)
            size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
            began = time.perf_counter()
            checkpoint.load_newest(Path(folder))
            back = time.perf_counter() - began
        rows.append(row(f"checkpoint of {recipe}: size", size / 2**20, "MiB"))
        rows.append(row(f"checkpoint of {recipe}: save and sync", statistics.median(spent), "s"))
        rows.append(row(f"checkpoint of {recipe}: load", back, "s"))
    return rows


def preemptions() -> list[dict[str, Any]]:
    """Two nodes of one rank, a tiny network: what the machinery costs, not the weights."""
    env = {**os.environ, "SLURM_CI_PORT": "38810"}
    subprocess.run(["bash", SCRIPTS / "up.sh", STATE], check=True, env=env, capture_output=True)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            given = {**os.environ, "SLURM_CONF": str(STATE / "etc" / "slurm.conf")}
            given |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(SCRIPTS.parents[1])}
            given |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            cluster = Cluster(Path(folder), given, STATE, sys.executable)
            crops = write_blob_shards(Path(folder) / "crops")
            turns = [_turn(cluster, crops, i) for i in range(TURNS)]
    finally:
        subprocess.run(["bash", SCRIPTS / "down.sh", STATE, "--purge"], capture_output=True)
    names = ("saved and put back", "started again", "first new step")
    return [
        row(f"signal to {name}", statistics.median(turn[i] for turn in turns), "s")
        for i, name in enumerate(names)
    ]


def _turn(cluster: Cluster, crops: Path, number: int) -> list[float]:
    out = cluster.folder / f"run{number}"
    words = cluster.train(crops, out, "steps=100000", "save_every=100000")
    sent = cluster.submit(["nodes=2"], words)
    cluster.wait_step(out, 20)
    cluster.slurm("scancel", "--signal=USR2", sent.jobs[0])
    began = time.monotonic()
    moments = []
    for state in ("requeued", "running"):
        while sent.task()["state"] != state:
            time.sleep(0.02)
        moments.append(time.monotonic() - began)
    saved = last_step(out)
    while last_step(out) <= saved:
        time.sleep(0.02)
    moments.append(time.monotonic() - began)
    cluster.slurm("scancel", sent.jobs[0])
    return moments


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
