"""MoCo v3 against the formulas of its paper and reference, written out here plainly."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from lemon_muse import ema, losses, schedules
from lemon_muse.backbones import Backbone, build, timm_arguments
from lemon_muse.backbones.vit import sincos_positions
from lemon_muse.data.augment import ViewConfig
from lemon_muse.data.shards import open_index
from lemon_muse.errors import UserError
from lemon_muse.heads import mlp
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.moco_v3 import MoCoV3, MoCoV3Config
from lemon_muse.optim import Optim
from lemon_muse.recipe import LemonTrain as Train
from lemon_muse.stop import Stop
from lemon_muse.train import Loop

SMALL = Backbone(name="vit_tiny", patch=8, heads=3, args={"depth": 2, "embed_dim": 48})


def make(**changes: object) -> MoCoV3:
    settings = MoCoV3Config(hidden=64, out_dim=32, **changes)  # type: ignore[arg-type]
    told = Setting(
        steps=10,
        batch=16,
        stored=32,
        window=16,
        mpp=0.25,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,  # type: ignore[arg-type]
        seed=0,
        view=ViewConfig(),
        backbone=SMALL,
    )
    return MoCoV3(settings, told)


def a_batch(method: MoCoV3, n: int = 16) -> dict:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return {"pixels": pixels, "views": method.draw(n, generator)}


def plain_info_nce(q: np.ndarray, k: np.ndarray, t: float) -> float:
    """A loop over queries: -log of the softmax share of the own key, times 2 T."""
    total = 0.0
    for i in range(len(q)):
        cosines = [
            float(q[i] @ k[j] / np.linalg.norm(q[i]) / np.linalg.norm(k[j])) / t
            for j in range(len(k))
        ]
        total += -cosines[i] + math.log(sum(math.exp(c) for c in cosines))
    return total / len(q) * 2 * t


def test_info_nce_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 12, 7))
    ours = losses.info_nce(torch.tensor(q), torch.tensor(k), temperature=0.2)
    assert float(ours) == pytest.approx(plain_info_nce(q, k, 0.2), rel=1e-5)


def test_info_nce_of_equal_features_is_chance_and_stays_fp32() -> None:
    ones = torch.ones(256, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.info_nce(ones.bfloat16(), torch.ones(256, 8).bfloat16(), temperature=0.2)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(losses.info_nce_chance(256, 0.2), rel=1e-6)
    # the published sanity value: symmetric loss at chance, batch 4096, T 0.2
    assert 2 * losses.info_nce_chance(4096, 0.2) == pytest.approx(6.654, abs=1e-3)


def test_the_loss_is_the_symmetric_sum() -> None:
    method = make(temperature=0.1)
    batch = a_batch(method)
    method.train()
    twin = copy.deepcopy(method)
    loss = float(method(batch, 0)["loss"].detach())
    x1, x2 = twin.views.make(batch)
    with torch.no_grad():
        features = [twin.base["backbone"](x) for x in (x1, x2)]
        q1, q2 = (twin.predictor(twin.base["projector"](f)).numpy() for f in features)
        k1, k2 = (
            twin.momentum["projector"](twin.momentum["backbone"](x)).numpy() for x in (x1, x2)
        )
    expected = plain_info_nce(q1, k2, 0.1) + plain_info_nce(q2, k1, 0.1)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_teacher_is_the_student_at_step_0_and_gets_no_gradient() -> None:
    method = make()
    assert method.base.state_dict().keys() == method.momentum.state_dict().keys()
    for ours, theirs in zip(method.base.parameters(), method.momentum.parameters(), strict=True):
        assert torch.equal(ours, theirs) and not theirs.requires_grad
    method(a_batch(method), 0)["loss"].backward()
    assert all(p.grad is None for p in method.momentum.parameters())
    unused = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # DDP would hang on them
    trained = {id(p) for g in method.param_groups() for p in g["params"]}
    assert trained == {id(p) for p in method.parameters() if p.requires_grad}


def test_ema_is_the_closed_form_over_parameters_only() -> None:
    method = make()
    start = {k: v.clone() for k, v in method.momentum.state_dict().items()}
    with torch.no_grad():
        for p in method.base.parameters():
            p.add_(1.0)
        method.base["projector"][1].running_mean.add_(5.0)
    value = method.after_step(4)["momentum"]
    assert value == pytest.approx(1 - 0.01 * (1 + math.cos(math.pi * 0.5)) / 2)
    for name, p in method.momentum.named_parameters():
        expected = value * start[name] + (1 - value) * method.base.get_parameter(name)
        torch.testing.assert_close(p.data, expected.data, rtol=0, atol=1e-6)
    assert torch.equal(
        method.momentum["projector"][1].running_mean, start["projector.1.running_mean"]
    )


def test_the_momentum_encoder_keeps_batch_statistics() -> None:
    method = make().train()
    before = method.momentum["projector"][1].running_mean.clone()
    method(a_batch(method), 0)
    assert method.momentum["projector"][1].training
    assert not torch.equal(method.momentum["projector"][1].running_mean, before)


def test_heads_have_the_layout_of_the_reference() -> None:
    kinds = [type(m).__name__ for m in mlp(3, in_dim=384, hidden=4096, out_dim=256)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    projector = mlp(3, in_dim=384, hidden=4096, out_dim=256)
    assert all(m.bias is None for m in projector if isinstance(m, torch.nn.Linear))
    assert projector[1].affine and not projector[-1].affine
    assert len(mlp(2, in_dim=8, hidden=16, out_dim=4, last_norm=False)) == 4


def test_vit_small_8_at_40_is_lemons_network() -> None:
    network = build(Backbone(), 40, seed=0)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(21.4e6, rel=0.01)
    assert network.blocks[0].attn.num_heads == 12
    assert network.pos_embed.shape == (1, 26, 384)
    assert network(torch.zeros(2, 3, 40, 40)).shape == (2, 384)
    assert not network.pos_embed.requires_grad
    assert not any(p.requires_grad for p in network.patch_embed.parameters())
    assert torch.equal(network.pos_embed[0, 0], torch.zeros(384))


def test_positions_are_sines_of_row_then_column() -> None:
    table = sincos_positions(16, 3, 5)
    for i in range(3):
        for j in range(5):
            omega = [1 / 10000 ** (c / 4) for c in range(4)]
            expected = [f(at * w) for at in (i, j) for f in (math.sin, math.cos) for w in omega]
            np.testing.assert_allclose(table[i * 5 + j], expected, atol=1e-6)


def test_initial_weights_are_the_references() -> None:
    network = build(Backbone(), 40, seed=0)
    qkv = network.blocks[3].attn.qkv.weight
    assert float(qkv.detach().abs().max()) == pytest.approx(math.sqrt(6 / (384 + 384)), rel=0.01)
    fc1 = network.blocks[3].mlp.fc1.weight
    assert float(fc1.detach().abs().max()) == pytest.approx(math.sqrt(6 / (384 + 1536)), rel=0.01)
    patch = network.patch_embed.proj.weight
    assert float(patch.detach().abs().max()) == pytest.approx(
        math.sqrt(6 / (3 * 64 + 384)), rel=0.01
    )
    assert network.cls_token.abs().max() < 1e-5
    assert not network.blocks[3].attn.qkv.bias.any()


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base"])
@pytest.mark.parametrize("patch", [4, 5, 8])
def test_every_vit_and_patch(name: str, patch: int) -> None:
    architecture, arguments = timm_arguments(
        Backbone(name=name, patch=patch, args={"depth": 1}), 40
    )
    network = timm.create_model(architecture, num_classes=0, **arguments)
    assert network.patch_embed.num_patches == (40 // patch) ** 2
    assert network(torch.zeros(1, 3, 40, 40)).shape == (1, network.num_features)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_small_patch16_224", "convnext_atto"])
def test_any_timm_name(name: str) -> None:
    network = build(Backbone(name=name), 48, seed=0)
    assert network(torch.zeros(2, 3, 48, 48)).shape == (2, network.num_features)


@pytest.mark.parametrize(
    ("name", "patch"),
    [("vit_tiny_patch16_224", 16), ("vit_small_r26_s32_224", None), ("vit_tiny", 8)],
)
def test_saved_settings_build_the_same_network(name: str, patch: int | None) -> None:
    """A checkpoint keeps every field, also those that the user left to timm."""
    given = Backbone(name=name)
    again = Backbone.model_validate(given.model_dump())
    assert timm_arguments(again, 96) == timm_arguments(given, 96)
    if patch:
        assert build(again, 96, seed=0).patch_embed.patch_size == (patch, patch)
    assert timm_arguments(Backbone(name=name, patch=4), 96)[1]["patch_size"] == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Backbone(patch=7), r"patch=7 does not divide window=40; use one of"),
        (Backbone(name="vit_smol"), "neither vit_tiny, vit_small, vit_base nor a timm model"),
        (Backbone(args={"no_such": 1}), "timm cannot build"),
    ],
)
def test_wrong_backbones(settings: Backbone, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(settings, 40, seed=0)


def test_learning_rate_is_scaled_warmed_up_and_cosine() -> None:
    settings = Optim()
    assert settings.rate(0, 36600, 4096) == 0
    assert max(settings.rate(s, 36600, 4096) for s in range(0, 36600, 50)) == pytest.approx(
        2.4e-3, rel=1e-3
    )
    assert settings.rate(36600, 36600, 4096) == pytest.approx(0, abs=1e-9)
    half = (round(0.133 * 1000) + 1000) / 2
    middle = schedules.warmup_cosine(round(half), 1000, warmup=133, peak=1.0)
    assert middle == pytest.approx(0.5, abs=0.01)


def test_accumulation_steps_the_ema_once_and_keeps_samples(
    crop_shards: Path, tmp_path: Path
) -> None:
    """Two parts of 16 see the samples and views of one batch of 32, in order."""
    index = open_index(crop_shards)
    words = {"data": crop_shards, "out": tmp_path / "a", "steps": 4, "batch": 32, "window": 16}
    common = {"backbone": SMALL, "method": MoCoV3Config(hidden=64, out_dim=32), "precision": "fp32"}
    whole = Loop(Train(**words, **common), index, torch.device("cpu"), None)  # type: ignore[arg-type]
    split = Loop(Train(**words, **common, accumulate=2), index, torch.device("cpu"), None)  # type: ignore[arg-type]
    batch = whole.batches.batch_at(1)
    whole.step = split.step = 1
    one, two = whole._parts(batch)[0], split._parts(batch)
    assert len(two) == 2
    for key in one["views"][0]:
        joined = torch.cat([part["views"][0][key] for part in two])
        assert torch.equal(one["views"][0][key], joined)
    assert torch.equal(one["pixels"], torch.cat([part["pixels"] for part in two]))
    calls: list[float] = []
    original = ema.update

    def counted(teacher: torch.nn.Module, student: torch.nn.Module, momentum: float) -> None:
        calls.append(momentum)
        original(teacher, student, momentum)

    ema.update = counted
    try:
        split._one_step(split._runner(), batch, Stop())
    finally:
        ema.update = original
    assert calls == [schedules.cosine(2, 4, start=0.99, end=1.0)]


def test_it_learns_to_tell_nuclei_apart(crop_shards: Path, tmp_path: Path) -> None:
    index = open_index(crop_shards)
    cfg = Train(
        data=crop_shards, out=tmp_path, steps=60, batch=64, window=32, precision="fp32", workers=0,
        backbone=Backbone(name="resnet10t", args={"channels": [16, 32, 32, 64]}),
        method=MoCoV3Config(
            hidden=128, out_dim=32, temperature=0.1, momentum=0.9, projector_layers=2
        ),
        optim=Optim(lr=4e-3, warmup=0.1),
        view=ViewConfig(policy="mild", gray=0, jitter=0),
    )  # fmt: skip
    loop = Loop(cfg, index, torch.device("cpu"), None)
    values = []
    for step in range(60):
        loop.step = step
        loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
        values.append(float(loop.loss))
    assert np.mean(values[-5:]) < 0.5 * loop.method.chance()
