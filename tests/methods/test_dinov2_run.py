"""Runs of DINOv2: kills, ranks, the recipes of configs/ from the command line, learning."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from launch import cli
from lemon_muse import checkpoint
from lemon_muse.data.augment import prepare
from lemon_muse.data.reader import BlockReader
from lemon_muse.data.shards import Index
from lemon_muse.data.writer import ShardWriter
from lemon_muse.encoder import Encoder, load
from lemon_muse.stop import Stop
from tests.conftest import blob_columns, blob_roi
from tests.methods import dinov2_worker
from tests.methods.dinov2_small import WORDS, open_loop
from tests.methods.dinov2_worker import VARIANTS, Arrays

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}
RECIPES = sorted((ROOT / "configs").glob("dinov2_*.yaml"))


def test_ten_steps_a_kill_and_ten_more_equal_twenty(crop_shards: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        words = ["save_every=10", "accumulate=2", "method.centring=centre"]
        words += ["backbone.args={depth: 2, embed_dim: 48, drop_path_rate: 0.2}"]
        where = [f"data={crop_shards}", f"out={out}"]
        return [sys.executable, "-m", "launch.cli", "train", *where, *WORDS, *words]

    # All in processes of their own: a library that an earlier test has loaded can change rounding.
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, env=ENV, check=True, capture_output=True)
    run = command(tmp_path / "run")
    process = subprocess.Popen(run, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 13/"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints")[0] == 10  # type: ignore[index]
    subprocess.run(run, cwd=ROOT, env=ENV, check=True, capture_output=True)
    (step, whole), (again, resumed) = (
        checkpoint.load_newest(tmp_path / n / "checkpoints")  # type: ignore[misc]
        for n in ("whole", "run")
    )
    assert step == again == 20
    assert whole["method"].keys() == resumed["method"].keys()
    assert not [k for k, v in whole["method"].items() if not torch.equal(v, resumed["method"][k])]
    assert whole["method"]["mask_token"].any() and whole["method"]["centres.patch.value"].any()
    logs = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("whole", "run")
    ]
    assert [row["step"] for row in logs[1]] == list(range(1, 21))
    for key in ("loss", "loss_patch", "kl_image", "spread", "momentum", "grad_norm"):
        assert [row[key] for row in logs[0]] == [row[key] for row in logs[1]]


def test_two_ranks_equal_one(crop_shards: Path, tmp_path: Path) -> None:
    """Ranks with unequal numbers of masked patches, one of them without any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**ENV, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    worker = [sys.executable, "-m", "tests.methods.dinov2_worker", str(crop_shards), str(tmp_path)]
    processes = [
        subprocess.Popen(
            worker, cwd=ROOT, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    compare(dinov2_worker.terms(), seen("terms", tmp_path))
    for name, words in VARIANTS.items():
        loop = open_loop(crop_shards, tmp_path / "one", *dinov2_worker.WORDS, *words)
        whole, two = dinov2_worker.observe(loop, 3), seen(name, tmp_path)
        counts = [int(r["0 rows mask"].sum()) for r in two]
        assert counts[0] != counts[1] and not two[0]["1 rows mask"].any()
        assert two[1]["1 rows mask"].any()
        compare(whole, two)


def seen(name: str, folder: Path) -> list[Arrays]:
    return [dict(np.load(folder / f"{name}{r}.npz")) for r in range(2)]


def compare(whole: Arrays, two: list[Arrays]) -> None:
    assert two[0].keys() == two[1].keys() == whole.keys()
    for key, value in whole.items():
        parts = [r[key] for r in two]
        if " rows " in key:
            np.testing.assert_array_equal(np.concatenate(parts), value, err_msg=key)
            continue
        np.testing.assert_array_equal(parts[0], parts[1], err_msg=key)
        bound = 1e-5 + 1e-3 * float(np.abs(value).max())
        np.testing.assert_allclose(parts[0], value, rtol=0, atol=bound, err_msg=key)
        if "grad" in key and "student.patch" not in key and "mask_token" not in key:
            assert np.abs(value).max() > 0, key


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_trains(
    recipe: Path, crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small network and small heads; what makes the recipe stays as it is."""
    small = [
        "steps=2", "batch=16", "window=24", "compile=false", "precision=fp32", "device=cpu",
        "workers=0", "watch={every: 1, collapse: 'off'}", "method.image_prototypes=32",
        "method={patch_prototypes: 32, hidden: 32, bottleneck: 16, local_size: 16}",
        "backbone={name: vit_tiny, heads: 3, args: {depth: 2, embed_dim: 48}}",
    ]  # fmt: skip
    out = tmp_path / "run"
    assert cli.main(["train", str(recipe), f"data={crop_shards}", f"out={out}", *small]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"loss_image", "loss_patch", "spread"} <= rows[0].keys()
    newest = max((out / "checkpoints").glob("*.pt"))
    weights = {}
    for network in ("recipe", "teacher", "student"):
        words = [f"checkpoint={newest}", f"network={network}", f"out={tmp_path / network}"]
        assert cli.main(["export", *words]) == 0
        weights[network] = (tmp_path / network / "model.safetensors").read_bytes()
    assert weights["recipe"] == weights["teacher"] != weights["student"]
    encoder = load(out / "encoder")
    assert encoder(torch.zeros(1, 3, 24, 24)).shape == (1, 48)


def test_there_are_recipes_of_the_three_variants() -> None:
    assert [p.stem for p in RECIPES] == [
        "dinov2_vits8",
        "dinov2_vits8_kde",
        "dinov2_vits8_no_local",
    ]


def test_it_learns_to_tell_discs_from_rings(tmp_path: Path) -> None:
    """Views that keep the shape. At a teacher temperature of 0.04 80 steps only meet chance."""
    rng = np.random.default_rng(0)
    kinds = rng.choice(["disc", "ring"], 512)
    with ShardWriter(tmp_path / "crops", size=32, mpp=0.25, encoding="raw") as writer:
        for start in range(0, 512, 64):
            pixels = [
                blob_roi(16 + rng.uniform(-1.5, 1.5, (1, 2)), kinds[i, None], 32, rng)
                for i in range(start, start + 64)
            ]
            columns = {**blob_columns(start, 64), "type": kinds[start : start + 64]}
            writer.write(np.stack(pixels), columns)
    words = [
        "seed=1", "steps=80", "batch=64", "backbone.patch=4", "optim={lr: 0.02, clip: 3}",
        "view={policy: mild, scale: [0.7, 1.0]}",
        "method={locals: 0, momentum: 0.9, teacher_temperature: [0.02, 0.02]}",
    ]  # fmt: skip
    loop = open_loop(tmp_path / "crops", tmp_path / "run", *words)
    before = accuracy(loop.method.encoder(), loop.index)
    for step in range(80):
        loop.step = step
        loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
    after = accuracy(loop.method.encoder(), loop.index)
    assert after > 0.85 > before, (before, after)


@torch.no_grad()
def accuracy(encoder: Encoder, index: Index) -> float:
    """Of a KNN over the features of all crops; every second one is held out."""
    reader, blocks = BlockReader(index), range(len(index.blocks))
    pixels = torch.from_numpy(np.concatenate([reader.pixels(b) for b in blocks]))
    kinds = np.concatenate([reader.columns(b)["type"] for b in blocks])
    x = prepare(pixels, window=24, mean=encoder.mean, std=encoder.std)
    features = encoder(x)
    features = torch.nn.functional.normalize(features - features.mean(0), dim=1).numpy()
    known = np.arange(len(kinds)) % 2 == 0
    knn = KNeighborsClassifier(10).fit(features[known], kinds[known])
    return float(knn.score(features[~known], kinds[~known]))
