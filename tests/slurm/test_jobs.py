"""Single jobs, arrays, chains and sweeps on a real SLURM."""

import hashlib
import json
import os
import shlex
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lemon_muse.synthetic import write_images
from tests.slurm.drill import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    write_images(folder, slides=12, side=192, seed=3)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".tar", ".json", ".idx", ".npz"))
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.suffix == ".tar"
    }


def test_an_array_of_four_shares_the_work_of_one(cluster: Cluster, tissue: Path) -> None:
    alone = cluster.folder / "alone"
    cluster.call("prep", "crops", f"data={tissue}", f"out={alone}", "workers=0")
    shared = cluster.folder / "shared"
    job = ["prep", "crops", f"data={tissue}", f"out={shared}", "workers=0"]
    sent = cluster.submit(["tasks=4"], job)
    assert len(set(sent.jobs)) == 4
    for number in range(4):
        cluster.wait(sent, "done", number=number)
    assert digests(shared) == digests(alone) and digests(alone)
    cluster.call("prep", "check", f"data={shared}", f"out={shared / 'check'}")


def test_a_chain_from_prep_to_export(cluster: Cluster, tissue: Path) -> None:
    out = cluster.folder / "chain"
    small = ["steps=6", "batch=32", "method.hidden=64", "method.out_dim=32", "save_every=100"]
    sent = cluster.submit(
        [],
        ["tasks=2", "prep", "crops", f"data={tissue}", f"out={out / 'crops'}", "workers=0"],
        ["nodes=2", "train", "demo.yaml", f"data={out / 'crops'}", f"out={out / 'run'}", *small],
        [
            "eval",
            f"encoder={out / 'run'}",
            "benchmark=folder",
            f"root={tissue}",
            f"out={out / 'eval'}",
            "probe=knn",
            "floors=false",
        ],
        ["export", f"run={out / 'run'}", "format=timm", f"out={out / 'timm'}"],
    )
    for number in range(5):
        cluster.wait(sent, "done", number=number, seconds=240)
    assert (out / "timm" / "model.safetensors").is_file()
    rows = (out / "eval" / "results.jsonl").read_text().splitlines()
    assert any(json.loads(row)["metric"] == "balanced_accuracy" for row in rows)


def test_a_chain_that_has_failed_is_submitted_again_at_once_and_from_anywhere(
    cluster: Cluster, tissue: Path
) -> None:
    # Relative words: they are meant from the folder of the first submission.
    sent = cluster.submit(
        [],
        ["prep", "crops", "data=not_yet", "out=broken/crops", "workers=0"],
        ["prep", "check", "data=broken/crops", "out=broken/check"],
    )
    task = cluster.wait(sent, "failed")
    assert "there is no folder not_yet" in str(task["reason"])
    (cluster.folder / "not_yet").symlink_to(tissue)
    # The second job may still wait for the first; it must not be left to be cancelled.
    before = sent.jobs
    elsewhere = replace(cluster, folder=cluster.folder / "sub")
    elsewhere.call("submit", f"resubmit={sent.folder.relative_to(elsewhere.folder)}")
    assert not set(before) & set(sent.jobs)
    for number in range(2):
        cluster.wait(sent, "done", number=number)
    assert not cluster.queued(before[1])


def test_a_chain_of_which_a_stage_is_refused_leaves_nothing_behind(
    cluster: Cluster, tissue: Path
) -> None:
    first = ["prep", "crops", f"data={tissue}", "out=refused", "workers=0"]
    second = ["partition=none", "prep", "check", "data=refused"]
    words = ["submit", "out=refusals", "name=chain", "--", *first, "--", *second]
    assert "invalid partition" in cluster.call(*words, code=2).lower()
    end = time.monotonic() + 60
    while cluster.slurm("squeue", "-h", "--name=chain"):
        assert time.monotonic() < end
        time.sleep(0.2)
    said = cluster.call("status", "refusals")
    assert "pending" not in said and "given up" in said
    cluster.call("submit", "out=refused_too", "partition=none", "--", *first, code=2)
    assert not list((cluster.folder / "refused_too").iterdir())


def test_a_rank_that_fails_or_does_not_come_is_the_reason(cluster: Cluster, crops: Path) -> None:
    """Of two jobs on the same nodes at once; rank 1 sees no data, or hangs before it comes."""
    sent = []
    for name, line in (("blind", "cd /"), ("absent", "exec sleep 300")):
        script = cluster.folder / f"{name} python.sh"
        script.write_text(f'[ $SLURM_PROCID = 1 ] && {line}\nexec {cluster.python} "$@"\n')
        python = f"python=bash {shlex.quote(str(script))}"
        data = Path(os.path.relpath(crops, cluster.folder))
        words = cluster.train(data, cluster.folder / name)
        sent.append(cluster.submit(["nodes=2", "meet_s=15", python], words))
    blind, absent = (str(cluster.wait(one, "failed", seconds=150)["reason"]) for one in sent)
    assert blind.startswith("rank 1 on") and "has no index.json" in blind
    assert absent.startswith("rank 0 on") and "waited 15 s for rank(s) 1 of 2" in absent


def test_a_sweep_runs_two_at_a_time_and_repeats_only_what_failed(
    cluster: Cluster, crops: Path
) -> None:
    out = cluster.folder / "sweep"
    blocked = out / "seed=2"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the run folder should be")
    words = cluster.train(crops, out, "steps=4")
    sent = cluster.submit(["sweep.seed=0,1,2,3", "parallel=2"], words)
    most = 0
    end = time.monotonic() + 240
    while any(sent.task(i)["state"] not in ("done", "failed") for i in range(4)):
        running = cluster.slurm("squeue", "-h", "-r", "-t", "R", "-o", "%i").split()
        most = max(most, len([job for job in running if job in sent.jobs]))
        assert time.monotonic() < end, sent.logs[-2000:]
        time.sleep(0.2)
    assert most == 2
    states = [sent.task(i)["state"] for i in range(4)]
    assert states == ["done", "done", "failed", "done"]
    assert "cannot be made" in str(sent.task(2)["reason"])
    before = sent.jobs
    blocked.unlink()
    cluster.call("submit", f"resubmit={sent.folder}")
    cluster.wait(sent, "done", number=2, seconds=120)
    after = sent.jobs
    assert [i for i in range(4) if before[i] != after[i]] == [2]
    assert sorted(p.name for p in out.iterdir()) == [f"seed={i}" for i in range(4)]
