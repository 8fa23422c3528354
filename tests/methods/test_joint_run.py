"""Joint runs: ranks, resuming, the recipe from the command line, both exports, wrong words."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.benchmarks import find
from eval.online import DenseProbe, OnlineProbe
from launch import cli
from launch.training import online_probe
from lemon_muse import checkpoint
from lemon_muse.encoder import load
from lemon_muse.stop import Stop
from lemon_muse.synthetic import write_images
from tests.conftest import write_blob_rois
from tests.methods.joint_small import JOINT, joint_loop
from tests.methods.joint_worker import watch
from tests.methods.muse_small import WORDS
from tests.methods.muse_worker import WORDS as PLAIN_SGD
from tests.methods.muse_worker import Arrays

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}


def two_ranks(out: Path, data: Path) -> list[Arrays]:
    """What each of two gloo processes saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**ENV, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    worker = [sys.executable, str(ROOT / "tests" / "methods" / "joint_worker.py")]
    processes = [
        subprocess.Popen(
            [*worker, str(out), str(data)],
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [dict(np.load(out / f"rank{r}.npz")) for r in range(2)]


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """A rank without any nucleus, then ranks with unequal numbers; the crop encoder has BN."""
    counts = (0, 0, 0, 0, 0, 3, 20, 1, 9, 5, 14, 2, 7, 11, 6, 4)
    data = write_blob_rois(tmp_path / "rois", counts=counts, seed=1)
    two = two_ranks(tmp_path / "two", data)
    whole = watch(joint_loop(data, tmp_path / "one", *PLAIN_SGD), 0, 2)
    held = [[int(r[f"{step} rows counts"].sum()) for r in two] for step in (0, 1)]
    assert held[0][0] == 0 < held[0][1] and 0 < held[1][0] != held[1][1] > 0
    assert {k for k in whole if "crop_backbone" in k and "grad" in k}
    assert {k for k in whole if "crop_backbone" in k and "running_var" in k}
    for key, value in whole.items():
        parts = [r[key] for r in two]
        if " rows " in key:
            np.testing.assert_array_equal(np.concatenate(parts), value, err_msg=key)
            continue
        np.testing.assert_array_equal(parts[0], parts[1], err_msg=key)
        if not key.endswith("_std"):  # the mean over ranks of what each has by itself
            bound = 1e-5 + 2e-3 * float(np.abs(value).max())
            np.testing.assert_allclose(parts[0], value, rtol=0, atol=bound, err_msg=key)


def test_two_steps_and_two_more_equal_four(roi_shards: Path, tmp_path: Path) -> None:
    """Bit for bit, with stochastic depth in both networks and gradients of two parts."""
    words = ["accumulate=2", "backbone.drop_path=0.3", "optim.warmup=0", "method.freeze_last=0"]
    words.append("method.crop_backbone.args.drop_path_rate=0.3")

    def go_on(name: str, last: int) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        loop = joint_loop(roi_shards, tmp_path / name, *words)
        loop.resume()
        loop.monitor.close()
        for step in range(loop.step, last):
            loop.step = step
            loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
        loop.step = last
        loop.save()
        return {**loop.method.state_dict(), "loss": loop.loss}

    whole, start = go_on("whole", 4), go_on("parts", 2)
    resumed = go_on("parts", 4)
    assert not [k for k in whole if not torch.equal(whole[k], resumed[k])]
    for key in ("centres.crop.value", "student.crop.mlp.0.weight"):
        assert whole[key].any() and not torch.equal(whole[key], start[key])


def test_the_recipe_from_the_command_line_and_both_encoders(tmp_path: Path) -> None:
    data = write_blob_rois(tmp_path / "rois", counts=(9, 0, 14, 3, 20, 1), side=192)
    run, recipe = tmp_path / "run", ROOT / "configs" / "brca_joint.yaml"
    words = [str(recipe), f"data={data}", f"out={run}", "steps=2", "batch=4", "device=cpu"]
    assert cli.main(["train", *words, "workers=0", "watch.every=1", "optim.warmup=0"]) == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 2
    for row in logged:
        assert np.isfinite([row[f"loss_{k}"] for k in ("crop", "to_crop", "to_dense")]).all()
    encoder = load(run)
    assert (encoder.kind, encoder.image_size, encoder.mpp) == ("crop", 40, 0.25)
    newest = checkpoint.list_newest_first(run / "checkpoints")[0]
    state = torch.load(newest, weights_only=True)["method"]
    crops = "teacher.crop_backbone."
    assert not [k for k, v in encoder.network.state_dict().items() if not v.equal(state[crops + k])]
    # The other network of the same run, without its decoder: for timm.
    dense = [f"checkpoint={newest}", "network=dense", f"out={tmp_path / 'dense'}"]
    assert cli.main(["export", *dense]) == 0
    found = load(tmp_path / "dense").network.state_dict()
    assert len(found) > 20
    taps = "teacher.backbone.encoder.encoder."
    assert not [k for k, v in found.items() if not v.equal(state[taps + k])]


def test_the_online_probe_is_of_the_encoder_that_is_exported(
    roi_shards: Path, tmp_path: Path
) -> None:
    """Crops at their own mpp, not that of the ROIs; or windows of the dense network."""
    write_images(tmp_path / "tissue", slides=6, side=96, seed=5)
    more = [f"probe={{benchmark: folder, root: {tmp_path / 'tissue'}}}", "method.crop_mpp=0.5"]
    loop = joint_loop(roi_shards, tmp_path / "a", *more)
    probe = online_probe(loop.cfg)
    assert isinstance(probe, OnlineProbe) and "probe/knn_macro_f1" in probe(loop.method.encoder())
    table = find("folder").load(tmp_path / "tissue")
    rows = np.sort(np.concatenate([table.rows("train"), table.rows("val")]))
    crops = {c.tobytes() for c in table.crops(16, 0.5, rows)}
    assert all(c.tobytes() in crops for side in probe.crops for c in side)
    loop = joint_loop(roi_shards, tmp_path / "b", *more, "method.export=dense")
    probe = online_probe(loop.cfg)
    assert isinstance(probe, DenseProbe) and "probe/knn_macro_f1" in probe(loop.method.encoder())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.crop_weight=0", "method.to_crop_weight=0"], "the crop encoder would not be"),
        (["method.nucleus_weight=0"], "'method.nucleus_weight' is 0"),
        (["method.crop_window=15"], "'crop_window' is 15, but must be even"),
        (["method.crop_window=120"], "but the ROIs are 128 px wide"),
        (["method.crop_mpp=2"], "The crops' views need 256 px of a ROI around a nucleus"),
        (["method.crop_view.hed=0.5"], "take another policy"),
        (["method.crop_backbone={name: vit_tiny, patch: 7}"], "does not divide"),
        (["method.crop_backbone={name: nonsense}"], "method.crop_backbone, window=16: "),
        (
            ["method.crop_backbone={name: vit_tiny, patch: 8, inner: 8}"],
            "'crop_backbone.inner' is 8, which looks for the nucleus in the middle",
        ),
        (["method.export=teacher"], "'method.export' is 'teacher'"),
        (["init=nowhere"], "unknown key 'init'"),
    ],
)
def test_wrong_words_exit_2_and_leave_nothing(
    words: list[str],
    said: str,
    roi_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert cli.main(["train", f"data={roi_shards}", f"out={run}", *WORDS, *JOINT, *words]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not run.exists()
