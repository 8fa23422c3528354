"""MUSE's network: counts, sizes, taps, positions, options, drops, seeds, layouts and bf16."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from lemon_muse.backbones.muse import MuseBackbone, MuseNet, build_muse, resize_positions
from lemon_muse.backbones.muse_decoder import SkipDrop, normaliser
from lemon_muse.config import dump, load
from lemon_muse.errors import UserError

TINY = {"embed_dim": 64, "depth": 4}


def tiny(seed: int = 0, args: dict[str, Any] | None = None, **settings: Any) -> MuseNet:
    words = {"image": 96, "args": args or TINY, **settings}
    return build_muse(MuseBackbone(**words), seed=seed)


def resnet(**settings: Any) -> MuseNet:
    return build_muse(MuseBackbone(name="resnet18", **settings), seed=0)


def pixels(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "total", "decoder"),
    [("vit_small", 31.07, 9.41), ("vit_base", 123.41, 37.61), ("resnet50", 86.44, 62.93)],
)
def test_parameter_counts_are_the_published_ones(name: str, total: float, decoder: float) -> None:
    with torch.device("meta"):
        net = build_muse(MuseBackbone(name=name), seed=0)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == total
    assert net.decoder is not None
    assert round(sum(p.numel() for p in net.decoder.parameters()) / 1e6, 2) == decoder
    assert (net.dim, net.map_dim, net.stride) == {
        "vit_small": (384, 384, 4),
        "vit_base": (768, 768, 4),
        "resnet50": (2048, 1024, 4),
    }[name]


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize(
    "size", [(96, 96), (208, 208), (224, 224), (112, 112), (16, 16), (80, 144), (176, 32)]
)
def test_any_multiple_of_the_patch_goes_through(patch: int, size: tuple[int, int]) -> None:
    net = tiny(patch=patch)
    cls, dense = net(pixels(2, 3, *size))
    assert cls.shape == (2, 64) and dense.shape == (2, 64, size[0] // 4, size[1] // 4)
    (cls.sum() + dense.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_large_field_of_view() -> None:
    with torch.no_grad():
        _, dense = tiny().eval()(pixels(1, 3, 512, 512))
    assert dense.shape == (1, 64, 128, 128)


@pytest.mark.parametrize("size", [(96, 96), (100, 96), (75, 131)])
def test_a_resnet_takes_any_size(size: tuple[int, int]) -> None:
    net = resnet().eval()
    images = pixels(2, 3, *size)
    with torch.no_grad():
        cls, dense = net(images)
        wanted = timm.create_model("resnet18", num_classes=0).eval()
        wanted.load_state_dict(net.encoder.encoder.state_dict())
        assert torch.allclose(cls, wanted(images), atol=1e-5)  # timm's own global mean
    assert dense.shape == (2, 256, -(-size[0] // 4), -(-size[1] // 4))


@pytest.mark.parametrize("size", [(100, 96), (96, 40)])
def test_half_a_patch_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"{size[0]} × {size[1]} px.*multiples of 16"):
        tiny()(pixels(1, 3, *size))


@pytest.mark.parametrize(
    ("depth", "taps"),
    [(12, [2, 5, 8, 11]), (4, [0, 1, 2, 3]), (6, [0, 2, 3, 5]), (2, [0, 0, 0, 1])],
)
def test_taps_are_timms_blocks_through_the_norm(depth: int, taps: list[int]) -> None:
    net = tiny(args={"embed_dim": 32, "depth": depth}).eval()
    vit = net.encoder.encoder
    for parameter in vit.parameters():  # norms of 1 and 0 would hide which norm was used
        nn.init.normal_(parameter, std=0.2)
    images = pixels(2, 3, 96, 96)
    with torch.no_grad():
        cls, maps = net.encoder(images)
        read = vit.get_intermediate_layers(images, n=sorted(set(taps)), norm=True, reshape=True)
        wanted = dict(zip(sorted(set(taps)), read, strict=True))
        assert torch.allclose(cls, vit(images), atol=1e-5)
    assert len(maps) == 4
    for tap, found in zip(taps, maps, strict=True):
        assert torch.allclose(found, wanted[tap], atol=1e-5)


@pytest.mark.parametrize("grid", [(6, 6), (7, 3), (13, 20)])
def test_positions_move_like_timms(grid: tuple[int, int]) -> None:
    table = pixels(1, 36, 8)
    wanted = resample_abs_pos_embed(table, list(grid), [6, 6], num_prefix_tokens=0, antialias=False)
    assert torch.allclose(resize_positions(table, (6, 6), grid), wanted, atol=1e-6)


def test_register_tokens_and_separate_positions() -> None:
    """timm's variants of the plain ViT give the same class token as timm's own forward."""
    net = build_muse(
        MuseBackbone(
            name="vit_base_patch14_reg4_dinov2",
            image=56,
            convention="centre",
            args={"embed_dim": 32, "depth": 2},
            heads=2,
        ),
        seed=0,
    ).eval()
    images = pixels(1, 3, 56, 56)
    with torch.no_grad():
        cls, dense = net(images)
        assert torch.allclose(cls, net.encoder.encoder(images), atol=1e-5)
    assert net.encoder.patch == 14 and dense.shape == (1, 32, 14, 14)


@pytest.mark.parametrize(
    ("decoder", "shape", "keys"),
    [
        ("full", (2, 64, 16, 24), "decoder.hyper_feats.conv_list.3.layer.0.weight"),
        ("single", (2, 64, 16, 24), "decoder.projection.layer.0.weight"),
        ("none", (2, 64, 4, 6), "encoder.encoder.norm.weight"),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_decoders(decoder: str, shape: tuple, keys: str, norm: str) -> None:
    net = tiny(decoder=decoder, norm=norm)
    cls, dense = net(pixels(2, 3, 64, 96))
    assert dense.shape == shape and net.stride == 64 // shape[2]
    names = net.state_dict().keys()
    assert keys in names
    assert any(name.startswith("decoder.") for name in names) == (decoder != "none")
    assert any("hyper_feats" in name for name in names) == (decoder == "full")
    assert any("running_mean" in name for name in names) == (norm == "batch" and decoder != "none")
    (cls.square().sum() + dense.square().sum()).backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    assert unused == []


def test_without_decoder_the_map_is_the_last_tokens() -> None:
    net = tiny(decoder="none").eval()
    images = pixels(2, 3, 96, 96)
    with torch.no_grad():
        _, dense = net(images)
        tokens = net.encoder.encoder.forward_features(images)[:, 1:]
    assert torch.allclose(dense.flatten(2).transpose(1, 2), tokens, atol=1e-5)


def test_group_norm_knows_no_batch() -> None:
    images = pixels(3, 3, 96, 96)
    for norm, alone in (("group", True), ("batch", False)):
        net = tiny(norm=norm, drop_path=0.0).train()
        with torch.no_grad():
            together, single = net(images)[1][:1], net(images[:1])[1]
        assert torch.allclose(together, single, atol=1e-4) == alone
    groups = [normaliser(c, "group").num_groups for c in (16, 96, 192, 384, 6, 3)]
    assert groups == [4, 16, 32, 32, 1, 1]


def test_the_teacher_drops_nothing() -> None:
    images = pixels(2, 3, 96, 96)
    for student in (tiny(norm="group", drop_path=0.5), tiny(norm="group", skip_drop=(0.5,) * 3)):
        student.train()
        teacher = copy.deepcopy(student).without_drops()
        with torch.no_grad():
            runs = torch.stack([student(images)[1] for _ in range(8)])
            wanted = student.eval()(images)[1]
            assert teacher.training and torch.equal(teacher(images)[1], wanted)
        assert (runs - runs[0]).abs().amax((1, 2, 3, 4)).max() > 1e-3


def test_depth_of_the_drop_path_is_dinos() -> None:
    """Rates rise linearly from 0 at the first block to the given one at the last."""
    net = tiny(drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.encoder.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_skip_drop() -> None:
    torch.manual_seed(0)
    drop = SkipDrop(0.15)
    out = drop(torch.ones(4000, 2, 3, 3))
    gone = (out == 0).flatten(1)
    assert (gone.all(1) == gone.any(1)).all() and set(out.unique().tolist()) == {0.0, 1.0}
    assert abs(gone.float().mean() - 0.15) < 3 * (0.15 * 0.85 / 4000) ** 0.5
    assert torch.equal(drop.eval()(torch.ones(9, 1, 1, 1)), torch.ones(9, 1, 1, 1))

    def rates(net: MuseNet) -> list[float]:
        decoder = net.decoder
        assert decoder is not None
        return [stage.skip.rate for stage in (decoder.decoder1, decoder.decoder2, decoder.decoder3)]

    assert rates(resnet()) == [0.15, 0.10, 0.05] and rates(tiny()) == [0, 0, 0]
    assert rates(resnet(skip_drop=(0, 0, 0.5))) == [0, 0, 0.5]


def test_the_seed_decides_and_global_chance_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = tiny(1).state_dict(), tiny(1).state_dict(), tiny(2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    key = "encoder.encoder.cls_token"
    assert not torch.equal(one[key], other[key])
    for drawn in (key, "encoder.encoder.pos_embed", "encoder.encoder.blocks.3.mlp.fc1.weight"):
        assert one[drawn].std() == pytest.approx(0.02, rel=0.3)


def test_channels_last_gives_the_same() -> None:
    images = pixels(2, 3, 96, 64)
    for net in (tiny(), resnet(norm="group")):
        net.eval()
        with torch.no_grad():
            wanted = net(images)
            net.to(memory_format=torch.channels_last)
            found = net(images.to(memory_format=torch.channels_last))
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
        assert found[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("convention", ["released", "centre"])
def test_bf16_runs_and_learns(convention: str) -> None:
    net = tiny(convention=convention, drop_path=0.0)
    images = pixels(4, 3, 64, 64)
    wanted = net(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(images)
    for low, full in zip(found, wanted, strict=True):
        assert (low - full).float().norm() < 0.03 * full.norm()
    sum(part.float().square().mean() for part in found).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_gradient_checkpointing_changes_nothing() -> None:
    images = pixels(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        net = tiny(drop_path=0.0)
        net.encoder.encoder.set_grad_checkpointing(enable)
        net(images)[1].square().mean().backward()
        grads.append(net.encoder.encoder.patch_embed.proj.weight.grad)
    assert torch.allclose(*grads)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_smal"}, "neither vit_tiny"),
        ({"name": "convnext_tiny"}, "not a plain ViT or ResNet"),
        ({"name": "vit_base_patch16_gap_224"}, "class token"),
        ({"patch": 15}, "multiple of 15"),
        ({"args": {"embed_dim": 65}}, "divisible|divide"),
        ({"args": {"embed_dim": 66, "num_heads": 1}}, "set backbone.heads"),
        ({"args": {"embed_dim": 66}}, "4 does not divide"),
        ({"args": {"global_pool": "avg"}}, "global_pool"),
        ({"args": {"no_such": 1}}, "no_such"),
        ({"heads": 5}, "timm cannot build"),
        ({"name": "resnet18", "args": {"num_classes": 3}}, "num_classes"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_muse(MuseBackbone(**settings), seed=0)


def test_settings_come_back_from_their_own_yaml(tmp_path: Any) -> None:
    """What a run saves as its settings builds the same network, also for a timm name."""
    for settings in (MuseBackbone(), MuseBackbone(name="vit_small_patch8_224", args=TINY, heads=1)):
        (tmp_path / "muse.yaml").write_text(dump(settings))
        back = load(MuseBackbone, [str(tmp_path / "muse.yaml")])
        assert back == settings
        with torch.device("meta"):
            nets = [build_muse(each, seed=0) for each in (settings, back)]
        assert nets[0].encoder.patch == nets[1].encoder.patch
    assert nets[0].encoder.patch == 8
