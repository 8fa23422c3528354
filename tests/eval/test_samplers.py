"""Map, tokens and class token in `lemon-muse eval`: values by hand, rows, files, wrong words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from eval import readers, samplers, sources
from eval.benchmarks import find
from eval.dense import windows_of
from eval.run import Eval, run
from eval.samplers import Look, Words, choose
from lemon_muse.backbones.muse_weights import to_released
from lemon_muse.data.table import Table
from lemon_muse.dense import IMAGENET, DenseEncoder
from lemon_muse.encoder import load, save_encoder
from lemon_muse.errors import UserError
from lemon_muse.synthetic import write_images
from tests.eval.standins import dense_encoder, dense_network, small_encoder

SETTINGS: dict[str, Any] = {"workers": 0, "device": "cpu", "batch": 64}


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    write_images(folder, slides=12, side=256, seed=3)
    return folder


@pytest.fixture(scope="module")
def table(tissue: Path) -> Table:
    whole = find("folder").load(tissue)
    return whole.take(np.arange(0, len(whole), 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(dense_encoder(), tmp_path_factory.mktemp("dense"))


def settings(encoder: Path | str, root: Path, out: Path, **more: Any) -> Eval:
    given = {"encoder": str(encoder), "benchmark": "folder", "root": root, "out": out}
    return Eval(**{**given, "device": "cpu", "probe": "knn", **more})


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {r["encoder"]: r for r in rows if r["metric"] == "balanced_accuracy"}


def normalised(pixels: np.ndarray, encoder: Any) -> torch.Tensor:
    planes = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.mean, encoder.std))
    return (planes - mean) / std


def test_rows_floors_and_names_of_a_dense_encoder(
    tissue: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(settings(folder, tissue, tmp_path))
    own = by_name(rows)
    assert set(own) == {
        "dense",
        "random:dense",
        "floor:majority",
        *(f"floor:{f}@40px{m}" for f in ("colour", "histogram", "pixel_pca") for m in (0.5, 0.25)),
    }
    assert own["dense"]["encoder_hash"] == load(folder).content_hash
    said = {"sampler": "map", "window": 64, "valid": 64, "mpp": 0.5, "align": "released"}
    for name in ("dense", "random:dense"):
        assert {key: own[name]["params"].get(key) for key in said} == said
    assert own["dense"]["encoder_hash"] != own["random:dense"]["encoder_hash"]
    # The features that were probed are those of the map.
    table = find("folder").load(tissue)
    with np.load(tmp_path / "gallery.npz") as file:
        assert file["crops"].shape[1:] == (40, 40, 3) and float(file["mpp"]) == 0.5
        assert file["features"].shape == (len(file["labels"]), load(folder).dim)
    wider = by_name(run(settings(folder, tissue, tmp_path, window=96, valid=64, floors=False)))
    finer = by_name(run(settings(folder, tissue, tmp_path, mpp=0.25, floors=False)))
    assert set(wider) == {"dense@96/64px0.5"} and set(finer) == {"dense@64/64px0.25"}
    same = by_name(run(settings(folder, tissue, tmp_path, window=64, valid=64, mpp=0.5)))
    assert same == own
    hashes = {r["encoder_hash"] for r in (*wider.values(), *finer.values(), own["dense"])}
    assert len(hashes) == 3
    assert wider["dense@96/64px0.5"]["params"]["content_hash"] == load(folder).content_hash
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["encoder"] for r in lines} == set(own) | set(wider) | set(finer)
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2 + 6 + 2
    assert len(table) > 100 and "dense@64/64px0.25" in capsys.readouterr().out


def test_the_report_shows_dense_rows(tissue: Path, folder: Path, tmp_path: Path) -> None:
    from eval import report

    for window in (64, 96):
        run(settings(folder, tissue, tmp_path / "eval", window=window, floors=False))
    small: dict[str, Any] = {"nuclei": 60, "resamples": 100, "projection": "pca", "queries": 1}
    given = {"results": (str(tmp_path / "eval"),), "out": tmp_path / "report", **small}
    report.run(report.Report(**given))
    page = "".join(p.read_text() for p in (tmp_path / "report").glob("*.html"))
    assert "dense@96/96px0.5" in page and "40 × 40 px at 0.5" in page


def test_two_names_of_one_hash_keep_their_names(tissue: Path, tmp_path: Path) -> None:
    """An encoder that was never trained has the weights of the random one with its seed."""
    fresh = dense_encoder().fresh(seed=0)
    save_encoder(fresh, tmp_path / "encoder")
    found = run(settings(tmp_path / "encoder", tissue, tmp_path / "out"))
    rows = by_name(found)
    assert rows["dense"]["value"] == rows["random:dense"]["value"]
    assert rows["dense"]["encoder_hash"] == rows["random:dense"]["encoder_hash"]


def test_random_is_the_same_architecture_read_the_same_way(
    tissue: Path, folder: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"window": 96, "valid": 64}
    beside = by_name(run(settings(folder, tissue, tmp_path, **given)))
    alone = by_name(run(settings(f"random:{folder}", tissue, tmp_path, floors=False, **given)))
    name = "random:dense@96/64px0.5"
    assert alone[name] == beside[name]
    assert alone[name]["encoder_hash"] != beside["dense@96/64px0.5"]["encoder_hash"]
    assert alone[name]["params"]["window"] == 96


def test_a_released_file_is_read_with_imagenet_statistics(
    tissue: Path, table: Table, tmp_path: Path
) -> None:
    network = dense_network(seed=2)
    torch.save({**to_released(network), "epoch": 7}, tmp_path / "vit_t_8-64.pth")
    rows = by_name(run(settings(tmp_path / "vit_t_8-64.pth", tissue, tmp_path / "out")))
    assert {"vit_t_8-64", "random:vit_t_8-64"} <= set(rows)
    ours = DenseEncoder(
        network,
        image_size=64,
        mpp=0.5,
        mpp_range=(0.25, 0.5),
        mean=IMAGENET[0],
        std=IMAGENET[1],
    )
    wanted = sources.from_encoder(ours, name="x", **SETTINGS).features(table)  # type: ignore[misc]
    source = sources.resolve(str(tmp_path / "vit_t_8-64.pth"), seed=0, **SETTINGS)
    np.testing.assert_allclose(source.features(table), wanted, atol=1e-5)  # type: ignore[misc]


@pytest.mark.parametrize("window", [40, 64])
@pytest.mark.parametrize("align", ["centre", "released"])
def test_tokens_are_timms_read_between_their_centres(
    table: Table, tmp_path: Path, window: int, align: Any
) -> None:
    encoder = load(small_encoder(tmp_path))
    look = choose(encoder, Words("tokens", window=window, mpp=0.5, align=align))
    found = samplers.features_of(encoder, look, table, name="x", **SETTINGS)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, **{**encoder.arguments, "img_size": window}
    )
    state = encoder.network.state_dict()
    table_of = timm.layers.resample_abs_pos_embed
    size = [window // 8, window // 8]
    state["pos_embed"] = table_of(state["pos_embed"], new_size=size, num_prefix_tokens=1)
    vit.load_state_dict(state)
    cells, checked = window // 8, 0
    for part in windows_of(table, window=window, valid=window, mpp=0.5):
        with torch.inference_mode():
            tokens = vit.eval().forward_features(normalised(part.pixels, encoder))[:, 1:]
        maps = tokens.reshape(len(part), cells, cells, -1).numpy()
        for row, owner, (x, y) in zip(part.rows, part.owner, part.points, strict=True):
            if align == "centre":
                at = np.array([x, y]) / 8 - 0.5
            else:
                at = np.array([x, y]) / window * (cells - 1)
            at = np.clip(at, 0, cells - 1)
            i, j = np.minimum(at.astype(int), cells - 2)
            u, v = at - (i, j)
            near = maps[owner, j : j + 2, i : i + 2]
            wanted = np.einsum("a,b,abc->c", [1 - v, v], [1 - u, u], near)
            np.testing.assert_allclose(found[row], wanted, atol=1e-4)
            checked += 1
    assert checked == len(table) > 20
    assert encoder.network.patch_embed.grid_size == (5, 5)  # type: ignore[union-attr]


def test_pooling_vits_give_normed_tokens(table: Table) -> None:
    """timm norms after pooling there: unnormed tokens would be another feature."""
    arguments = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, global_pool="avg", **arguments
    ).eval()
    torch.nn.init.uniform_(vit.fc_norm.weight)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        pooled = readers.normed_tokens(vit, images)
        raw = vit.forward_features(images)
        mean, var = raw.mean(-1, keepdim=True), raw.var(-1, keepdim=True, unbiased=False)
        wanted = (raw - mean) / (var + 1e-6).sqrt() * vit.fc_norm.weight + vit.fc_norm.bias
    torch.testing.assert_close(pooled, wanted)


def test_the_class_token_of_a_window_around_each_nucleus(table: Table, tmp_path: Path) -> None:
    encoder = load(small_encoder(tmp_path / "crop"))
    look = choose(encoder, Words("cls"))
    found = samplers.features_of(encoder, look, table, name="x", **SETTINGS)
    images = normalised(table.crops(40, 0.25), encoder)
    with torch.inference_mode():
        wanted = encoder.network.forward_features(images)[:, 0]  # type: ignore[operator]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    dense = dense_encoder()
    look = choose(dense, Words("cls", window=96))
    found = samplers.features_of(dense, look, table, name="x", **SETTINGS)
    with torch.inference_mode():
        wanted = dense.network(normalised(table.crops(96, 0.5), dense))[0]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_crops_at_another_mpp(table: Table, tmp_path: Path) -> None:
    encoder = load(small_encoder(tmp_path))
    look = choose(encoder, Words(mpp=0.5))
    assert look == Look("crop", 40, None, 0.5, "", False) and look.tag == "@40px0.5"
    found = samplers.features_of(encoder, look, table, name="x", **SETTINGS)
    with torch.inference_mode():
        wanted = encoder(normalised(table.crops(40, 0.5), encoder))
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    assert encoder.mpp == 0.25


def test_tokens_of_muse_are_its_encoders_last_map(table: Table) -> None:
    whole = dense_encoder()
    bare = dense_encoder(decoder="none")
    state = {k: v for k, v in whole.network.state_dict().items() if k.startswith("encoder.")}
    bare.network.load_state_dict(state)
    given: dict[str, Any] = {"name": "x", **SETTINGS}
    tokens = samplers.features_of(whole, choose(whole, Words("tokens")), table, **given)
    wanted = samplers.features_of(bare, choose(bare), table, **given)
    np.testing.assert_allclose(tokens, wanted, atol=1e-5)


def test_timm_models_by_name_and_by_folder(tissue: Path, tmp_path: Path) -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments).eval()
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    text = ",".join(f"{k}={v}" for k, v in arguments.items())
    word = f"timm:vit_tiny_patch16_224,checkpoint_path={tmp_path / 'vit.pth'},{text}"
    given: dict[str, Any] = {"sampler": "tokens", "mpp": 0.5}
    rows = by_name(run(settings(word, tissue, tmp_path / "out", **given)))
    name = "vit_tiny_patch16_224:tokens@32/32px0.5"
    assert {name, f"random:{name}", "floor:colour@40px0.5"} <= set(rows)
    opened = sources.resolve(word, seed=0, words=Words(mpp=0.5), **SETTINGS)
    assert torch.equal(opened.network.network.pos_embed, vit.pos_embed)
    assert opened.network.mean == tuple(vit.pretrained_cfg["mean"]) and opened.size == 32

    from timm.models import save_for_hf

    vit.reset_classifier(0)
    save_for_hf(vit, tmp_path / "folder", model_args=arguments)
    local = sources.resolve(str(tmp_path / "folder"), seed=0, words=Words(mpp=0.5), **SETTINGS)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(local.network(images), vit(images))
    fresh = sources.resolve(
        f"random:{tmp_path / 'folder'}", seed=0, words=Words(mpp=0.5), **SETTINGS
    )
    assert fresh.name == "random:folder" and fresh.hash != local.hash
    with pytest.raises(UserError, match=r"add mpp=0\.5"):
        sources.resolve(str(tmp_path / "folder"), seed=0, **SETTINGS)
    torch.save({"blocks.0.norm1.weight": torch.ones(48)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="cannot be opened by timm"):
        sources.resolve(word.replace("vit.pth", "part.pth"), seed=0, **SETTINGS)


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("dense", {"sampler": "crop"}, "use sampler=map"),
        ("crop", {"sampler": "map"}, "has no dense map"),
        ("crop", {"window": 64}, "takes the window of small, 40 px"),
        ("crop", {"sampler": "tokens", "window": 61}, "window=64"),
        ("dense", {"window": 100}, "use window=96"),
        ("dense", {"valid": 65}, "valid=65 is larger than window=64"),
        ("dense", {"sampler": "cls", "valid": 64}, "goes with sampler=map or tokens"),
    ],
)
def test_words_that_do_not_fit(kind: str, words: dict[str, Any], said: str, tmp_path: Path) -> None:
    encoder = dense_encoder() if kind == "dense" else load(small_encoder(tmp_path))
    with pytest.raises(UserError, match=said):
        choose(encoder, Words(**words))


def test_words_for_a_floor_or_a_network_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stands in its name"):
        sources.resolve("floor:colour", seed=0, words=Words(window=64), **SETTINGS)
    with pytest.raises(UserError, match="needs a ViT"):
        word = "random:timm:resnet10t"
        sources.resolve(word, seed=0, words=Words("tokens", mpp=0.5), **SETTINGS)
    with pytest.raises(UserError, match="timm has no model 'vit_timy'"):
        sources.resolve("timm:vit_timy", seed=0, words=Words(mpp=0.5), **SETTINGS)
