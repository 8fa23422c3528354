"""Training that cannot go on says why in one sentence, exits rightly, and loses nothing."""

import errno
import json
from pathlib import Path

import pytest
import torch

from launch import cli
from lemon_muse import checkpoint
from lemon_muse.data import files
from lemon_muse.errors import RunError

SMALL = [
    "batch=32",
    "window=16",
    "precision=fp32",
    "method={hidden: 64, out_dim: 32}",
    "backbone={name: vit_tiny, patch: 8, args: {depth: 1, embed_dim: 48}, heads: 3}",
    "watch.every=1",
    "workers=0",
    "device=cpu",
]


def train(data: Path, out: Path, *words: str) -> int:
    return cli.main(["train", f"data={data}", f"out={out}", *SMALL, *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch=1024"], "holds 700 nuclei, fewer than batch=1024; set batch=512 or smaller"),
        (["window=48"], "window=48 px is larger than the stored crops of 32 px; set window=32"),
        (["batch=30", "accumulate=4"], "batch=30 is not divisible by accumulate=4"),
        (["batch=4", "accumulate=4"], "fewer than 2 nuclei per rank and part"),
        (["backbone.patch=5"], "backbone.patch=5 does not divide window=16"),
        (["optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["optim.lr=-1"], "'optim.lr' is -1: input should be greater than 0"),
        (["view.policy=a2"], "'view.policy' is 'a2': input should be 'a0', 'a1'"),
        (["method.name=dino"], "'method.name' is 'dino'"),
        (["device=cuda:x"], "device 'cuda:x' is not known"),
        (["probe.benchmark=brcam2c"], "probe.benchmark needs probe.root=FOLDER"),
        (["probe={benchmark: brcam2d, root: .}"], "no benchmark 'brcam2d'"),
    ],
)
def test_wrong_words_exit_2(
    words: list[str],
    said: str,
    crop_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(crop_shards, tmp_path / "run", *words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(crop_shards, tmp_path / "run", "device=cuda") == 2
    assert "torch sees no GPU here; use device=cpu" in capsys.readouterr().err


def test_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "nowhere", tmp_path / "run") == 2
    assert "has no index.json, so it is not a finished set" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["steps=30", "optim={lr: 1.0e30, warmup: 0.5}", "save_every=1", "watch.collapse=off"]
    assert train(crop_shards, out, *words) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the loss is not finite at step" in last and "rank(s) [0]" in last
    assert "slide" in last  # names the samples
    step, _ = checkpoint.load_newest(out / "checkpoints")  # type: ignore[misc]
    assert f"at step {step} " in last  # saved after the step before, not after the bad one
    assert not (out / "encoder").exists()


def test_collapse_stops_the_run_when_told_to(
    crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["steps=40", "optim={lr: 1.0e-9, warmup: 0}", "watch={collapse: stop, every: 1}"]
    # Nothing is learnt at this rate: T so high that the loss is chance whatever the features are.
    assert train(crop_shards, tmp_path / "run", *words, "method.temperature=1000") == 1
    assert "still is chance level" in capsys.readouterr().err


def test_a_full_disk_while_saving(
    crop_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    real = files.write_atomic
    calls = []

    def full(path: Path, payload: bytes) -> None:
        calls.append(path)
        if sum(p.suffix == ".pt" for p in calls) == 3 and path.suffix == ".pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, payload)

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    assert train(crop_shards, out, "steps=6", "save_every=1") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert checkpoint.load_newest(out / "checkpoints")[0] == 2  # type: ignore[index]
    monkeypatch.undo()
    assert train(crop_shards, out, "steps=6", "save_every=1") == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunError, match=r"a\.bin cannot be written, the disk is full; make room"):
        files.write_atomic(tmp_path / "a.bin", b"x")
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_trained_again(crop_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(crop_shards, out, "steps=3") == 0
    before = (out / "encoder" / "model.safetensors").read_bytes()
    checkpoints = checkpoint.list_newest_first(out / "checkpoints")
    assert train(crop_shards, out, "steps=3") == 0
    assert (out / "encoder" / "model.safetensors").read_bytes() == before
    assert checkpoint.list_newest_first(out / "checkpoints") == checkpoints


def test_export_from_a_checkpoint_alone(
    crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lemon_muse.encoder import load

    out = tmp_path / "run"
    assert train(crop_shards, out, "steps=3") == 0
    file = checkpoint.list_newest_first(out / "checkpoints")[0]
    for network in ("query", "momentum"):
        words = [f"checkpoint={file}", f"network={network}", f"out={tmp_path / network}"]
        assert cli.main(["export", *words]) == 0
    assert load(tmp_path / "query").content_hash == load(out).content_hash
    assert load(tmp_path / "momentum").content_hash != load(out).content_hash
    assert cli.main(["export", f"checkpoint={file}", f"run={out}", f"out={tmp_path / 'x'}"]) == 2
    assert "exactly one of run=FOLDER and checkpoint=FILE" in capsys.readouterr().err
