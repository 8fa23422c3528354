"""Runs of MUSE: batches of ROIs, kills, ranks, learning, alarms and wrong words."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from lemon_muse import checkpoint
from lemon_muse.data.reader import RoiReader
from lemon_muse.data.rois import RoiBatches
from lemon_muse.data.shards import Index, open_index
from lemon_muse.stop import Stop
from tests.conftest import write_blob_rois
from tests.methods import muse_worker
from tests.methods.muse_small import WORDS, open_loop
from tests.methods.muse_worker import Arrays

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}


# Batches ----------------------------------------------------------------------------------------


def batches(index: Index, *, rank: int = 0, world: int = 1, seed: int = 3) -> RoiBatches:
    return RoiBatches(index, seed=seed, batch=8, window=5, rank=rank, world=world, workers=2)


def test_a_pass_shows_every_roi_once_and_the_next_in_another_order(roi_shards: Path) -> None:
    index = open_index(roi_shards, kind="rois")
    order = [b["samples"].tolist() for b in batches(index).iterate(0, 6)]
    passes = [sorted(chain(*order[i : i + 3])) for i in (0, 3)]
    assert passes == [list(range(24))] * 2
    assert sorted(order[0]) != sorted(order[3])
    other = [b["samples"].tolist() for b in batches(index, seed=4).iterate(0, 3)]
    assert sorted(chain(*other)) == list(range(24)) and other != order[:3]
    assert [b["samples"].tolist() for b in batches(index).iterate(4, 6)] == order[4:]


def test_points_belong_to_their_picture(roi_shards: Path) -> None:
    """Discs and rings alike are dark 4 to 5 px from their centre."""
    index, seen = open_index(roi_shards, kind="rois"), 0
    reader = RoiReader(index)
    y, x = np.mgrid[:128, :128] + 0.5
    for batch in batches(index).iterate(0, 3):
        assert batch["pixels"].shape == (8, 128, 128, 3) and batch["pixels"].dtype == np.uint8
        assert batch["points"].dtype == np.float32
        assert batch["points"].shape == (8, batch["counts"].max(), 2)
        for i, sample in enumerate(batch["samples"].tolist()):
            columns, count = reader.columns(sample), int(batch["counts"][i])
            assert count == len(columns["x"]) == index.blocks["count"][sample]
            np.testing.assert_array_equal(batch["points"][i, :count, 0], columns["x"])
            np.testing.assert_array_equal(batch["points"][i, :count, 1], columns["y"])
            assert np.isnan(batch["points"][i, count:]).all()
            grey = batch["pixels"][i].mean(2)
            for cx, cy in batch["points"][i, :count]:
                far = np.hypot(x - cx, y - cy)
                assert grey[(far > 4) & (far < 5)].mean() < grey[far > 8].mean() - 20
                seen += 1
        names = batches(index).reader.describe(batch["samples"][:2])
        first = reader.columns(int(batch["samples"][0]))
        where = f"(ROI at {first['left'][0]:.0f}, {first['top'][0]:.0f})"
        assert names[0] == f"{first['slide'][0]} {where}" and len(names) == 2
    assert seen == index.count > 100


@pytest.mark.parametrize("world", [2, 4])
def test_the_parts_of_ranks_are_the_batch_of_one(world: int, roi_shards: Path) -> None:
    """Also what a run on 2 ranks needs to go on with 1 or 4: the order is the same."""
    index = open_index(roi_shards, kind="rois")
    for step in (0, 2, 7):
        whole = batches(index).batch_at(step)
        parts = [batches(index, rank=r, world=world).batch_at(step) for r in range(world)]
        for name in ("pixels", "counts", "samples"):
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])
        for i, own in enumerate(row for p in parts for row in p["points"]):
            np.testing.assert_array_equal(own, whole["points"][i, : len(own)])
            assert np.isnan(whole["points"][i, len(own) :]).all()
    slots = {p["points"].shape[1] for p in parts}
    assert len(slots) > 1  # a rank pads to its own most


# Kills ------------------------------------------------------------------------------------------


def words(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", f"data={data}", f"out={out}", *WORDS, *more]


def test_ten_steps_a_kill_and_ten_more_equal_twenty(roi_shards: Path, tmp_path: Path) -> None:
    more = ["workers=1", "save_every=10", "backbone.drop_path=0.3", "optim.warmup=0.1"]
    more += ["backbone.skip_drop=[0.3, 0.3, 0.3]", "accumulate=2"]
    # All in processes of their own: a library that an earlier test has loaded can change rounding.
    whole_run = [sys.executable, "-m", "launch.cli", *words(roi_shards, tmp_path / "whole", *more)]
    subprocess.run(whole_run, cwd=ROOT, env=ENV, check=True, capture_output=True)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "launch.cli", *words(roi_shards, run, *more)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 13/"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert checkpoint.load_newest(run / "checkpoints")[0] == 10  # type: ignore[index]
    subprocess.run(command, cwd=ROOT, env=ENV, check=True, capture_output=True)
    found = [checkpoint.load_newest(tmp_path / n / "checkpoints") for n in ("whole", "run")]
    (step, whole), (again, resumed) = found  # type: ignore[misc]
    assert step == again == 20
    for part in ("method", "optimiser"):
        ours, theirs = (list(leaves(state[part])) for state in (whole, resumed))
        assert len(ours) == len(theirs) > 20
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "run")]
    logs = [[json.loads(line) for line in text] for text in lines]
    assert [row["step"] for row in logs[1]] == list(range(1, 21))
    for key in ("loss", "loss_nucleus", "matched", "nucleus_std", "effective_rank", "momentum"):
        assert [row[key] for row in logs[0]] == [row[key] for row in logs[1]]
    # the centre is part of what was saved
    assert whole["method"]["centres.nucleus.value"].abs().max() > 0


def leaves(tree: object) -> list[object]:
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in leaves(item)]
    return [] if tree is None or isinstance(tree, str) else [tree]


# Ranks ------------------------------------------------------------------------------------------


def ranks(world: int, out: Path, sets: list[Path]) -> list[list[Arrays]]:
    """What each of `world` processes saw, for each set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**ENV, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    worker = [sys.executable, str(ROOT / "tests" / "methods" / "muse_worker.py"), str(out), "2"]
    processes = [
        subprocess.Popen(
            [*worker, *map(str, sets)],
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(said)
    return [[dict(np.load(out / s.name / f"rank{r}.npz")) for r in range(world)] for s in sets]


def test_two_ranks_equal_one_and_one_goes_on(roi_shards: Path, tmp_path: Path) -> None:
    """Ranks with unequal numbers of nuclei, and a rank without any (ROIs are sorted in a batch)."""
    counts = (0, 0, 0, 0, 3, 20, 1, 9)
    lopsided = write_blob_rois(tmp_path / "lopsided", counts=counts, seed=1)
    sets = [roi_shards, lopsided]
    seen = ranks(2, tmp_path / "two", sets)
    for data, two in zip(sets, seen, strict=True):
        whole = muse_worker.observe(open_loop(data, tmp_path / "one", *muse_worker.WORDS), 0, 4)
        held = [r["0 rows counts"].sum() for r in two]
        assert held[0] != held[1] and (data != lopsided or held[0] == 0)
        for key, value in whole.items():
            if int(key[0]) < 2:
                parts = [r[key] for r in two]
                if " rows " in key:
                    np.testing.assert_array_equal(np.concatenate(parts), value, err_msg=key)
                    continue
                np.testing.assert_array_equal(parts[0], parts[1], err_msg=key)
                if "nucleus_std" not in key:  # the mean over ranks of what each has by itself
                    close(parts[0], value, key)
        later = open_loop(data, tmp_path / "two" / data.name, *muse_worker.WORDS)
        later.resume()
        later.monitor.close()
        assert later.step == 2
        for key, value in muse_worker.observe(later, 2, 4).items():
            close(value, whole[key], key, exact=" rows " in key and "images" not in key)


def close(ours: np.ndarray, theirs: np.ndarray, key: str, *, exact: bool = False) -> None:
    scale = float(np.abs(theirs).max()) if theirs.size else 0.0
    bound = 0.0 if exact else 1e-5 + 2e-3 * scale
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=key)


# Learning ----------------------------------------------------------------------------


def test_it_learns_to_tell_discs_from_rings(tmp_path: Path) -> None:
    counts = tuple(np.random.default_rng(1).integers(8, 20, 48).tolist())
    data = write_blob_rois(tmp_path / "rois", counts=counts, seed=3)
    steps = 80
    more = [f"steps={steps}", "batch=16", "seed=1", "backbone.patch=4", "view.locals=0"]
    more += ["optim={lr: 0.1, warmup: 0.1, clip: 3}", "method={momentum: 0.9, freeze_last: 0.05}"]
    loop = open_loop(data, tmp_path / "run", *more)
    before = accuracy(loop.method.encoder(), loop.index)
    for step in range(steps):
        loop.step = step
        loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
    after = accuracy(loop.method.encoder(), loop.index)
    assert after > 0.75 and after > before + 0.15, (before, after)


def accuracy(encoder: torch.nn.Module, index: Index) -> float:
    """Of a KNN over the features of all nuclei; every second ROI is held out."""
    reader, blocks = RoiReader(index), range(len(index.blocks))
    columns = [reader.columns(b) for b in blocks]
    images = torch.from_numpy(np.stack([reader.pixels(b) for b in blocks]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    images = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    points = np.concatenate([np.stack([c["x"], c["y"]], 1) for c in columns])
    owner = np.repeat(blocks, [len(c["x"]) for c in columns])
    kinds = np.concatenate([c["type"] for c in columns])
    # Batch statistics: at step 0 the running ones are those of nothing.
    with torch.no_grad():
        net = copy.deepcopy(encoder).train()
        found = net.nuclei(images, torch.from_numpy(points), torch.from_numpy(owner))  # type: ignore[operator]
    found = torch.nn.functional.normalize(found - found.mean(0), dim=1).numpy()
    known = owner % 2 == 0
    knn = KNeighborsClassifier(10).fit(found[known], kinds[known])
    return float(knn.score(found[~known], kinds[~known]))
