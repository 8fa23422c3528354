"""The encoder of MUSE: its folder, what it computes, and what others get of it."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lemon_muse import encoder as enc
from lemon_muse.backbones.muse_weights import PREFIX, from_released
from lemon_muse.dense import IMAGENET, DenseEncoder
from lemon_muse.errors import RunError, UserError
from lemon_muse.export import FORMATS
from lemon_muse.export.job import Export
from lemon_muse.export.job import run as export
from tests.eval.standins import dense_encoder, dense_network, small_encoder

KINDS = {
    "vit": {},
    "centre": {"convention": "centre", "norm": "group"},
    "no decoder": {"decoder": "none"},
    "resnet": {
        "name": "resnet10t",
        "patch": None,
        "heads": None,
        "args": {"channels": [16, 32, 32, 64]},
    },
}


def some_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(2, 3, 64, 96, generator=generator)
    points = torch.rand(9, 2, generator=generator) * torch.tensor([96, 64])
    return images, points, torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_back_facts_hash_and_function(kind: str, tmp_path: Path) -> None:
    ours = dense_encoder(**KINDS[kind])
    enc.save_encoder(ours, tmp_path, card={"Data": "none"})
    back = enc.load(tmp_path)
    assert isinstance(back, DenseEncoder)
    assert back.facts() == ours.facts() and back.name == ours.name
    assert (back.dim, back.cls_dim, back.stride) == (ours.dim, ours.cls_dim, ours.stride)
    assert back.mpp_range == (0.25, 0.5) and back.settings == ours.settings
    assert back.content_hash == ours.content_hash
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    images, points, owner = some_input()
    with torch.inference_mode():
        assert torch.equal(back(images), ours(images))
        found = back.nuclei(images, points, owner)
        assert torch.equal(found, ours.nuclei(images, points, owner))
    assert found.shape == (9, ours.dim) and found.std(0).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_nuclei_are_the_map_read_by_torch_grid_sample(kind: str) -> None:
    ours = dense_encoder(**KINDS[kind])
    images, points, owner = some_input()
    grid = 2 * points / torch.tensor([96, 64]) - 1
    with torch.inference_mode():
        cls, maps = ours.network(images)
        assert torch.equal(ours.dense(images), maps) and torch.equal(ours(images), cls)
        found = ours.nuclei(images, points, owner)
        for i, o in enumerate(owner):
            wanted = F.grid_sample(
                maps[o][None],
                grid[i][None, None, None],
                padding_mode="border",
                align_corners=ours.settings.convention == "released",
            )
            torch.testing.assert_close(found[i], wanted.flatten(), rtol=1e-4, atol=1e-5)


def test_the_hash_follows_weights_statistics_and_facts() -> None:
    first = dense_encoder()
    assert first.content_hash == dense_encoder().content_hash
    assert first.content_hash != dense_encoder(seed=1).content_hash
    other = dense_encoder()
    other.network.decoder.decoder1.first_block.layer[1].running_mean += 0.01  # type: ignore[union-attr, operator, index]
    assert first.content_hash != other.content_hash
    # The same weights under another convention are another function.
    assert first.content_hash != dense_encoder(convention="centre").content_hash
    other = dense_encoder()
    other.mpp = 0.25
    assert first.content_hash != other.content_hash


def test_another_function_than_saved_is_noticed(tmp_path: Path) -> None:
    enc.save_encoder(dense_encoder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["lemon_muse"]["settings"]["convention"] = "centre"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not give the output that was saved with it"):
        enc.load(tmp_path)
    enc.save_encoder(dense_encoder(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    # The class token goes past the decoder, and the nuclei past the head of the last block alone.
    state["decoder.decoder1.first_block.layer.0.weight"] *= 1.1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="relative difference"):
        enc.load(tmp_path)


def test_folders_of_unknown_kind_and_older_ones(tmp_path: Path) -> None:
    folder = small_encoder(tmp_path / "crop")
    content = enc.load(folder).content_hash
    config = json.loads((folder / "config.json").read_text())
    assert config["lemon_muse"].pop("kind") == "crop"
    (folder / "config.json").write_text(json.dumps(config))
    assert enc.load(folder).content_hash == content
    config["lemon_muse"]["kind"] = "graph"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="kind 'graph' is not known"):
        enc.load(folder)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    ours = dense_encoder()
    ours.network.encoder.encoder.norm.weight[0] = float("inf")
    with pytest.raises(RunError, match="non-finite weights"):
        enc.save_encoder(ours, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_model_card_runs(tmp_path: Path) -> None:
    ours = dense_encoder()
    enc.save_encoder(ours, tmp_path)
    text = (tmp_path / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(tmp_path))
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["features"].shape == (3, ours.dim) and names["windows"].shape == (2, ours.cls_dim)


def test_fresh_weights_leave_the_old_ones_alone() -> None:
    ours = dense_encoder()
    before = ours.content_hash
    fresh = ours.fresh(seed=5)
    assert ours.content_hash == before != fresh.content_hash
    assert fresh.settings == ours.settings and fresh.facts() == ours.facts()
    assert fresh.content_hash == ours.fresh(seed=5).content_hash != ours.fresh(seed=6).content_hash


@pytest.mark.parametrize("kind", KINDS)
def test_timm_gets_the_encoder_alone(kind: str, tmp_path: Path) -> None:
    ours = dense_encoder(**KINDS[kind])
    enc.save_encoder(ours, tmp_path / "ours")
    export(Export(run=tmp_path / "ours", format="timm", out=tmp_path / "timm"))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-5)
    assert "without its decoder" in (tmp_path / "timm" / "README.md").read_text()
    again = enc.load(tmp_path / "timm")
    assert isinstance(again, enc.Encoder) and again.dim == ours.cls_dim and again.mpp == 0.5


def test_muse_files_hold_the_same_function(tmp_path: Path) -> None:
    ours = dense_encoder()
    enc.save_encoder(ours, tmp_path / "ours")
    export(Export(run=tmp_path / "ours", format="muse", out=tmp_path / "muse"))
    stored = torch.load(tmp_path / "muse" / "muse.pth", weights_only=True)
    assert stored.keys() == {"teacher"}
    assert {k.removeprefix(PREFIX) for k in stored["teacher"]} == ours.network.state_dict().keys()
    net = from_released(tmp_path / "muse" / "muse.pth")
    images, _, _ = some_input()
    with torch.inference_mode():
        for found, wanted in zip(net(images), ours.network(images), strict=True):
            torch.testing.assert_close(found, wanted)
    card = (tmp_path / "muse" / "README.md").read_text()
    assert "another normalisation than ImageNet's" in card
    opened = enc.load(tmp_path / "muse" / "muse.pth")
    assert isinstance(opened, DenseEncoder) and opened.name == "muse"
    assert (opened.mean, opened.std) == IMAGENET
    assert (opened.image_size, opened.mpp, opened.mpp_range) == (64, 0.5, (0.25, 0.5))


def test_muse_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="convention=centre"):
        FORMATS["muse"](dense_encoder(convention="centre"), tmp_path / "a", {})
    with pytest.raises(UserError, match="one feature a window"):
        FORMATS["muse"](enc.load(small_encoder(tmp_path / "crop")), tmp_path / "b", {})
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="neither a released LEMON file"):
        enc.load(tmp_path / "other.pth")
    with pytest.raises(UserError, match="there is no file"):
        enc.load(tmp_path / "none.pth")


def test_large_windows_of_a_network_for_small_ones() -> None:
    """A folder may be probed at 512 px though its position table is for 224 px."""
    ours = dense_encoder()
    images = torch.randn(1, 3, 128, 96)
    with torch.inference_mode():
        assert ours.dense(images).shape == (1, ours.dim, 32, 24)
        with pytest.raises(UserError, match="multiples of 8"):
            ours(torch.randn(1, 3, 60, 60))
    assert dense_network().settings.image == 64
