"""MUSE that collapses, or cannot start, says so: one sentence and the right exit code."""

from pathlib import Path

import pytest
import torch

from launch import cli
from lemon_muse import checkpoint
from lemon_muse.methods.muse import Muse
from tests.conftest import write_blob_rois
from tests.methods.muse_small import WORDS, a_batch, method_of, open_loop

# Centres that stand still and sharp targets: what centring keeps from collapsing, collapses.
NO_CENTRE = [
    "method={centre_momentum: 0.9999999, teacher_temperature: [0.01, 0.01], momentum: 0.5}",
    "method.freeze_last=0",
    "optim={lr: 0.1, warmup: 0, clip: 3, weight_decay: 0}",
]


def train(data: Path, out: Path, *more: str) -> int:
    return cli.main(["train", f"data={data}", f"out={out}", *WORDS, *more])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def scalars(method: Muse, batch: dict) -> dict[str, float]:
    method.train()
    return {k: float(v.detach()) for k, v in method(batch, 0).items() if v.ndim == 0}


# Collapse ---------------------------------------------------------------------------------------


def test_without_centring_one_hot_collapse_stops_the_run(
    roi_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ["watch.collapse=stop", "save_every=100", *NO_CENTRE]
    assert train(roi_shards, out, *more) == 1
    assert "one-hot collapse: the image loss is 0.0" in last_line(capsys)
    assert not (out / "encoder").exists()
    step, _ = checkpoint.load_newest(out / "checkpoints")  # type: ignore[misc]
    assert 1 < step < 20


def test_a_warning_lets_the_run_go_on_and_centring_needs_none(
    roi_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["watch.collapse=warn", "steps=4", "optim.warmup=0"]
    assert train(roi_shards, tmp_path / "a", *more, *NO_CENTRE) == 0
    assert "WARNING step" in capsys.readouterr().err
    assert train(roi_shards, tmp_path / "b", *more) == 0
    assert "WARNING" not in capsys.readouterr().err


def test_chance_level_stops_the_run(
    roi_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student so warm that its distributions are uniform whatever its features are."""
    more = ["watch.collapse=stop", "method.temperature=1000"]
    assert train(roi_shards, tmp_path / "run", *more) == 1
    assert "still is chance level 7.560" in last_line(capsys)  # ln 48 + ln 40


@pytest.mark.parametrize("kind", ["image", "nucleus"])
def test_one_head_at_chance_is_named_though_the_other_learns(
    kind: str, roi_shards: Path, tmp_path: Path
) -> None:
    loop = open_loop(roi_shards, tmp_path, "method.reduction=sum")
    method = method_of(loop)
    assert method.judge({"step": 15, **scalars(method, a_batch(loop))}) is None
    with torch.no_grad():
        method.student[kind].last_layer.weight_g.zero_()  # type: ignore[operator, union-attr]
    found = scalars(method, a_batch(loop))
    said = method.judge({"step": 15, **found})
    assert said is not None and said.startswith(f"the {kind} loss") and "chance level" in said
    assert method.judge({"step": 1, **found}) is None  # too early to say


def test_one_hot_targets_of_the_nuclei_alone(roi_shards: Path, tmp_path: Path) -> None:
    """Both networks put all nuclei on the same prototype, and the loss of a sum hides nothing."""
    loop = open_loop(roi_shards, tmp_path, "method.reduction=sum")
    method = method_of(loop)
    with torch.no_grad():
        for net in (method.student, method.teacher):
            head = net["nucleus"]
            head.mlp[-1].weight.zero_()  # type: ignore[index, union-attr, operator]
            head.mlp[-1].bias.fill_(1.0)  # type: ignore[index, union-attr, operator]
            head.last_layer.weight_v[0] = 1.0  # type: ignore[index, union-attr, operator]
            head.last_layer.weight_g[0] = 3.0  # type: ignore[index, union-attr, operator]
    said = method.judge(scalars(method, a_batch(loop)))
    assert said is not None and said.startswith("one-hot collapse: the nucleus loss is 0.00")


def test_equal_features_of_all_nuclei(roi_shards: Path, tmp_path: Path) -> None:
    """A decoder whose last normalisations give a constant: the loss alone would not tell."""
    loop = open_loop(roi_shards, tmp_path)
    method = method_of(loop)
    before = scalars(method, a_batch(loop))
    assert before["nucleus_std"] > 0.5 and method.judge(before) is None
    with torch.no_grad():
        for level in method.student["backbone"].decoder.hyper_feats.conv_list:  # type: ignore[union-attr]
            level.layer[1].weight.fill_(1e-4)
            level.layer[1].bias.fill_(1.0)
    found = scalars(method, a_batch(loop))
    said = method.judge(found)
    assert found["nucleus_std"] < 0.001
    assert said is not None and said.startswith("uniform collapse: the features of all nuclei")


@pytest.mark.parametrize("words", [["accumulate=4"], ["batch=2"]])
def test_few_rois_are_no_collapse(
    words: list[str], roi_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Centred features of 2 ROIs are one line: all parts are judged together, or not at all."""
    more = ["watch.collapse=warn", "steps=3", "optim.warmup=0", *words]
    assert train(roi_shards, tmp_path / "run", *more) == 0
    assert "collapse" not in capsys.readouterr().err


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["batch=32"], "holds 24 ROIs, fewer than batch=32; set batch=16 or smaller"),
        (["accumulate=8"], "fewer than 2 ROIs per rank and part"),
        (["view.global_size=1024"], "A global view of 1024 px at 0.25 µm per pixel shows 256 µm"),
        (["view.local_mpp=[4, 4]"], "A local view of 16 px at 4 µm per pixel shows 64 µm"),
        (["view.local_size=20"], "view.local_size=20 px cannot be cut into patches of 8 px"),
        (["backbone.patch=5"], "backbone.patch=5 does not divide backbone.image=32"),
        (["backbone.name=vit_smal"], "is neither vit_tiny, vit_small, vit_base nor a timm model"),
        (["method.image_weight=0", "method.nucleus_weight=0"], "are both 0, so nothing would be"),
        (["method.reduction=mean"], "'method.reduction' is 'mean': input should be 'pair'"),
        (["window=40"], "unknown key 'window'"),
        (["init=nowhere"], "nowhere is not an encoder folder"),
    ],
)
def test_wrong_words_exit_2_and_leave_nothing(
    words: list[str],
    said: str,
    roi_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(roi_shards, tmp_path / "run", *words) == 2
    assert said in last_line(capsys)
    assert not (tmp_path / "run").exists()


def test_crops_are_not_rois(
    crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(crop_shards, tmp_path / "run") == 2
    assert "holds crops, but rois are needed here" in last_line(capsys)
    assert not (tmp_path / "run").exists()


def test_small_rois_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_blob_rois(tmp_path / "rois", counts=(1, 2) * 4, side=30, margin=2)
    assert train(data, tmp_path / "run") == 2
    assert "the ROIs are 7.5 µm wide (30 px at 0.25); make global_size at most 30" in last_line(
        capsys
    )


def test_a_loss_that_is_not_finite_names_the_rois(
    roi_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["optim={lr: 1.0e30, warmup: 0.5}", "save_every=1"]
    assert train(roi_shards, tmp_path / "run", *more) == 1
    said = last_line(capsys)
    assert "the loss is not finite at step" in said and "(ROI at" in said
    step, _ = checkpoint.load_newest(tmp_path / "run" / "checkpoints")  # type: ignore[misc]
    assert f"at step {step} " in said
