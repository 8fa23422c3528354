"""A training on two nodes, disturbed in every way, ends with the weights of an undisturbed one."""

import random
import time
from pathlib import Path

import pytest
import torch

from tests.slurm.drill import STEPS, Cluster, Sent, kill, same, weights

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def start(cluster: Cluster, crops: Path, name: str, *settings: str) -> tuple[Sent, Path]:
    out = cluster.folder / name
    sent = cluster.submit(["nodes=2", *settings], cluster.train(crops, out))
    until(cluster, out, 11, 35)
    return sent, out


def until(cluster: Cluster, out: Path, first: int, last: int) -> None:
    """Somewhere between two steps: not at a checkpoint (every ten steps), not always the same."""
    cluster.wait_step(out, random.Random(time.time()).randint(first, last))


def test_a_job_goes_on_exactly_however_often_it_is_put_back(
    cluster: Cluster, crops: Path, unbroken: Path
) -> None:
    out = cluster.folder / "disturbed"
    sent = cluster.submit(["nodes=2", "extra.exclusive=true"], cluster.train(crops, out))
    until(cluster, out, 6, 12)
    cluster.slurm("scancel", "--signal=USR2", sent.jobs[0])
    until(cluster, out, 16, 24)
    # A job of a partition that goes before: SLURM warns, and gives it the nodes.
    winner = ["--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null"]
    cluster.slurm("sbatch", *winner, "--wrap=sleep 1")
    until(cluster, out, 28, 34)
    # Both times all ranks had saved at one step, and none was left in a collective.
    assert sent.task()["starts"] == 3
    assert not list((sent.folder / "logs").glob("*_result.pkl"))
    assert sent.logs.count("stopped by SIGUSR2") + sent.logs.count("stopped by another") == 4
    cluster.slurm("scontrol", "requeue", sent.jobs[0])
    until(cluster, out, 38, 44)
    kill(cluster.rank_pids(sent)[-1])
    task = cluster.wait(sent, "failed", seconds=60)
    assert task["starts"] == 4 and "lost another rank" in str(task["reason"])
    said = cluster.call("status", str(sent.folder))
    assert "failed" in said and "lost another rank" in said
    # What has failed is submitted again, and goes on from its last checkpoint.
    cluster.call("submit", f"resubmit={sent.folder}")
    cluster.wait(sent, "done", seconds=240)
    assert same(out, unbroken)
    said = cluster.call("status", str(sent.folder))
    assert f"{STEPS}/{STEPS}" in said and "done" in said and "(start 5)" in said
    assert "nothing to submit again" in cluster.call("submit", f"resubmit={sent.folder}")


def test_a_time_limit_puts_the_job_back(cluster: Cluster, crops: Path) -> None:
    out = cluster.folder / "limit"
    # SLURM looks every 30 s and warns up to a minute early: here 30 to 60 s after the start.
    words = cluster.train(crops, out, "steps=100000", "save_every=100000")
    sent = cluster.submit(["nodes=2", "hours=0.034", "signal_s=60"], words)
    end = time.monotonic() + 200
    while "continuing" not in sent.logs:
        assert time.monotonic() < end, sent.logs[-2000:]
        time.sleep(0.5)
    assert int(str(sent.task()["starts"])) >= 2
    cluster.slurm("scancel", sent.jobs[0])
    # It never came to a regular checkpoint: what is there was written at the signal.
    assert "stopped by SIGUSR2" in sent.logs or "another rank" in sent.logs
    task = cluster.wait(sent, "failed", seconds=60)
    assert "stopped by SIGTERM" in str(task["reason"]) or "another rank" in str(task["reason"])


def test_a_node_that_fails_puts_the_job_back(cluster: Cluster, crops: Path, unbroken: Path) -> None:
    sent, out = start(cluster, crops, "node")
    kill(cluster.daemon("slurmd.127.0.0.2"))
    # SLURM would notice by itself after SlurmdTimeout (300 s): an operator says so at once.
    cluster.slurm("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=killed")
    cluster.restart()
    task = cluster.wait(sent, "done", seconds=240)
    assert int(str(task["starts"])) >= 2
    assert same(out, unbroken)


def test_one_node_instead_of_two_keeps_the_order(
    cluster: Cluster, crops: Path, unbroken: Path
) -> None:
    sent, out = start(cluster, crops, "fewer")
    cluster.slurm("scancel", sent.jobs[0])
    cluster.wait(sent, "failed", seconds=60)
    again = cluster.submit(["nodes=1"], cluster.train(crops, out))
    shuffled = cluster.folder / "shuffled"
    third = cluster.submit(["nodes=1"], cluster.train(crops, shuffled, "seed=1"))
    for one in (again, third):
        cluster.wait(one, "done", seconds=240)
    # Sums over ranks round differently: equal within rounding that sixty steps have amplified,
    # where another order of samples gives other weights altogether.
    assert apart(out, unbroken) < 0.05 * apart(shuffled, unbroken)


def apart(first: Path, second: Path) -> float:
    """Median over the parameters of the relative distance between two runs' weights."""
    a, b = weights(first), weights(second)
    found = [
        float((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-6))
        for k in a
        if a[k].dtype.is_floating_point and "running" not in k
    ]
    return float(torch.tensor(found).median())
