"""K gloo ranks x B/K equal one rank x B: samples, views, loss, gradients, BN statistics."""

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

from lemon_muse import distributed
from lemon_muse.data.reader import CropBatches
from lemon_muse.data.shards import open_index

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "steps=3",
    "batch=32",
    "window=16",
    "precision=fp32",
    "method.hidden=64",
    "method.out_dim=32",
    "shuffle_blocks=4",
    "workers=0",
]
VIT = "backbone={name: vit_tiny, patch: 8, args: {depth: 2, embed_dim: 48}, heads: 3}"
RESNET = "backbone={name: resnet10t, args: {channels: [8, 16, 16, 32]}}"


def ranks(world: int, data: Path, out: Path, *words: str) -> list[dict[str, np.ndarray]]:
    """What each of `world` processes saw."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
    }
    env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    worker = [sys.executable, str(ROOT / "tests" / "distributed_worker.py"), str(out)]
    processes = [
        subprocess.Popen(
            [*worker, f"data={data}", *WORDS, *words],
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    for process in processes:
        said = process.communicate(timeout=240)[1]
        assert process.returncode == 0, said
    return [dict(np.load(out / f"rank{r}.npz")) for r in range(world)]


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_two_ranks_equal_one(backbone: str, crop_shards: Path, tmp_path: Path) -> None:
    one = ranks(1, crop_shards, tmp_path / "one", backbone)[0]
    two = ranks(2, crop_shards, tmp_path / "two", backbone)
    for step in range(3):
        joined = np.concatenate([r[f"samples{step}"] for r in two])
        np.testing.assert_array_equal(joined, one[f"samples{step}"])
        views = np.concatenate([r[f"view{step}"] for r in two])
        np.testing.assert_array_equal(views, one[f"view{step}"])
        np.testing.assert_allclose(two[0][f"loss{step}"], one[f"loss{step}"], rtol=2e-4)
        grad, reference = two[0][f"grad{step}"], one[f"grad{step}"]
        np.testing.assert_array_equal(grad, two[1][f"grad{step}"])
        apart = np.linalg.norm(grad - reference) / np.linalg.norm(reference)
        assert apart < (1e-4 if step == 0 else 2e-2)  # rounding grows through the steps
    np.testing.assert_allclose(two[0]["buffers"], two[1]["buffers"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two[0]["buffers"], one["buffers"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_order_does_not_depend_on_ranks(world: int, crop_shards: Path) -> None:
    """A run on 2 ranks that goes on with 1 or 4 sees the same batches."""
    index = open_index(crop_shards)

    def batch(rank: int, of: int, step: int) -> np.ndarray:
        reader = CropBatches(index, seed=3, batch=64, window=4, rank=rank, world=of, workers=0)
        return reader.batch_at(step)["samples"]

    for step in (0, 7, 23):  # beyond the first pass too
        joined = np.concatenate([batch(r, world, step) for r in range(world)])
        np.testing.assert_array_equal(joined, batch(0, 1, step))


CLI = [
    "steps=12",
    "batch=32",
    "window=16",
    "precision=fp32",
    "method={hidden: 64, out_dim: 32}",
    VIT,
    "watch.every=1",
    "save_every=4",
    "workers=1",
    "device=cpu",
]


def launch(world: int, data: Path, out: Path) -> subprocess.Popen[str]:
    """`train` as a user starts it: alone, or under torchrun."""
    start = [sys.executable, "-m"]
    if world > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [*start, "launch.cli", "train", f"data={data}", f"out={out}", *CLI],
        cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def losses(out: Path) -> dict[int, float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def test_a_run_on_two_ranks_is_stopped_by_a_signal_and_goes_on_with_one(
    crop_shards: Path, tmp_path: Path
) -> None:
    whole = launch(1, crop_shards, tmp_path / "whole")
    assert whole.wait() == 0
    process = launch(2, crop_shards, tmp_path / "run")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 5/"):
            break
    # one rank alone hears the signal; both must agree, save, and stop
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(found.stdout.split()[-1]), signal.SIGUSR2)
    said = process.stderr.read()
    assert process.wait() == 1
    assert "at step" in said and "run the same words to go on" in said
    stopped = max(losses(tmp_path / "run"))
    assert 5 <= stopped < 12
    again = launch(1, crop_shards, tmp_path / "run")
    assert f"from step {stopped}" in again.communicate()[1]
    # the same samples and views: the curve is the unbroken one's up to rounding
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert one.keys() == two.keys() == set(range(1, 13))
    for step, value in one.items():
        assert two[step] == pytest.approx(value, rel=5e-3), step


def test_synced_batch_norms_keep_what_timm_puts_behind_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Activations inside timm's batch norms stay, and so do the names of the weights."""
    import timm

    torch.manual_seed(0)
    plain = timm.create_model("efficientnet_lite0", num_classes=0, drop_path_rate=0.0).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
        expected = plain(x)
        before = plain.state_dict()
        monkeypatch.setattr(distributed, "world", lambda: 2)
        synced = distributed.sync_batch_norm(plain, torch.device("cpu"))
        assert any(isinstance(m, distributed.SyncBatchNorm) for m in synced.modules())
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in synced.modules())
        assert synced.state_dict().keys() == before.keys()
        torch.testing.assert_close(synced.eval()(x), expected)
