"""A ViT of two windows against its formula; its folder, its exports, evaluation and embedding."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import torch
from pyarrow import parquet
from torch.nn import functional as F

from eval.benchmarks.folder import Folder
from eval.features import features
from eval.floors import random_encoder
from eval.run import Eval
from eval.run import run as evaluate
from launch.embed import Embed
from launch.embed import run as embed
from lemon_muse.backbones import Backbone, arguments_of, build, network_of
from lemon_muse.backbones.two_windows import TwoWindows
from lemon_muse.backbones.vit import sincos_positions
from lemon_muse.data.augment import ViewConfig
from lemon_muse.encoder import Encoder, encoder_of, load, save_encoder
from lemon_muse.errors import UserError
from lemon_muse.export.job import Export
from lemon_muse.export.job import run as export
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.moco_v3 import MoCoV3, MoCoV3Config
from lemon_muse.synthetic import write_images, write_slide

SMALL = Backbone(name="vit_tiny", patch=8, heads=3, inner=40, args={"depth": 2, "embed_dim": 48})
NORM: dict[str, Any] = {"mean": (0.6, 0.4, 0.55), "std": (0.2, 0.2, 0.15)}


def windows(n: int, side: int = 80) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def made(**changes: Any) -> Encoder:
    settings = SMALL.model_copy(update=changes)
    architecture, arguments = arguments_of(settings, 80)
    network = build(settings, 80, seed=0)
    with torch.no_grad():  # the class token of MoCo v3 begins near zero: give it some weight
        network.vit.cls_token.normal_(generator=torch.Generator().manual_seed(1))
    return encoder_of(
        network, architecture=architecture, arguments=arguments, image_size=80, mpp=0.25,
        name="both", **NORM,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(made(), tmp_path_factory.mktemp("two") / "encoder")


def plain_vit(net: TwoWindows, images: torch.Tensor, heads: int) -> torch.Tensor:
    """The forward pass in plain products: both windows, one sequence, the class token."""
    state = {k.removeprefix("vit."): v.detach() for k, v in net.state_dict().items()}
    positions, width = state["pos_embed"][0], 48
    sequence = [(state["cls_token"][0] + positions[:1]).expand(len(images), 1, width)]
    small = images.unflatten(3, (40, 2)).unflatten(2, (40, 2)).mean((3, 5))
    for which, view in enumerate((images[:, :, 20:60, 20:60], small)):
        weight = state["patch_embed.proj.weight"].flatten(1)
        for cell in range(25):
            y, x = 8 * (cell // 5), 8 * (cell % 5)
            patch = view[:, :, y : y + 8, x : x + 8].flatten(1)
            token = patch @ weight.T + state["patch_embed.proj.bias"]
            token = token + positions[1 + cell] + state["scale"][which, 0]
            sequence.append(token[:, None])
    x = torch.cat(sequence, 1)
    for block in ("blocks.0.", "blocks.1."):
        w = {k.removeprefix(block): v for k, v in state.items() if k.startswith(block)}
        h = F.layer_norm(x, (width,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        q, k, v = (h @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).chunk(3, -1)
        mixed, each = [], width // heads
        for head in range(heads):
            at = slice(head * each, (head + 1) * each)
            share = (q[..., at] @ k[..., at].transpose(1, 2) / math.sqrt(each)).softmax(-1)
            mixed.append(share @ v[..., at])
        x = x + torch.cat(mixed, -1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        h = F.layer_norm(x, (width,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        h = F.gelu(h @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
        x = x + h @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return F.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]


def test_the_feature_is_that_of_one_sequence_of_both_windows() -> None:
    encoder = made()
    with torch.inference_mode():
        found = encoder(windows(3))
    wanted = plain_vit(encoder.network, windows(3), heads=3)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_middle_is_seen_sharp_and_the_rest_averaged() -> None:
    """What cancels in blocks of 2 x 2 px is seen in the middle and nowhere else."""
    encoder, images = made(), windows(1)
    with torch.inference_mode():
        plain = encoder(images)
        for (y, x), sharp in (((38, 40), True), ((20, 58), True), ((18, 40), False)):
            other = images.clone()
            other[..., y, x] += 3
            other[..., y, x + 1] -= 3
            assert (float((encoder(other) - plain).abs().max()) > 1e-4) == sharp
        far = images.clone()
        far[..., :10, :10] += 1
        assert float((encoder(far) - plain).abs().max()) > 1e-3


def test_everything_that_trains_gets_a_gradient_and_starts_as_a_moco_vit() -> None:
    told = Setting(
        steps=2, batch=6, stored=32, window=16, mpp=0.25, mean=(0.5,) * 3, std=(0.2,) * 3, seed=0,
        view=ViewConfig(policy="size"), backbone=SMALL.model_copy(update={"inner": 8, "patch": 4}),
    )  # type: ignore[arg-type]  # fmt: skip
    method = MoCoV3(MoCoV3Config(hidden=16, out_dim=8), told)
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    batch = {"pixels": pixels, "views": method.draw(6, torch.Generator().manual_seed(0))}
    method(batch, 0)["loss"].backward()
    assert not [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    vit = method.base["backbone"].vit
    assert torch.equal(vit.pos_embed[0, 1:], sincos_positions(48, 2, 2))
    assert not any(p.requires_grad for p in vit.patch_embed.parameters())
    with pytest.raises(UserError, match=r"view.policy=a1\+gray move it; use view.policy=size"):
        MoCoV3(MoCoV3Config(), Setting(**{**told.__dict__, "view": ViewConfig()}))


def test_the_folder_opens_and_says_what_it_is(folder: Path) -> None:
    again, first = load(folder), made()
    with torch.inference_mode():
        assert torch.equal(again(windows(2)), first(windows(2)))
    facts = json.loads((folder / "config.json").read_text())["lemon_muse"]
    assert facts["kind"] == "two_windows" and facts["image_size"] == 80
    assert (again.patch_size, again.num_heads, again.dim) == (8, 3, 48)  # type: ignore[union-attr]
    assert again.content_hash == first.content_hash
    card = (folder / "README.md").read_text()
    assert "library_name: lemon_muse" in card and "middle 40 px" in card
    assert "timm.create_model" not in card and "lemon_muse.encoder import load" in card


def test_the_random_floor_has_other_weights_and_the_same_positions(folder: Path) -> None:
    trained = load(folder)
    fresh = random_encoder(trained, seed=3)
    a, b = trained.network.state_dict(), fresh.network.state_dict()
    same = {k for k in a if torch.equal(a[k], b[k]) and a[k].std() > 0 and "norm" not in k}
    assert same == {"vit.pos_embed"}
    again = random_encoder(trained, seed=3)
    with torch.inference_mode():
        assert torch.equal(fresh(windows(1)), again(windows(1)))


def test_average_pooling_is_over_the_tokens_of_both_windows() -> None:
    network: Any = build(SMALL.model_copy(update={"pool": "avg"}), 80, seed=0).eval()
    with torch.inference_mode():
        tokens = network.forward_features(windows(2))
        wanted = network.vit.fc_norm(tokens[:, 1:].mean(1))
        torch.testing.assert_close(network(windows(2)), wanted)
    assert tokens.shape == (2, 51, 48)


def test_dropped_patches_are_dropped_in_training() -> None:
    args = {"depth": 1, "embed_dim": 48, "patch_drop_rate": 0.5}
    network: Any = build(SMALL.model_copy(update={"args": args}), 80, seed=0)
    assert network.train().forward_features(windows(2)).shape == (2, 1 + 25, 48)
    assert network.eval().forward_features(windows(2)).shape == (2, 51, 48)


@pytest.mark.parametrize(
    ("changes", "window", "said"),
    [
        ({}, 60, "window=60 px is not a multiple of backbone.inner=40 px; use window=80"),
        ({}, 40, "window=40 px is not a multiple"),
        ({"inner": 25, "patch": 5}, 50, "use window=75"),
        ({"inner": 20}, 80, "patch=8 does not divide window=20"),
        ({"name": "resnet10t", "args": {}}, 80, "needs a plain ViT, and ResNet is none"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict, window: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(SMALL.model_copy(update=changes), window, seed=0)


@pytest.mark.parametrize("form", ["timm", "hf", "lemon", "muse", "cellvit"])
def test_formats_of_plain_networks_refuse(folder: Path, tmp_path: Path, form: Any) -> None:
    with pytest.raises(UserError, match=f"format={form} cannot hold both: .* use format=pt2"):
        export(Export(run=folder, format=form, out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_the_program_holds_both_windows(tmp_path: Path) -> None:
    encoder = made(args={"depth": 1, "embed_dim": 24})
    save_encoder(encoder, tmp_path / "source")
    out = export(Export(run=tmp_path / "source", format="pt2", out=tmp_path / "out"))
    program = torch.export.load(out / "encoder.pt2").module()
    with torch.inference_mode():
        torch.testing.assert_close(program(windows(2)), encoder(windows(2)), rtol=1e-4, atol=1e-4)


def test_eval_cuts_its_windows_and_reads_it(folder: Path, tmp_path: Path) -> None:
    tissue = tmp_path / "tissue"
    write_images(tissue, slides=6, side=256, seed=3)
    encoder, table = load(folder), Folder().load(tissue)
    found = features(encoder, table)
    crops = torch.from_numpy(table.crops(80, 0.25, np.arange(5))).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(NORM[k])[:, None, None] for k in ("mean", "std"))
    with torch.inference_mode():
        wanted = encoder((crops - mean) / std).numpy()
    np.testing.assert_allclose(found[:5], wanted, atol=1e-4)
    words = {"encoder": str(folder), "benchmark": "folder", "root": tissue, "device": "cpu"}
    evaluate(Eval(**words, out=tmp_path / "out", probe="knn"))  # type: ignore[arg-type]
    rows = [json.loads(r) for r in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["encoder"] for row in rows} >= {"both", "random:both"}


def test_embed_reads_a_slide_with_it(folder: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "a.svs", side=400, seed=1)
    out = embed(
        Embed(encoder=str(folder), slide=tmp_path / "a.svs", nuclei=tmp_path / "a.geojson",
              out=tmp_path / "a.parquet", merge=0, workers=0)
    )  # fmt: skip
    table = parquet.read_table(out)
    about = json.loads(table.schema.metadata[b"lemon_muse"])["encoder"]
    assert about["window"] == 80
    found = table["feature"].combine_chunks().flatten().to_numpy().reshape(len(table), 48)
    mean, std = (torch.tensor(NORM[k])[:, None, None] for k in ("mean", "std"))
    encoder, compared = load(folder), 0
    with openslide.OpenSlide(tmp_path / "a.svs") as slide:
        for row in range(min(20, len(table))):
            left, top = (int(np.floor(table[k][row].as_py() - 40 + 0.5)) for k in ("x_px", "y_px"))
            if min(left, top) < 0 or max(left, top) + 80 > 400:
                continue
            region = np.asarray(slide.read_region((left, top), 0, (80, 80)).convert("RGB"))
            given = torch.tensor(region).permute(2, 0, 1).float() / 255
            with torch.inference_mode():
                wanted = encoder(((given - mean) / std)[None])[0].numpy()
            np.testing.assert_allclose(found[row], wanted, atol=2e-4)
            compared += 1
    assert compared > 3


def test_the_same_network_comes_from_its_arguments() -> None:
    network = build(SMALL, 80, seed=0)
    other = network_of(*arguments_of(SMALL, 80))
    other.load_state_dict(network.state_dict())
    with torch.inference_mode():
        assert torch.equal(other.eval()(windows(1)), network.eval()(windows(1)))
