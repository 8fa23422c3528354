"""The encoder folder: timm opens it unchanged, and it refuses to be another function."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from lemon_muse import encoder as enc
from lemon_muse.backbones import Backbone, build, timm_arguments
from lemon_muse.errors import RunError, UserError
from lemon_muse.export import FORMATS


def make(settings: Backbone, window: int = 40) -> enc.Encoder:
    architecture, arguments = timm_arguments(settings, window)
    return enc.Encoder(
        build(settings, window, seed=3),
        architecture=architecture,
        arguments=arguments,
        image_size=window,
        mpp=0.25,
        mean=(0.56, 0.38, 0.54),
        std=(0.18, 0.17, 0.14),
        name="test <encoder>",
    )


BACKBONES = {
    "vit_s8": Backbone(args={"depth": 2}),
    "vit_ti5_avg": Backbone(name="vit_tiny", patch=5, pool="avg", args={"depth": 2}),
    "resnet": Backbone(name="resnet10t", args={"channels": [16, 32, 32, 64]}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_timm_opens_it_unchanged(name: str, tmp_path: Path) -> None:
    ours = make(BACKBONES[name])
    if name == "resnet":  # BN statistics must travel too
        ours.train()(torch.randn(8, 3, 40, 40))
    ours.eval()
    enc.save_encoder(ours, tmp_path / "e", card={"Data": "none"})
    theirs = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True).eval()
    images = torch.randn(4, 3, 40, 40)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-6)
    assert tuple(theirs.pretrained_cfg["mean"]) == (0.56, 0.38, 0.54)
    assert theirs.pretrained_cfg["input_size"] in ([3, 40, 40], (3, 40, 40))
    if name == "vit_s8":
        assert theirs.blocks[0].attn.num_heads == 12


@pytest.mark.parametrize("name", BACKBONES)
def test_load_gives_back_all_facts(name: str, tmp_path: Path) -> None:
    ours = make(BACKBONES[name]).eval()
    enc.save_encoder(ours, tmp_path)
    back = enc.load(tmp_path)
    for fact in (
        "dim",
        "image_size",
        "patch_size",
        "num_heads",
        "mpp",
        "mean",
        "std",
        "feature",
        "name",
    ):
        assert getattr(back, fact) == getattr(ours, fact), fact
    assert back.content_hash == ours.content_hash
    assert not back.training and not any(p.requires_grad for p in back.parameters())


def test_the_export_format_is_checked(tmp_path: Path) -> None:
    ours = make(BACKBONES["vit_s8"]).eval()
    assert FORMATS["timm"](ours, tmp_path / "t", {}) == 0
    bare = torch.load(tmp_path / "t" / "encoder.pth", weights_only=True)
    assert bare.keys() == ours.network.state_dict().keys()


def test_another_head_count_is_noticed(tmp_path: Path) -> None:
    """6 and 12 heads have the same tensors: only the stored output tells them apart."""
    enc.save_encoder(make(BACKBONES["vit_s8"]).eval(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["num_heads"] = 6
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not give the output that was saved with it"):
        enc.load(tmp_path)


def test_altered_weights_are_noticed(tmp_path: Path) -> None:
    enc.save_encoder(make(BACKBONES["vit_s8"]).eval(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["blocks.0.mlp.fc1.weight"] *= 1.05
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="relative difference"):
        enc.load(tmp_path)


def test_bad_folders_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not an encoder folder"):
        enc.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        enc.load(tmp_path)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    ours = make(BACKBONES["vit_s8"])
    with torch.no_grad():
        ours.network.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match=r"non-finite weights in norm\.weight"):
        enc.save_encoder(ours, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_hash_follows_weights_and_facts() -> None:
    a, b = make(BACKBONES["vit_s8"]), make(BACKBONES["vit_s8"])
    assert a.content_hash == b.content_hash
    b.mpp = 0.5
    assert a.content_hash != b.content_hash
    b.mpp = 0.25
    with torch.no_grad():
        b.network.norm.bias[0] += 1e-3
    assert a.content_hash != b.content_hash
