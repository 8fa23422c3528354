"""MUSE against plain computations: teacher, centres, schedules, losses, what has a gradient."""

import copy
import math
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath

from lemon_muse.methods.muse import Muse
from lemon_muse.stop import Stop
from tests.methods.muse_small import Plain, a_batch, method_of, open_loop


@pytest.fixture
def method(roi_shards: Path, tmp_path: Path) -> Muse:
    return method_of(open_loop(roi_shards, tmp_path))


def stir(method: Muse) -> None:
    """Centres and a teacher of their own, so that a mix-up of networks or heads shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for centre in method.centres.values():
            centre.value.normal_(0, 0.2, generator=generator)  # type: ignore[operator, union-attr]
        for p in method.teacher.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 * float(p.abs().mean()))


def test_the_teacher_is_the_student_at_step_0(method: Muse) -> None:
    student, teacher = method.student.state_dict(), method.teacher.state_dict()
    assert student.keys() == teacher.keys() and any("running_mean" in k for k in student)
    assert not [k for k in student if not torch.equal(student[k], teacher[k])]
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert not {p.data_ptr() for p in method.teacher.parameters()} & {
        p.data_ptr() for p in method.student.parameters()
    }


def test_only_the_student_drops(roi_shards: Path, tmp_path: Path) -> None:
    words = ["backbone.drop_path=0.5", "backbone.skip_drop=[0.5, 0.5, 0.5]"]
    method = method_of(open_loop(roi_shards, tmp_path, *words)).train()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nets = method.student["backbone"], method.teacher["backbone"]
    assert any(isinstance(m, DropPath) and m.drop_prob > 0 for m in nets[0].modules())
    for net, drops in zip(nets, (True, False), strict=True):
        # Both in training mode: batch statistics, so that only drops can make a difference.
        first, again = net(images), net(images)
        assert torch.equal(first[0], again[0]) != drops
        assert torch.equal(first[1], again[1]) != drops


def test_gradients_reach_the_student_alone(roi_shards: Path, tmp_path: Path) -> None:
    loop = open_loop(roi_shards, tmp_path)
    method = method_of(loop).train()
    method(a_batch(loop), 0)["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    for name, p in method.student.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    trained = {id(p) for g in method.param_groups() for p in g["params"]}
    assert trained == {id(p) for p in method.parameters() if p.requires_grad}


def test_the_ema_is_the_closed_form_over_parameters_only(method: Muse) -> None:
    start = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
        for name, b in method.student.named_buffers():
            b.add_(5 if name.endswith("tracked") else 5.0)
    m = method.after_step(5)["momentum"]
    assert m == pytest.approx(1 - 0.004 * (1 + math.cos(math.pi * 5 / 20)) / 2)
    for name, p in method.teacher.named_parameters():
        expected = m * start[name] + (1 - m) * method.student.get_parameter(name).detach()
        torch.testing.assert_close(p.data, expected, rtol=0, atol=1e-6)
    for name, b in method.teacher.named_buffers():
        assert torch.equal(b, start[name]), name


def test_centres_follow_the_mean_of_all_parts_of_a_step(roi_shards: Path, tmp_path: Path) -> None:
    """Image: every global view alike. Nucleus: every ROI in a view alike, whatever it holds."""
    loop = open_loop(roi_shards, tmp_path)
    method = method_of(loop).train()
    stir(method)
    before = {k: c.value.clone() for k, c in method.centres.items()}  # type: ignore[union-attr, operator]
    images, nuclei = [], []
    for step in (0, 1):
        plain = Plain(copy.deepcopy(method), a_batch(loop, step))
        for t in range(plain.globals):
            images += list(plain.teacher[t][0])
            for roi in range(plain.rois):
                shown = plain.inside[t][roi]
                if shown.any():
                    nuclei.append(plain.teacher[t][1][roi][shown].mean(0))
        method(a_batch(loop, step), 0)
        for kind, centre in method.centres.items():  # a centre moves after a step, not within it
            assert torch.equal(centre.value, before[kind])  # type: ignore[arg-type]
    method.after_step(0)
    for kind, rows in (("image", images), ("nucleus", nuclei)):
        expected = 0.9 * before[kind] + 0.1 * torch.stack(rows).mean(0)
        torch.testing.assert_close(method.centres[kind].value, expected, rtol=0, atol=1e-6)
    now = method.centres["image"].value.clone()
    method.after_step(1)
    assert torch.equal(method.centres["image"].value, now)


@pytest.mark.parametrize(
    ("step", "temperature", "reduction"),
    [
        (0, 0.04, "pair"),
        (3, 0.055, "pair"),
        (6, 0.07, "pair"),
        (19, 0.07, "pair"),
        (3, 0.055, "sqrt"),
        (3, 0.055, "nucleus"),
        (3, 0.055, "sum"),
    ],
)
def test_the_losses_are_those_of_plain_loops(
    step: int, temperature: float, reduction: str, roi_shards: Path, tmp_path: Path
) -> None:
    """Views, matches, both heads and the warm-up of the teacher's temperature (6 of 20 steps)."""
    words = [f"method.reduction={reduction}", "method.image_weight=0.7", "method.chunk=50"]
    words += ["view.global_mpp=[0.45, 0.5]", "method.nucleus_weight=1.3"]  # many shared nuclei
    loop = open_loop(roi_shards, tmp_path, *words)
    method = method_of(loop).train()
    stir(method)
    batch = a_batch(loop, step)
    plain = Plain(copy.deepcopy(method), batch)
    out = method(batch, step)
    centres = {k: c.value for k, c in method.centres.items()}
    image = plain.image_loss(centres["image"], temperature).detach()  # type: ignore[arg-type]
    nucleus = plain.nucleus_loss(centres["nucleus"], temperature, reduction).detach()  # type: ignore[arg-type]
    found = {k: float(v.detach()) for k, v in out.items() if v.ndim == 0}
    assert found["loss_image"] == pytest.approx(float(image), rel=1e-4)
    assert found["loss_nucleus"] == pytest.approx(float(nucleus), rel=1e-4)
    assert found["loss"] == pytest.approx(float(0.7 * image + 1.3 * nucleus), rel=1e-4)
    sizes = [len(f) for f in plain.found]
    assert found["matched"] == sum(sizes) > 30
    assert min(sizes) == 1 and max(sizes) > (2 if step < 6 else 1)
    assert found["pairs"] == len(plain.found)
    assert found["empty_pairs"] == pytest.approx(1 - len(plain.found) / (2 * 3 * 8))
    # entropy + kl is the mean cross-entropy, whatever the reduction scales the loss by
    mean = found["entropy_nucleus"] + found["kl_nucleus"]
    same = {"sum": "nucleus"}.get(reduction, reduction)
    expected = plain.nucleus_loss(centres["nucleus"], temperature, same).detach()  # type: ignore[arg-type]
    assert mean == pytest.approx(float(expected), rel=1e-4)


def test_gradients_are_those_of_the_plain_loops(roi_shards: Path, tmp_path: Path) -> None:
    loop = open_loop(roi_shards, tmp_path)
    method = method_of(loop).train()
    stir(method)
    twin, batch = copy.deepcopy(method), a_batch(loop)
    method(batch, 0)["loss"].backward()
    plain = Plain(twin, batch)
    centres = {k: c.value for k, c in twin.centres.items()}
    loss = plain.image_loss(centres["image"], 0.04) + plain.nucleus_loss(centres["nucleus"], 0.04)  # type: ignore[arg-type]
    loss.backward()
    for (name, ours), theirs in zip(
        method.student.named_parameters(), twin.student.parameters(), strict=True
    ):
        assert ours.grad is not None and theirs.grad is not None
        apart = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-6)
        assert apart < 1e-3, name


def test_prototypes_wait_and_weight_decay_rises(roi_shards: Path, tmp_path: Path) -> None:
    loop = open_loop(roi_shards, tmp_path, "method.freeze_last=0.1", "optim.warmup=0")
    method = method_of(loop)
    decayed, kept = loop.optimiser.param_groups
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim < 2 for p in kept["params"])
    for step in range(4):
        before = {n: p.detach().clone() for n, p in method.student.named_parameters()}
        loop.step = step
        loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
        share = (1 + math.cos(math.pi * step / 20)) / 2
        assert decayed["weight_decay"] == pytest.approx(0.4 - 0.36 * share)
        assert kept["weight_decay"] == 0
        for name, p in method.student.named_parameters():
            still = step < 2 and "last_layer" in name
            assert torch.equal(p, before[name]) == still, (step, name)


CHOICES = {
    "image loss only": ["method.nucleus_weight=0"],
    "image loss only, no locals": ["method.nucleus_weight=0", "view.locals=0"],
    "nucleus loss only": ["method.image_weight=0"],
    "no decoder": ["backbone.decoder=none"],
    "no decoder, nucleus loss only": ["backbone.decoder=none", "method.image_weight=0"],
    "single": ["backbone.decoder=single", "backbone.convention=centre"],
    "group norm, norm_last": ["backbone.norm=group", "method.norm_last=true"],
    "sinkhorn": ["method.centring=sinkhorn"],
    "resnet": ["backbone={name: resnet18, args: {channels: [8, 16, 16, 32]}}"],
    "resnet, image loss only": [
        "backbone={name: resnet18, args: {channels: [8, 16, 16, 32]}}",
        "method.nucleus_weight=0",
    ],
    "bf16": ["precision=bf16"],
    "parts": ["accumulate=2"],
    "one global": ["view.globals=1"],
    "reduction sum": ["method.reduction=sum"],
}


@pytest.mark.parametrize("words", CHOICES.values(), ids=CHOICES)
def test_every_choice_trains_all_that_is_trainable(
    words: list[str], roi_shards: Path, tmp_path: Path
) -> None:
    """DDP waits for ever for a trainable parameter without a gradient."""
    loop = open_loop(roi_shards, tmp_path, *words, "optim.warmup=0", "method.freeze_last=0")
    method = method_of(loop).train()
    with torch.autocast("cpu", loop.dtype, enabled=loop.dtype != torch.float32):
        method(a_batch(loop), 0)["loss"].backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    loop.optimiser.zero_grad()
    before = {n: p.detach().clone() for n, p in method.student.named_parameters()}
    for step in (0, 1):
        loop.step = step
        loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
    off = () if method.settings.nucleus_weight else ("nucleus.", "backbone.decoder.")
    off += () if method.settings.image_weight else ("image.",)
    off += ("weight_g",) if method.settings.norm_last else ()
    for name, p in method.student.named_parameters():
        frozen = name.startswith(off) or name.endswith(off)
        assert p.requires_grad != frozen, name
        assert torch.equal(p, before[name]) == frozen, name
    if method.settings.centring == "sinkhorn":
        assert not any(c.value.any() for c in method.centres.values())  # type: ignore[operator, union-attr]


def test_a_batch_without_any_nucleus(roi_shards: Path, tmp_path: Path) -> None:
    """Nothing to match: the nucleus loss is 0 and its gradients are zeros, not missing."""
    loop = open_loop(roi_shards, tmp_path)
    method, batch = method_of(loop).train(), a_batch(loop)
    none = {**batch, "points": torch.zeros(8, 0, 2), "counts": torch.zeros(8, dtype=torch.int64)}
    out = method(none, 0)
    out["loss"].backward()
    assert out["loss_nucleus"] == 0 and out["matched"] == 0 and out["empty_pairs"] == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.parameters())
    method.after_step(0)
    assert not method.centres["nucleus"].value.any() and method.centres["image"].value.any()
    assert method.judge({k: float(v.detach()) for k, v in out.items() if v.ndim == 0}) is None
