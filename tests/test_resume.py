"""Exactness: a run that is cut anywhere ends where the unbroken one ends; ranks do not matter."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lemon_muse import checkpoint
from lemon_muse.errors import RunError
from tests.conftest import write_blob_shards

WORDS = [
    "steps=20",
    "batch=32",
    "window=16",
    "precision=fp32",
    "method.hidden=64",
    "method.out_dim=32",
    "backbone={name: vit_tiny, patch: 8, heads: 3, "
    "args: {depth: 2, embed_dim: 48, drop_path_rate: 0.2}}",
    "backbone.freeze_patch=false",
    "optim.lr=0.004",
    "optim.clip=1",
    "watch.every=1",
    "workers=1",
]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",
}
ROOT = Path(__file__).resolve().parents[1]


def command(data: Path, out: Path, *words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "launch.cli",
        "train",
        f"data={data}",
        f"out={out}",
        *WORDS,
        *words,
    ]


def train(data: Path, out: Path, *words: str) -> None:
    done = subprocess.run(
        command(data, out, *words), cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.load_newest(out / "checkpoints")
    assert found is not None and found[0] == 20
    return found[1]["method"]


def kill_at(data: Path, out: Path, step: int, *words: str) -> None:
    """Start a run and `kill -9` it as soon as its metrics show `step`."""
    process = subprocess.Popen(
        command(data, out, *words), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blob_shards(tmp_path_factory.mktemp("resume") / "crops", count=300)


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("unbroken")
    train(data, out / "run")
    return weights(out / "run")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


def test_two_halves_and_a_kill_equal_one_whole(
    data: Path, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    kill_at(data, tmp_path / "run", 13, "save_every=10")
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints")[0] == 10  # type: ignore[index]
    train(data, tmp_path / "run", "save_every=10")
    equal(weights(tmp_path / "run"), unbroken)


def test_another_seed_gives_other_weights(
    data: Path, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    train(data, tmp_path / "run", "seed=1")
    assert any(not torch.equal(v, unbroken[k]) for k, v in weights(tmp_path / "run").items())


@pytest.mark.slow
def test_killed_at_ten_random_moments(
    data: Path, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Kills at any moment: while starting, reading, stepping, or writing a checkpoint."""
    rng = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(
            command(data, tmp_path / "run", "save_every=1", "watch.every=20"),
            cwd=ROOT,
            env=ENV,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(3.0, 7.0))
        process.kill()
        process.wait()
    train(data, tmp_path / "run", "save_every=1", "watch.every=20")
    equal(weights(tmp_path / "run"), unbroken)


def test_a_signal_saves_and_the_same_words_go_on(
    data: Path, unbroken: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command(data, tmp_path / "run"), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 1
    assert "stopped by SIGTERM at step" in said and "run the same words to go on" in said
    train(data, tmp_path / "run")
    equal(weights(tmp_path / "run"), unbroken)


def test_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": torch.full((1000,), float(step))}, keep=2)
    newest = checkpoint.list_newest_first(tmp_path)[0]
    payload = bytearray(newest.read_bytes())
    payload[len(payload) // 2] ^= 1
    newest.write_bytes(payload)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[0] == 1 and found[1]["x"][0] == 1
    assert "damaged" in caplog.text


def test_metrics_of_a_killed_run_have_each_step_once(data: Path, tmp_path: Path) -> None:
    import json

    kill_at(data, tmp_path / "run", 13, "save_every=10")
    train(data, tmp_path / "run", "save_every=10")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 21))


def test_other_settings_in_the_same_folder_are_refused(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", "steps=2")
    done = subprocess.run(
        command(data, tmp_path / "run", "steps=2", "method.temperature=0.5"),
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "method.temperature: 0.2 -> 0.5" in done.stderr
    assert RunError  # exit code 1 belongs to failures while running, 2 to words
