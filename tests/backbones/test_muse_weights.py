"""Released MUSE files: every key and shape, the same numbers as a plain forward, bad files."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lemon_muse.backbones.muse import MuseBackbone, build_muse
from lemon_muse.backbones.muse_weights import PREFIX, from_released, to_released
from lemon_muse.backbones.sampling import sample
from lemon_muse.errors import UserError
from tests.backbones import released_reference as reference
from tests.backbones.released_reference import State

SMALL = {"dim": 64, "depth": 4, "patch": 16, "cells": 6}


def checkpoint(state: State) -> dict[str, Any]:
    """What DINO's trainer saves around the backbone."""
    teacher = {PREFIX + key: value for key, value in state.items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(3, 3)
    return {"teacher": teacher, "epoch": 3, "args": argparse.Namespace(arch="vit_small")}


def pixels(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def doubled(state: State) -> State:
    return {key: value.double() for key, value in state.items()}


def assert_same(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-9) -> None:
    """In float64, so that nothing but a different formula can differ."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == torch.float64
    assert 0.1 < wanted.abs().mean() < 100  # neither dead nor drowned
    assert (found - wanted).abs().max() < within


@pytest.mark.parametrize(
    ("name", "shapes", "tensors"),
    [
        ("vit_small", reference.vit_shapes(384), 232),
        ("vit_base", reference.vit_shapes(768), 232),
        ("resnet50", reference.resnet50_shapes(), 396),
    ],
)
def test_keys_and_shapes_are_the_released_ones(name: str, shapes: dict, tensors: int) -> None:
    with torch.device("meta"):
        net = build_muse(MuseBackbone(name=name), seed=0)
    found = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert found == shapes and len(found) == tensors


def test_vit_small_is_the_released_forward() -> None:
    state = reference.random_state(reference.vit_shapes(384))
    net = from_released(checkpoint(state)).double()
    images = pixels(1, 3, 224, 224)
    with torch.no_grad():
        cls, dense = net(images)
        wanted_cls, wanted = reference.vit_forward(doubled(state), images, heads=6)
    assert dense.shape == (1, 384, 56, 56)
    assert_same(cls, wanted_cls)
    assert_same(dense, wanted)


def test_resnet50_is_the_released_forward() -> None:
    state = reference.random_state(reference.resnet50_shapes())
    net = from_released(checkpoint(state)).double()
    images = pixels(2, 3, 96, 96)
    with torch.no_grad():
        cls, dense = net(images)
        wanted_cls, wanted = reference.resnet50_forward(doubled(state), images)
    assert dense.shape == (2, 1024, 24, 24)
    assert_same(cls, wanted_cls)
    assert_same(dense, wanted)


@pytest.mark.parametrize("size", [(96, 96), (64, 64), (128, 128)])
@pytest.mark.parametrize("patch", [8, 16])
def test_other_image_sizes_are_the_released_forward(size: tuple[int, int], patch: int) -> None:
    state = reference.random_state(reference.vit_shapes(**{**SMALL, "patch": patch}))
    images = pixels(2, 3, *size)
    with torch.no_grad():
        cls, dense = from_released(checkpoint(state)).double()(images)
        wanted_cls, wanted = reference.vit_forward(doubled(state), images, heads=1)
    assert_same(cls, wanted_cls)
    assert_same(dense, wanted)


def test_pos_resample_is_what_the_released_loader_does() -> None:
    state = reference.random_state(reference.vit_shapes(**SMALL))
    key = "encoder.encoder.pos_embed"
    moved = doubled(state)
    table = reference.move_positions(moved[key][0, 1:], 6, 6)
    moved[key] = torch.cat([moved[key][:, :1], table[None]], 1)
    change = (moved[key] - state[key]).norm() / state[key].norm()
    assert 0.01 < change < 0.15  # 9 % for a random table of 14 x 14
    images = pixels(1, 3, 96, 96)
    with torch.no_grad():
        _, plain = from_released(checkpoint(state)).double()(images)
        _, dense = from_released(checkpoint(state), pos_resample=True).double()(images)
        _, wanted = reference.vit_forward(moved, images, heads=1)
    assert_same(dense, wanted, within=1e-5)  # the stored table is float32
    assert (dense - plain).abs().max() > 1e-3


def test_pos_resample_to_a_larger_image_is_one_resampling() -> None:
    """The loader of the 512 models with a file whose table is smaller."""
    state = reference.random_state(reference.vit_shapes(**SMALL))
    net = from_released(checkpoint(state), pos_resample=True, image=128)
    assert net.settings.image == 128
    key = "encoder.encoder.pos_embed"
    wanted = reference.move_positions(state[key][0, 1:], 8, 8)
    assert torch.allclose(net.state_dict()[key][0, 1:], wanted, atol=1e-5)


def test_the_released_sampler() -> None:
    """Per image: grid_sample at 2 x / S - 1 with aligned corners, as in nuclei_extractor.py."""
    maps = pixels(3, 5, 24, 24).float()
    owner = torch.tensor([2, 0, 0, 2, 2, 0, 0])
    points = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)) * 96
    found = sample(maps, points, owner, size=(96, 96), convention="released")
    for b in range(3):
        grid = (2 * points[owner == b] / 96 - 1)[None, None]
        wanted = F.grid_sample(maps[b : b + 1], grid, mode="bilinear", align_corners=True)
        assert torch.allclose(found[owner == b], wanted[0, :, 0].T, atol=1e-5)


def test_a_written_file_comes_back(tmp_path: Path) -> None:
    settings = MuseBackbone(patch=8, image=64, args={"embed_dim": 128, "depth": 5})
    net = build_muse(settings, seed=3)
    net.train()(pixels(2, 3, 64, 64).float())  # moves the running statistics
    released = to_released(net)
    assert list(released) == ["teacher"]
    assert all(key.startswith("module.backbone.") for key in released["teacher"])
    path = tmp_path / "muse.pth"
    torch.save(released, path)
    back = from_released(path)
    assert back.settings == settings.model_copy(update={"name": "vit_small"})
    assert back.encoder.encoder.blocks[0].attn.num_heads == 2 and not back.training
    images = pixels(2, 3, 64, 96, seed=1).float()
    with torch.no_grad():
        for found, wanted in zip(back(images), net.eval()(images), strict=True):
            assert torch.equal(found, wanted)
    assert int(back.state_dict()["decoder.decoder1.first_block.layer.1.num_batches_tracked"]) == 1


def test_a_file_of_dinos_trainer_is_read(tmp_path: Path) -> None:
    state = reference.random_state(reference.vit_shapes(**SMALL))
    torch.save(checkpoint(state), tmp_path / "vit.pth")
    net = from_released(tmp_path / "vit.pth")
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


class Payload:
    """An object that weights_only refuses."""


def test_other_objects_need_trust(tmp_path: Path) -> None:
    path = tmp_path / "objects.pth"
    state = reference.random_state(reference.vit_shapes(**SMALL))
    torch.save({**checkpoint(state), "extra": Payload()}, path)
    with pytest.raises(UserError, match=r"Payload.*trust=True"):
        from_released(path)
    assert from_released(path, trust=True).dim == 64


def edited(**changes: Any) -> dict[str, Any]:
    state = reference.random_state(reference.vit_shapes(**SMALL))
    for key, value in changes.items():
        state[key] = value
    return checkpoint({key: value for key, value in state.items() if value is not None})


BN = "decoder.decoder2.first_block.layer.1.running_mean"
BAD = [
    ({"model": {}}, "no entry 'teacher'"),
    ({"teacher": {"module.head.weight": torch.zeros(1)}}, "begins with 'module.backbone.'"),
    (edited(**{BN: None}), f"lacks {re.escape(BN)}"),
    (edited(**{"decoder.last_norm.weight": torch.zeros(4)}), "unknown decoder.last_norm.weight"),
    (edited(**{BN: torch.zeros(5)}), r"running_mean is \(5,\) instead of \(32,\)"),
    (edited(**{"encoder.encoder.pos_embed": None}), "neither a ViT"),
    (edited(**{"encoder.encoder.pos_embed": torch.zeros(1, 12, 64)}), "12 positions"),
    (edited(**{"encoder.encoder.conv1.weight": torch.zeros(1)}), "only ResNet-50"),
]


@pytest.mark.parametrize(("stored", "message"), BAD)
def test_other_checkpoints_are_refused(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_released(stored)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        from_released(tmp_path / "absent.pth")
    for content in (b"", b"not a checkpoint\n", b"PK\x03\x04 cut short"):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.pth"):
            from_released(tmp_path / "bad.pth")
    with pytest.raises(UserError, match="multiple of the patch"):
        from_released(edited(), image=100)


@pytest.mark.parametrize(
    "change",
    [{"norm": "group"}, {"decoder": "single"}, {"convention": "centre"}, {"heads": 4}],
)
def test_what_the_released_code_cannot_hold_is_not_written(change: dict[str, Any]) -> None:
    settings = MuseBackbone(image=32, args={"embed_dim": 64, "depth": 1}, **change)
    with pytest.raises(UserError, match=next(iter(change))):
        to_released(build_muse(settings, seed=0))
    with pytest.raises(UserError, match="name=resnet18"):
        to_released(build_muse(MuseBackbone(name="resnet18"), seed=0))
