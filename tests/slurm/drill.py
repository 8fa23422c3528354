"""Submit, wait, disturb: what the tests on a real SLURM are written with."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lemon_muse import checkpoint

STEPS = 60
TINY = [
    f"steps={STEPS}",
    "batch=32",
    "window=16",
    "precision=fp32",
    "method.hidden=64",
    "method.out_dim=32",
    "backbone={name: vit_tiny, patch: 8, heads: 3, "
    "args: {depth: 2, embed_dim: 48, drop_path_rate: 0.2}}",
    "backbone.freeze_patch=false",
    "optim.lr=0.004",
    "watch.every=1",
    "workers=1",
    "save_every=10",
]


@dataclass(frozen=True)
class Sent:
    """A submission: its folder and the ids of its jobs, in the order of the tasks."""

    folder: Path

    def task(self, number: int = 0) -> dict[str, object]:
        path = self.folder / "tasks" / f"{number}.json"
        found: dict[str, object] = json.loads(path.read_text())
        return found

    @property
    def jobs(self) -> list[str]:
        said = json.loads((self.folder / "submission.json").read_text())
        return [task["job"] for task in said["tasks"]]

    @property
    def logs(self) -> str:
        return "\n".join(p.read_text() for p in sorted((self.folder / "logs").glob("*.err")))


@dataclass(frozen=True)
class Cluster:
    """A cluster, and a folder for what the tests write."""

    folder: Path
    env: dict[str, str]
    state: Path
    python: str

    def call(self, *words: str, code: int = 0) -> str:
        """`lemon-muse …` as a user runs it; its output."""
        done = subprocess.run(
            [self.python, "-m", "launch.cli", *words],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def slurm(self, *words: str) -> str:
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, settings: list[str], *jobs: list[str]) -> Sent:
        words = ["submit", "out=sub", "cpus=1", "hours=1", *settings]
        for job in jobs:
            words += ["--", *job]
        said = self.call(*words)
        found = re.search(r"^folder: (.*)$", said, re.M)
        assert found, said
        return Sent(Path(found[1]))

    @staticmethod
    def train(data: Path, out: Path, *more: str) -> list[str]:
        return ["train", f"data={data}", f"out={out}", *TINY, *more]

    def wait(self, sent: Sent, *states: str, number: int = 0, seconds: float = 120) -> dict:
        """The task's state file once it says one of `states` and its job has left the queue."""
        end = time.monotonic() + seconds
        while True:
            task = sent.task(number)
            if task["state"] in states and (
                "running" in states or not self.queued(sent.jobs[number])
            ):
                return task
            assert time.monotonic() < end, f"{task}\n{sent.logs[-3000:]}"
            time.sleep(0.3)

    def queued(self, job: str) -> bool:
        said = subprocess.run(
            ["squeue", "-h", "-j", job], env=self.env, capture_output=True, text=True
        )
        return bool(said.stdout.strip())

    def wait_step(self, out: Path, step: int, *, seconds: float = 120) -> None:
        """Until the run has logged `step`."""
        end = time.monotonic() + seconds
        while last_step(out) < step:
            assert time.monotonic() < end, f"step {last_step(out)} of {out}"
            time.sleep(0.1)

    def rank_pids(self, sent: Sent) -> list[int]:
        """Processes of the ranks, by their command line."""
        wanted = f"submitit.core._submit\0{sent.folder / 'logs'}"
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_text()
            except OSError:
                continue
            if wanted in line and "srun" not in line.split("\0")[0]:
                pids.append(int(path.parent.name))
        return sorted(pids)

    def restart(self) -> None:
        """Start daemons that were killed and take nodes back into service."""
        given = {**self.env, "SLURM_CI_PORT": "37810", "SLURM_CI_GPUS": "8"}
        script = Path(__file__).with_name("up.sh")
        done = subprocess.run(
            ["bash", script, self.state], env=given, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr

    def daemon(self, name: str) -> int:
        """Process id of a daemon of the cluster."""
        return int((self.state / "run" / f"{name}.pid").read_text())


def last_step(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError):
        return 0


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.load_newest(out / "checkpoints")
    assert found is not None and found[0] == STEPS, found and found[0]
    state: dict[str, torch.Tensor] = found[1]["method"]
    return state


def same(first: Path, second: Path) -> bool:
    """Whether two runs have ended with the same weights, bit for bit."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
