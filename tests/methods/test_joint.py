"""Joint training against plain loops: which crops, which pixels, which losses and gradients."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lemon_muse.data import roi_views
from lemon_muse.data.geometry import crop
from lemon_muse.dense import DenseEncoder
from lemon_muse.encoder import Encoder
from lemon_muse.methods.joint import Joint
from lemon_muse.stop import Stop
from tests.methods.joint_small import PlainJoint, joint_loop, joint_of
from tests.methods.muse_small import a_batch

STILL = (
    "method.crop_view={policy: a0, scale: [1, 1], ratio: [1, 1], hflip: 0, jitter: 0, gray: 0, "
    "blur: [0, 0]}"
)


@pytest.fixture
def method(roi_shards: Path, tmp_path: Path) -> Joint:
    return joint_of(joint_loop(roi_shards, tmp_path))


def stir(method: Joint) -> None:
    """Centres and a teacher of their own, so that a mix-up of networks or heads shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for centre in method.centres.values():
            centre.value.normal_(0, 0.2, generator=generator)  # type: ignore[operator, union-attr]
        for p in method.teacher.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 * float(p.abs().mean()))


# Losses -----------------------------------------------------------------------------------------


BRANCHES = {
    "nucleus": ("dense", "dense"),
    "crop": ("crop", "crop"),
    "to_crop": ("dense", "crop"),
    "to_dense": ("crop", "dense"),
}
WEIGHTS = {"image": 0.7, "nucleus": 1.3, "crop": 0.6, "to_crop": 1.7, "to_dense": 0.4}


def test_losses_and_gradients_are_those_of_plain_loops(roi_shards: Path, tmp_path: Path) -> None:
    """Ragged ROIs, some without a nucleus; every loss has another weight; small chunks."""
    words = [f"method.{kind}_weight={w}" for kind, w in WEIGHTS.items()]
    loop = joint_loop(roi_shards, tmp_path, *words, "method.chunk=20")
    method, batch = joint_of(loop).train(), a_batch(loop, 4)
    stir(method)
    twin = copy.deepcopy(method)
    counts = batch["counts"].tolist()
    assert min(counts) == 0 and max(counts) > 4
    out = method(batch, 3)
    plain, temperature = PlainJoint(twin, batch), 0.055
    centres: dict[str, Any] = {k: c.value for k, c in twin.centres.items()}
    found = {"image": plain.plain.image_loss(centres["image"], temperature)}
    for kind, (teacher, student) in BRANCHES.items():
        centre = centres["crop" if teacher == "crop" else "nucleus"]
        found[kind] = plain.loss(teacher, student, centre, temperature)
        if kind != "nucleus":
            assert out[f"matched_{kind}"] == plain.matched > 10, kind
    for kind, value in found.items():
        assert float(out[f"loss_{kind}"]) == pytest.approx(value.item(), rel=1e-4), kind
    whole = torch.stack([WEIGHTS[kind] * value for kind, value in found.items()]).sum()
    assert out["loss"].item() == pytest.approx(whole.item(), rel=1e-4)
    out["loss"].backward()
    whole.backward()
    assert not [n for n, p in method.teacher.named_parameters() if p.grad is not None]
    for (name, ours), theirs in zip(
        method.student.named_parameters(), twin.student.parameters(), strict=True
    ):
        assert ours.grad is not None and theirs.grad is not None
        apart = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-6)
        assert apart < 1e-3, name
    method.after_step(3)
    rows = [plain.teacher["crop"][v] for v in (0, 1)]
    means = [
        torch.stack([x for k, x in view.items() if k[0] == roi]).mean(0)
        for view in rows
        for roi in {k[0] for k in view}
    ]
    expected = 0.9 * centres["crop"] + 0.1 * torch.stack(means).mean(0)
    torch.testing.assert_close(method.centres["crop"].value, expected, rtol=0, atol=1e-5)


def test_a_batch_without_any_nucleus(roi_shards: Path, tmp_path: Path) -> None:
    """Every loss over nuclei is 0, and every gradient is there: no rank waits for another."""
    loop = joint_loop(roi_shards, tmp_path)
    method, batch = joint_of(loop).train(), a_batch(loop)
    none = {**batch, "points": torch.zeros(8, 0, 2), "counts": torch.zeros(8, dtype=torch.int64)}
    out = method(none, 0)
    out["loss"].backward()
    for kind in ("crop", "to_crop", "to_dense"):
        assert out[f"loss_{kind}"] == 0 and out[f"matched_{kind}"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.parameters())
    method.after_step(0)
    assert not method.centres["crop"].value.any() and method.centres["image"].value.any()
    assert method.judge({k: float(v.detach()) for k, v in out.items() if v.ndim == 0}) is None


CHOICES = {
    "from the map only": ["method.crop_weight=0", "method.to_dense_weight=0"],
    "own loss only": ["method.to_crop_weight=0", "method.to_dense_weight=0"],
    "no image loss": ["method.image_weight=0"],
    "sinkhorn": ["method.centring=sinkhorn", "method.norm_last=true"],
    # Not 16 px: in bf16 torch's CPU kernels give random weight gradients on maps of 1 × 1.
    "bf16": ["precision=bf16", "method.crop_window=40"],
    "parts, no locals": ["accumulate=2", "view.locals=0"],
    "vit": [
        "method.crop_backbone={name: vit_tiny, patch: 8, args: {depth: 1, embed_dim: 32, "
        "drop_path_rate: 0.5}, heads: 2, freeze_patch: true}"
    ],
}


@pytest.mark.parametrize("words", CHOICES.values(), ids=CHOICES)
def test_every_choice_trains_all_that_is_trainable(
    words: list[str], roi_shards: Path, tmp_path: Path
) -> None:
    """DDP waits for ever for a trainable parameter without a gradient."""
    words = [*words, "optim.warmup=0", "method.freeze_last=0"]
    loop = joint_loop(roi_shards, tmp_path, *words)
    method = joint_of(loop).train()
    with torch.autocast("cpu", loop.dtype, enabled=loop.dtype != torch.float32):
        method(a_batch(loop), 0)["loss"].backward()
    assert not [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    loop.optimiser.zero_grad()
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    for step in (0, 1):
        loop.step = step
        loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
    assert torch.isfinite(loop.loss)
    for name, p in method.student.named_parameters():
        assert torch.equal(p, before[f"student.{name}"]) != p.requires_grad, name
    taught = method.teacher["crop_backbone"]
    start = [before[f"teacher.crop_backbone.{n}"] for n, _ in taught.named_parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(taught.parameters(), start, strict=True))
    drops = [getattr(m, "drop_prob", 0.0) for m in taught.modules()]
    assert not any(drops)


@pytest.mark.parametrize(
    "words",
    [
        "{name: resnet10t, args: {drop_rate: 0.5, channels: [8, 8, 16, 16], stem_width: 8}}",
        "{name: vit_tiny, patch: 4, heads: 2, "
        "args: {depth: 1, embed_dim: 32, patch_drop_rate: 0.5}}",
    ],
)
def test_only_the_student_of_the_crops_drops(words: str, roi_shards: Path, tmp_path: Path) -> None:
    """Also what timm drops by a function in its forward pass, and patches."""
    method = joint_of(joint_loop(roi_shards, tmp_path, f"method.crop_backbone={words}")).train()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    student, teacher = (nets["crop_backbone"] for nets in (method.student, method.teacher))
    assert torch.equal(teacher(x), teacher(x)) and not torch.equal(student(x), student(x))


def test_one_space_teachers_equal_students_and_one_weight(method: Joint) -> None:
    for method_ in (method, copy.deepcopy(method)):
        for nets in (method_.student, method_.teacher):
            assert nets["crop"].last_layer is nets["nucleus"].last_layer
    student, teacher = method.student.state_dict(), method.teacher.state_dict()
    assert student.keys() == teacher.keys() and any("crop_backbone" in k for k in student)
    assert not [k for k in student if not torch.equal(student[k], teacher[k])]
    assert not any(p.requires_grad for p in method.teacher.parameters())
    both = (method.student, method.teacher)
    owners = [{p.data_ptr() for p in nets.parameters()} for nets in both]
    assert not owners[0] & owners[1]
    trained = [id(p) for g in method.param_groups() for p in g["params"]]
    assert len(trained) == len(set(trained))


# Crops ------------------------------------------------------------------------------------------


def test_a_crop_without_augmentation_is_that_of_geometry(roi_shards: Path, tmp_path: Path) -> None:
    loop = joint_loop(roi_shards, tmp_path, STILL, "method.crops_per_roi=40")
    method, batch = joint_of(loop), a_batch(loop)
    crops = method.make_crops(batch, method.make_views(batch))
    slots, mean, std = batch["points"].shape[1], method.setting.mean, method.setting.std
    assert len(crops.keys) == len(crops.rows) == int(batch["counts"].sum()) > 30
    near_border = 0
    for key, row in zip(crops.keys.tolist(), crops.rows.tolist(), strict=True):
        roi, nucleus = divmod(key, slots)
        assert row // 40 == roi
        centre = batch["points"][roi, nucleus].numpy()
        expected, _ = crop(batch["pixels"][roi].numpy(), centre[None], size=16)
        near_border += int((np.minimum(centre, 128 - centre) < 8).any())
        wanted = (expected[0] / 255 - np.array(mean)) / np.array(std)
        for view in crops.views:
            np.testing.assert_allclose(view[row].permute(1, 2, 0), wanted, rtol=0, atol=1e-4)
    assert near_border > 3


def test_crops_are_of_nuclei_that_the_dense_teacher_sees(roi_shards: Path, tmp_path: Path) -> None:
    """Others of the ROI fill up where fewer are seen."""
    loop = joint_loop(roi_shards, tmp_path)
    method, batch = joint_of(loop), a_batch(loop, 4)
    views = method.make_views(batch)
    crops = method.make_crops(batch, views)
    slots, few, many = batch["points"].shape[1], 0, 0
    for roi, count in enumerate(batch["counts"].tolist()):
        seen = {int(n) for v in views[:2] for n in v.inside[roi].nonzero()[:, 0]}
        taken = {k % slots for k in crops.keys.tolist() if k // slots == roi}
        assert len(taken) == min(4, count) and max(taken, default=0) < max(count, 1)
        assert taken <= seen if len(seen) >= 4 else seen <= taken
        few += len(seen) < len(taken)
        many += len(seen) > 4
    assert few and many


def test_views_of_the_branches_are_independent(roi_shards: Path, tmp_path: Path) -> None:
    """No stain to agree on: colours of a crop tell nothing of those of its ROI's views."""
    more = ["view.jitter=1", "view.gray=0.5", "method.crop_view={jitter: 1, gray: 0.5}"]
    method = joint_of(joint_loop(roi_shards, tmp_path, *more))

    def draw(count: int = 600) -> list[dict[str, torch.Tensor]]:
        return method.draw(count, torch.Generator().manual_seed(3))

    drawn = draw()
    views = method.view.views
    assert len(drawn) == views + 2 and drawn[-1]["jitter"].shape == (600, 4, 4)
    columns = []
    for row in drawn[:views]:
        columns += [*row["jitter"].T, row["gray"]]
    for row in drawn[views:]:
        for k in range(4):
            columns += [*row["jitter"][:, k].T, row["gray"][:, k]]
    table = np.corrcoef(torch.stack(columns).numpy())
    np.fill_diagonal(table, 0)
    assert np.abs(table).max() < 4.5 / math.sqrt(600)
    # Dense views are those of MUSE, and neither branch's settings change the other's numbers.
    alone = roi_views.draw(method.view, 600, torch.Generator().manual_seed(3))
    for ours, theirs in zip(drawn, alone, strict=False):
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    other = joint_of(joint_loop(roi_shards, tmp_path, *more, "view.jitter=0", "view.gray=0"))
    again = other.draw(600, torch.Generator().manual_seed(3))
    for v in (-2, -1):
        assert all(torch.equal(again[v][k], drawn[v][k]) for k in drawn[v])
    assert not torch.equal(again[0]["jitter"], drawn[0]["jitter"])


# Exports and alarms -----------------------------------------------------------------------------


def test_either_teacher_is_the_encoder(roi_shards: Path, tmp_path: Path) -> None:
    for words, kind, side, mpp in (
        ([], Encoder, 16, 0.25),
        (["method.export=dense"], DenseEncoder, 32, 0.5),
    ):
        loop = joint_loop(roi_shards, tmp_path, *words)
        method = joint_of(loop)
        stir(method)
        encoder = method.encoder()
        assert type(encoder) is kind and (encoder.image_size, encoder.mpp) == (side, mpp)
        assert loop.cfg.window_px == side and encoder.mean == method.setting.mean
        name = "crop_backbone" if kind is Encoder else "backbone"
        theirs = method.teacher[name].state_dict()
        assert all(torch.equal(theirs[k], v) for k, v in encoder.network.state_dict().items())


def test_a_collapse_of_the_crops_is_named(roi_shards: Path, tmp_path: Path) -> None:
    loop = joint_loop(roi_shards, tmp_path)
    method, batch = joint_of(loop).train(), a_batch(loop)

    def judge(step: int) -> str:
        found = {k: float(v.detach()) for k, v in method(batch, 0).items() if v.ndim == 0}
        return method.judge({"step": step, **found}) or ""

    assert method.chance() == pytest.approx(math.log(48) + 4 * math.log(40))
    assert judge(15) == ""
    found = {k: float(v.detach()) for k, v in method(batch, 0).items() if v.ndim == 0}
    for kind in ("crop", "to_crop", "to_dense"):
        flat = {f"entropy_{kind}": math.log(40), f"kl_{kind}": 0.01, "step": 15}
        said = method.judge({**found, **flat}) or ""
        assert said.startswith(f"the {kind} loss 3.699 still is chance level 3.689")
        assert method.judge({**found, **flat, "step": 1}) is None
        sharp = {f"entropy_{kind}": 0.0, f"kl_{kind}": 0.01, "step": 1}
        said = method.judge({**found, **sharp}) or ""
        assert said.startswith(f"one-hot collapse: the {kind} loss is 0.010")
    with torch.no_grad():
        for p in method.student["crop_backbone"].parameters():
            p.zero_()
    assert judge(1).startswith("uniform collapse: the features of all crops")
