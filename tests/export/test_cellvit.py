"""The export to CellViT against its loading rules and timm; every silently wrong file of before."""

import argparse
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lemon_muse.backbones.muse import MuseBackbone, build_muse
from lemon_muse.backbones.muse_weights import to_released
from lemon_muse.dense import DenseEncoder
from lemon_muse.encoder import Encoder
from lemon_muse.errors import RunError, UserError
from lemon_muse.export import cellvit
from tests.export.consumers import CellViTEncoder, GenericCellViT, cellvit256, loaded

IMAGES = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(7))
MEAN, STD = (0.7, 0.58, 0.71), (0.21, 0.23, 0.18)


def loud(network: nn.Module, seed: int = 0) -> Any:
    """Weights that are large enough for every part to matter."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            value.copy_(centre + 0.05 * torch.randn(value.shape, generator=draw))
    return network.eval()


def crop(
    name: str = "vit_small_patch16_224", *, window: int = 224, empty: bool = False, **arguments: Any
) -> Encoder:
    """An encoder; an empty one has shapes but no weights, enough to be refused."""
    arguments = {"num_classes": 0, **arguments}
    if name.startswith("vit"):
        arguments["img_size"] = window
    with torch.device("meta"):
        network: Any = timm.create_model(name, **arguments)
    if not empty:
        network = loud(network.to_empty(device="cpu"))
    return Encoder(
        network,
        architecture=name,
        arguments=arguments,
        image_size=window,
        mpp=0.5,
        mean=MEAN,
        std=STD,
        name="mine",
    ).eval()


def dense(**settings: Any) -> DenseEncoder:
    network = build_muse(MuseBackbone(decoder="none", **settings), seed=0)
    loud(network.encoder)
    side = settings.get("image", 224)
    return DenseEncoder(
        network, image_size=side, mpp=0.5, mpp_range=(0.25, 0.5), mean=MEAN, std=STD, name="muse"
    ).eval()


@pytest.fixture(scope="module")
def small() -> Encoder:
    return crop()


@pytest.fixture(scope="module")
def twelve() -> Encoder:
    return crop(num_heads=12)


@pytest.fixture(scope="module")
def written(small: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `small`."""
    folder = tmp_path_factory.mktemp("cellvit")
    cellvit.write(small, folder, {"Data": {"slides": 3}})
    return folder


@pytest.fixture(scope="module")
def written_twelve(twelve: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `twelve`."""
    folder = tmp_path_factory.mktemp("generic")
    assert cellvit.write(twelve, folder, {}) < 1e-4
    return folder


@torch.inference_mode()
def apart(consumer: CellViTEncoder, network: Any, images: torch.Tensor = IMAGES) -> float:
    """Largest difference between CellViT's tokens and skips and those of timm."""
    tokens, skips = consumer(images)
    final, wanted = network.forward_intermediates(
        images, indices=[2, 5, 8, 11], norm=False, output_fmt="NLC", return_prefix_tokens=True
    )
    pairs = [(tokens, final)]
    for got, (patches, prefix) in zip(skips, wanted, strict=True):
        pairs.append((got, torch.cat([prefix, patches], 1)))
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_cellvit256_loads_it_unchanged(small: Encoder, tmp_path: Path) -> None:
    before = copy.deepcopy(small.network.state_dict())
    said = cellvit.write(small, tmp_path / "out", {"Data": "slides"})
    file = tmp_path / "out" / "cellvit256.pth"
    consumer, message = cellvit256(file)
    assert sorted(message.missing_keys) == ["head.bias", "head.weight"]
    assert message.unexpected_keys == [] and loaded(message, consumer) == 150
    assert apart(consumer, small.network) < 1e-4 and said < 1e-4
    state = torch.load(file, weights_only=True)
    assert list(state) == ["teacher"]
    for value in state["teacher"].values():
        assert (
            value.dtype == torch.float32 and value.is_contiguous() and type(value) is torch.Tensor
        )
    pair = load_file(tmp_path / "out" / "check.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(consumer(pair["input"])[0], pair["tokens"], atol=1e-4, rtol=0)
    assert all(torch.equal(before[k], v) for k, v in small.network.state_dict().items())


def test_the_card_says_what_the_configuration_needs(
    small: Encoder, written: Path, written_twelve: Path
) -> None:
    card = (written / "README.md").read_text()
    said = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert said["transformations"]["normalize"] == {"mean": list(MEAN), "std": list(STD)}
    assert said["model"] == {"backbone": "ViT256", "pretrained_encoder": "cellvit256.pth"}
    assert '"slides": 3' in card and small.content_hash in card and "**6 heads**" in card
    card = (written_twelve / "README.md").read_text()
    model = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["model"]
    assert model["backbone"] == "default" and model["num_heads"] == 12 and model["depth"] == 12
    assert model["extract_layers"] == [3, 6, 9, 12] and model["embed_dim"] == 384


def test_at_256_px_it_is_nearly_timms(small: Encoder, written: Path) -> None:
    consumer, _ = cellvit256(written / "cellvit256.pth")
    wide: Any = copy.deepcopy(small.network)
    wide.set_input_size(img_size=(256, 256))
    images = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        near = F.cosine_similarity(consumer(images)[0], wide.forward_features(images), dim=-1)
    assert near.shape == (1, 257) and float(near.min()) > 0.999


@pytest.mark.parametrize("width", [384, 768])
def test_the_generic_class_takes_a_full_state(
    width: int, twelve: Encoder, written_twelve: Path, tmp_path: Path
) -> None:
    encoder, folder = twelve, written_twelve
    if width == 768:
        encoder, folder = crop("vit_base_patch16_224"), tmp_path / "out"
        assert cellvit.write(encoder, folder, {}) < 1e-4
    assert not (folder / "cellvit256.pth").exists()
    model = GenericCellViT(width, 12, 12, [3, 6, 9, 12])
    whole = cellvit.full_state(model, folder)
    assert torch.equal(whole["decoder0.weight"], model.decoder0.weight)
    torch.save(whole, tmp_path / "cellvit_full.pth")
    model.load_state_dict(torch.load(tmp_path / "cellvit_full.pth"), strict=True)
    assert apart(model.encoder, encoder.network) < 1e-4
    # The file alone is no whole model, and says so.
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(torch.load(folder / "cellvit_encoder.pth"), strict=True)
    # The shapes would fit most of these; only the settings tell.
    for settings, what in (
        ((width, 12, 6, [3, 6, 9, 12]), "num_heads=6.*num_heads=12"),
        ((width, 12, 12, [2, 5, 8, 11]), "extract_layers"),
        ((width // 2, 12, 12, [3, 6, 9, 12]), f"embed_dim={width // 2}"),
    ):
        with torch.device("meta"):
            wrong = GenericCellViT(*settings)
        with pytest.raises(UserError, match=what):
            cellvit.full_state(wrong, folder)


def test_a_full_state_of_6_heads_and_of_no_export(
    small: Encoder, written: Path, tmp_path: Path
) -> None:
    model = GenericCellViT(384, 12, 6, [3, 6, 9, 12])
    model.load_state_dict(cellvit.full_state(model, written), strict=True)
    assert apart(model.encoder, small.network) < 1e-4
    with pytest.raises(UserError, match="not what format=cellvit writes"):
        cellvit.full_state(model, tmp_path)
    with pytest.raises(UserError, match=r"encoder\.cls_token.*no such tensor"):
        cellvit.full_state(nn.Linear(1, 1), written)


@pytest.mark.parametrize("side", [224, 512])
def test_a_muse_network_gives_its_encoder(side: int, tmp_path: Path) -> None:
    encoder = dense(image=side)
    assert cellvit.write(encoder, tmp_path, {}) < 1e-4
    consumer, message = cellvit256(tmp_path / "cellvit256.pth")
    assert loaded(message, consumer) == 150
    with torch.inference_mode():
        cls, maps = encoder.network(IMAGES)
        tokens, _ = consumer(IMAGES)
    torch.testing.assert_close(tokens[:, 0], cls, atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens[:, 1:].mT.unflatten(2, (14, 14)), maps, atol=1e-4, rtol=0)
    assert encoder.settings.image == side and encoder.image_encoder.pos_embed.shape[1] > 196


def test_positions_of_other_windows_are_resampled_as_timm_does(tmp_path: Path) -> None:
    encoder = crop(window=96)
    assert cellvit.write(encoder, tmp_path, {}) < 1e-4
    table = torch.load(tmp_path / "cellvit256.pth")["teacher"]["pos_embed"]
    old = encoder.network.pos_embed.detach()
    grid = old[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(14, 14), mode="bicubic", antialias=True)
    torch.testing.assert_close(table[:, :1], old[:, :1])
    torch.testing.assert_close(table[:, 1:], grid.flatten(2).mT)
    assert old.shape[1] == 37, "the source is left as it was"
    assert "windows of 96 px" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "cellvit.json").read_text())["positions_resampled"] is True


def saved(path: Path, stored: Any) -> Path:
    torch.save(stored, path)
    return path


def test_files_that_fail_aloud_are_not_ours(small: Encoder, tmp_path: Path) -> None:
    state = small.network.state_dict()
    for stored in (state, {"model": state}, {"state_dict": state}):
        with pytest.raises(KeyError, match="teacher"):
            cellvit256(saved(tmp_path / "x.pth", stored))
    with pytest.raises(pickle.UnpicklingError):
        cellvit256(saved(tmp_path / "x.pth", {"teacher": state, "args": argparse.Namespace(a=1)}))
    for arguments in (
        {"reg_tokens": 4},
        {"num_classes": 1000},
        {"window": 512},
        {"name": "vit_base_patch16_224"},
        {"window": 40, "patch_size": 8},
    ):
        shapes = crop(**arguments, empty=True).network.state_dict()
        other = {key: torch.zeros(value.shape) for key, value in shapes.items()}
        with pytest.raises(RuntimeError, match="size mismatch"):
            cellvit256(saved(tmp_path / "x.pth", {"teacher": other}))
    # The larger window is written nevertheless, with positions that fit; the wide one elsewhere.
    cellvit.write(crop(window=512), tmp_path / "wide", {})
    assert loaded(cellvit256(tmp_path / "wide" / "cellvit256.pth")[1], CellViTEncoder()) == 150


def test_files_that_load_silently_wrong_are_not_ours(
    small: Encoder, twelve: Encoder, written_twelve: Path, tmp_path: Path
) -> None:
    state = small.network.state_dict()
    moco = {f"module.base_encoder.{key}": value for key, value in state.items()}
    muse = to_released(build_muse(MuseBackbone(args={"depth": 4}), seed=0))["teacher"]
    for strange in (moco, muse):
        consumer, message = cellvit256(saved(tmp_path / "x.pth", {"teacher": strange}))
        assert loaded(message, consumer) == 0
    consumer, message = cellvit256(
        saved(tmp_path / "x.pth", {"teacher": twelve.network.state_dict()})
    )
    assert loaded(message, consumer) == 150 and apart(consumer, twelve.network) > 0.1
    with pytest.raises(KeyError, match="teacher"):
        cellvit256(written_twelve / "cellvit_encoder.pth")
    scaled = crop(init_values=0.1)
    consumer, message = cellvit256(
        saved(tmp_path / "x.pth", {"teacher": scaled.network.state_dict()})
    )
    assert loaded(message, consumer) == 150 and apart(consumer, scaled.network) > 0.1
    with pytest.raises(UserError, match="LayerScale"):
        cellvit.write(scaled, tmp_path / "scaled", {})


def test_bfloat16_becomes_float32(small: Encoder, tmp_path: Path) -> None:
    half = copy.deepcopy(small).bfloat16()
    consumer, _ = cellvit256(saved(tmp_path / "x.pth", {"teacher": half.network.state_dict()}))
    assert apart(consumer, small.network) > 1e-3, "rounded weights load without a word"
    cellvit.write(half, tmp_path / "out", {})
    consumer, _ = cellvit256(tmp_path / "out" / "cellvit256.pth")
    assert all(p.dtype == torch.float32 for p in consumer.parameters())
    assert apart(consumer, copy.deepcopy(half.network).float()) < 1e-4


def changed(**parts: Any) -> Encoder:
    """A ViT-S/16 whose blocks have other parts than its shapes tell."""
    encoder = crop(empty=True)
    network: Any = encoder.network
    for block in network.blocks:
        if "act" in parts:
            block.mlp.act = parts["act"]
        if "eps" in parts:
            block.norm1.eps = parts["eps"]
    return encoder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: crop(window=40, patch_size=8, num_heads=12, empty=True),
            "patches are 8 px.*as tokens",
        ),
        (lambda: crop(reg_tokens=4, empty=True), "register tokens"),
        (lambda: crop(num_classes=1000, empty=True), "has a classifier"),
        (lambda: crop(depth=6, empty=True), "6 blocks instead of 12"),
        (lambda: crop(num_heads=8, empty=True), "width/heads are 384/8.*384/6, 384/12, 768/12"),
        (lambda: crop("vit_tiny_patch16_224", empty=True), "width/heads are 192/3"),
        (lambda: crop(class_token=False, global_pool="avg", empty=True), "no class token"),
        (lambda: crop(no_embed_class=True, empty=True), "none with a position"),
        (lambda: crop(global_pool="avg", empty=True), "averages patches"),
        (lambda: crop(pre_norm=True, empty=True), "before the first block"),
        (lambda: crop(qkv_bias=False, empty=True), "blocks are not DINO's"),
        (lambda: crop(qk_norm=True, empty=True), "blocks are not DINO's"),
        (lambda: crop(mlp_ratio=2, empty=True), "blocks are not DINO's"),
        (lambda: crop(mlp_layer=timm.layers.SwiGLU, empty=True), "blocks are not DINO's"),
        (lambda: changed(act=nn.GELU(approximate="tanh")), "blocks are not DINO's"),
        (lambda: changed(act=nn.ReLU()), "blocks are not DINO's"),
        (lambda: changed(eps=1e-5), "eps 1e-06"),
        (lambda: crop("resnet18", empty=True), "it is a ResNet"),
        (lambda: dense(name="resnet50"), "it is a ResNet"),
        (lambda: dense(patch=8, args={"depth": 4}), "patches are 8 px"),
    ],
)
def test_refused_with_the_reason(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        cellvit.write(make(), tmp_path / "out", {})
    assert "format=timm" in str(caught.value) or "docs/use/cellvit.md" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_another_kind_or_of_bad_weights(
    small: Encoder, twelve: Encoder, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds cellvit256\.pth of another encoder"):
        cellvit.write(twelve, written, {})
    bad = copy.deepcopy(small)
    with torch.no_grad():
        bad.network.norm.bias[0] = float("nan")
    with pytest.raises(RunError, match=r"non-finite weights in norm\.bias"):
        cellvit.write(bad, tmp_path / "bad", {})
    assert not (tmp_path / "bad").exists()
