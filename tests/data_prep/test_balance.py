"""Balanced weights: looks of known groups, planted duplicates, and what training then draws."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from sklearn.metrics import homogeneity_score

from data_prep import duplicates, kmeans_tree, looks
from data_prep.balance import Balance, run
from lemon_muse import encoder as enc
from lemon_muse.backbones import Backbone, build, timm_arguments
from lemon_muse.data.compose import Subset, select
from lemon_muse.data.order import Order
from lemon_muse.data.reader import open_reader
from lemon_muse.data.shards import Index, open_index
from lemon_muse.data.weights import read_weights
from lemon_muse.data.writer import ShardWriter
from lemon_muse.errors import RunError, UserError
from tests.conftest import blob_columns

KINDS = {"a": 600, "b": 240, "c": 100, "d": 40, "": 20}  # nuclei of each type
TINTS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (190, 190, 40), (40, 190, 190))
BLOCK = 128
LEAVES = 30
FAST = {"window": 12, "dims": 40, "duplicates": 0.999, "levels": (LEAVES, 5)}


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 crops of 32 px of five hues, mixed; the last 10 are copies of the first 10."""
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.repeat(np.arange(5), list(KINDS.values())))
    kind[-10:] = kind[:10]
    pixels = np.array(TINTS)[kind][:, None, None] + rng.normal(0, 12, (1000, 4, 4, 3))
    pixels = pixels.repeat(8, 1).repeat(8, 2) + rng.normal(0, 3, (1000, 32, 32, 3))
    pixels = pixels.clip(0, 255).astype(np.uint8)
    pixels[-10:] = pixels[:10]
    pixels[-5:, 3, 3] += 1  # near-duplicates, not equal ones
    folder = tmp_path_factory.mktemp("balance") / "crops"
    with ShardWriter(folder, size=32, mpp=0.25) as writer:
        for start in range(0, 1000, BLOCK):
            here = slice(start, min(start + BLOCK, 1000))
            columns = blob_columns(start, len(pixels[here]))
            columns["type"] = np.array(list(KINDS))[kind[here]]
            writer.write(pixels[here], columns)
    return folder


def types(index: Index) -> np.ndarray:
    reader = open_reader(index)
    return np.concatenate([reader.columns(b)["type"] for b in range(len(index.blocks))])


def drawn(index: Index, file: Path, passes: int) -> np.ndarray:
    """Every nucleus that training sees in some passes."""
    order = Order(index.blocks["count"], 0, 1, 4, select(index, Subset(weights=file)))
    steps = range(passes * order.steps_a_pass)
    found = [order.batch_at(step) for step in steps]
    return np.concatenate([index.starts[block] + row for block, row in found])


def test_clusters_of_known_groups_are_drawn_evenly(crops: Path, tmp_path: Path) -> None:
    index, kinds = open_index(crops), types(open_index(crops))
    out = run(Balance(data=crops, out=tmp_path / "w.npz", **FAST, most=100))
    found = read_weights(out, index)
    # The copies are gone, the first of each pair stays.
    assert np.flatnonzero(found.code < 0).tolist() == list(range(990, 1000))
    left = found.code >= 0
    assert homogeneity_score(kinds[left], found.code[left]) == pytest.approx(1)
    samples = drawn(index, out, 3)
    assert len(samples) == 3 * 990 and samples.max() < 990
    leaves = np.bincount(found.code[samples], minlength=LEAVES)
    assert len(leaves) == LEAVES and chisquare(leaves).pvalue > 0.5
    assert chisquare(np.bincount(found.code[left])).pvalue < 1e-9
    # Within a leaf, every member as often as any other but for rounding.
    for leaf in range(LEAVES):
        members = np.flatnonzero(found.code == leaf)
        times = np.bincount(samples, minlength=1000)[members]
        assert np.abs(times - times.mean()).max() <= 3
    assert not (tmp_path / "w.work").exists()
    with Image.open(tmp_path / "w.png") as picture:
        assert picture.size == (20 * 34, 24 * 34)  # 12 largest and 12 smallest, 20 each


@pytest.mark.parametrize("by", ["type", "slide"])
def test_types_and_slides_get_equal_shares(crops: Path, tmp_path: Path, by: str) -> None:
    index = open_index(crops)
    out = run(Balance(data=crops, out=tmp_path / "w.npz", by=by, duplicates=None, most=50))
    reader = open_reader(index)
    column = np.concatenate([reader.columns(b)[by] for b in range(len(index.blocks))])
    _, counts = np.unique(column[drawn(index, out, 2)], return_counts=True)
    assert counts.sum() == 2000 and np.ptp(counts) < 0.05 * counts.max()
    names = set(read_weights(out, index).names.tolist())
    assert names == {name or "unknown" for name in column.tolist()}


def test_no_nucleus_comes_more_often_than_asked(crops: Path, tmp_path: Path) -> None:
    index, kinds = open_index(crops), types(open_index(crops))
    out = run(Balance(data=crops, out=tmp_path / "w.npz", by="type", duplicates=None, most=3))
    times = np.bincount(drawn(index, out, 10), minlength=1000) / 10
    rare = (kinds == "") | (kinds == "d")
    assert times.max() <= 3.0 + 1e-9 and (times[rare] == 3).all()
    # What the rare ones may not have is shared equally by the others.
    shares = [times[kinds == kind].sum() for kind in "abc"]
    np.testing.assert_allclose(shares, (1000 - 3 * rare.sum()) / 3, rtol=0.01)


def test_a_tree_spreads_over_groups_of_very_different_size() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (12, 16)) * 8
    size = np.array([20_000, *[60] * 11])
    truth = np.repeat(np.arange(12), size)
    points = (centres[truth] + rng.normal(0, 1, (len(truth), 16))).astype(np.float32)
    plain = kmeans_tree.grow(points, (24, 6), rounds=0, seed=0)
    tree = kmeans_tree.grow(points, (24, 6), rounds=3, seed=0)

    def on_the_large_group(tree: kmeans_tree.Tree) -> int:
        return len(np.unique(tree.leaf[truth == 0]))

    assert on_the_large_group(tree) < on_the_large_group(plain)
    assert np.bincount(tree.leaf).min() > 0
    again = kmeans_tree.grow(points, (24, 6), rounds=3, seed=0)
    np.testing.assert_array_equal(tree.leaf, again.leaf)


def test_shares_and_caps_are_those_of_plain_loops() -> None:
    tree = kmeans_tree.Tree(
        np.array([0, 0, 0, 1, 2, 3, 4, 4], np.int32),
        (np.array([0, 0, 0, 1, 2], np.int32), np.array([0, 1, 1], np.int32)),
    )
    np.testing.assert_allclose(kmeans_tree.even_shares(tree, by_level=False), 1 / 5)
    shares = kmeans_tree.even_shares(tree, by_level=True)
    np.testing.assert_allclose(shares, [1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4])

    rng = np.random.default_rng(0)
    for _ in range(20):
        size, share = rng.integers(1, 1000, 30), rng.dirichlet(np.ones(30))
        times = kmeans_tree.capped(share, size, 2.5)
        assert times.max() <= 2.5 + 1e-9
        np.testing.assert_allclose((times * size).sum(), size.sum())
        free = times < 2.5 - 1e-9
        ratio = (times * size / share)[free]  # the others keep their proportions
        np.testing.assert_allclose(ratio, ratio[0])


@pytest.mark.parametrize("exact", [True, False])
def test_near_duplicates_are_those_of_a_plain_loop(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "PIECE", 100)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(700, 8))
    vectors[300:500] = vectors[rng.integers(0, 300, 200)] + rng.normal(0, 0.05, (200, 8))
    vectors[500:520] = vectors[500]  # empty glass, again and again
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    kept: list[int] = []
    for i in range(700):
        if not kept or (vectors[kept] @ vectors[i]).max() < 0.98:
            kept.append(i)
    if exact:
        found = duplicates.distinct(vectors, cosine=0.98, seed=0)
        assert np.flatnonzero(found).tolist() == kept
        return
    monkeypatch.setattr(duplicates, "EXACT", 100)
    found = duplicates.distinct(vectors, cosine=0.98, seed=0)
    assert found[:300].sum() >= (np.array(kept) < 300).sum() and found[500:520].sum() == 1
    assert not (~found)[kept].sum() > 3  # a few that lists miss stay, and then remove others
    assert found.sum() < 1.05 * len(kept)


def test_one_that_was_left_out_removes_none() -> None:
    angle = np.deg2rad([0, 8, 16, 90])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    found = duplicates.distinct(vectors, cosine=float(np.cos(np.deg2rad(10))), seed=0)
    assert found.tolist() == [True, False, True, True]


def test_looks_are_principal_components(crops: Path, tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    index = open_index(crops)
    reader = open_reader(index)
    pixels = np.concatenate([reader.pixels(b) for b in range(len(index.blocks))])
    found = looks.look(index, looks.pixel_looks(20), tmp_path, dims=6, seed=0, workers=0)
    plain = PCA(6).fit_transform(pixels[:, 6:26, 6:26].reshape(1000, -1) / 255.0)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    plain *= np.sign((plain * found).sum(0))
    np.testing.assert_allclose(found, plain, atol=0.01)

    settings = Backbone(name="resnet10t", args={"channels": [16, 32, 32, 64]})
    architecture, arguments = timm_arguments(settings, 24)
    facts = {"architecture": architecture, "arguments": arguments, "image_size": 24, "mpp": 0.25}
    facts |= {"mean": (0.5, 0.4, 0.5), "std": (0.2, 0.2, 0.1)}
    encoder = enc.Encoder(build(settings, 24, seed=3), **facts).eval()
    enc.save_encoder(encoder, tmp_path / "e")
    raw = looks.encoder_looks(tmp_path / "e", index, "cpu")(pixels[:5])
    images = torch.from_numpy(pixels[:5, 4:28, 4:28]).permute(0, 3, 1, 2) / 255.0
    images = (images - torch.tensor(encoder.mean)[:, None, None]) / torch.tensor(encoder.std)[
        :, None, None
    ]
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(raw), encoder(images), rtol=0, atol=1e-5)
    words = {"data": crops, "out": tmp_path / "e.npz", "encoder": tmp_path / "e", **FAST}
    found = read_weights(run(Balance(**words, device="cpu")), index)
    assert (found.code[-10:] == -1).all()
    assert run(Balance(**words, device="cpu")) == tmp_path / "e.npz"  # finished already
    enc.save_encoder(enc.Encoder(build(settings, 24, seed=4), **facts), tmp_path / "e")
    with pytest.raises(UserError, match=r"made with other settings \(encoder_hash: "):
        run(Balance(**words, device="cpu"))
    large = enc.Encoder(build(settings, 40, seed=3), **{**facts, "image_size": 40})
    enc.save_encoder(large, tmp_path / "large")
    with pytest.raises(UserError, match=r"needs 40 px at 0\.25 µm/px, but the crops of"):
        run(Balance(**{**words, "encoder": tmp_path / "large", "out": tmp_path / "l.npz"}))


def test_a_job_that_was_cut_goes_on(
    crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "PIECE", 200)
    monkeypatch.setattr(looks, "FITTED", 100)
    words = {"data": crops, "workers": 0, **FAST}
    whole = run(Balance(**words, out=tmp_path / "whole.npz"))
    index = open_index(crops)
    tar = index.shard(0)
    payload = tar.read_bytes()
    spoilt = bytearray(payload)
    spoilt[int(index.blocks[6]["offset"]) + 500] ^= 1
    tar.write_bytes(spoilt)
    try:
        with pytest.raises(RunError, match="block 6 of"):
            run(Balance(**words, out=tmp_path / "cut.npz"))
    finally:
        tar.write_bytes(payload)
    kept = sorted((tmp_path / "cut.work").glob("looks-*.npy"))
    assert kept and not (tmp_path / "cut.npz").exists()
    stamps = [p.stat().st_mtime_ns for p in kept]
    with pytest.raises(UserError, match="of a job with other settings or data"):
        run(Balance(**words, out=tmp_path / "cut.npz", seed=1))
    assert [p.stat().st_mtime_ns for p in kept] == stamps
    shutil.copytree(tmp_path / "cut.work", tmp_path / "other.work")
    np.save(tmp_path / "other.work" / kept[0].name, np.zeros_like(np.load(kept[0])))
    other = run(Balance(**words, out=tmp_path / "other.npz"))
    cut = run(Balance(**words, out=tmp_path / "cut.npz"))
    a, b = read_weights(whole, index), read_weights(cut, index)
    np.testing.assert_array_equal(a.code, b.code)
    np.testing.assert_array_equal(a.weight, b.weight)
    # What stood was used, not made again: there it was spoilt.
    assert not np.array_equal(a.code, read_weights(other, index).code)
    before = cut.stat().st_mtime_ns
    run(Balance(**words, out=tmp_path / "cut.npz"))
    assert cut.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="made with other settings \\(seed: 0 -> 1\\)"):
        run(Balance(**words, out=tmp_path / "cut.npz", seed=1))


def test_bad_words_are_one_clear_sentence(
    crops: Path, crop_shards: Path, roi_shards: Path, tmp_path: Path
) -> None:
    def said(**words: object) -> str:
        with pytest.raises(UserError) as error:
            run(Balance(**{"data": crops, "out": tmp_path / "x.npz", **FAST, **words}))  # type: ignore[arg-type]
        assert not (tmp_path / "x.npz").exists()
        return str(error.value)

    assert "carry no types to balance; use by=cluster" in said(
        data=crop_shards, by="type", duplicates=None, out=tmp_path / "y.npz"
    )
    assert "levels=[5, 5] must fall" in said(levels=(5, 5))
    assert "begin with at most 990" in said(levels=(991,))
    for levels in ((5, 0), (0,), (-3,)):
        assert "end with 1 or more" in said(levels=levels)
    # All but the tree is there: other words for it do not need it anew.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "x.work").glob("*.np*")}
    assert len(kept) >= 2 and "end with 1 or more" in said(levels=(9, 0), by_level=True, most=2)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "x.work").glob("*.np*")}
    (tmp_path / "mine.work").mkdir()
    (tmp_path / "mine.work" / "thesis.txt").touch()
    assert "holds something else" in said(out=tmp_path / "mine.npz")
    assert (tmp_path / "mine.work" / "thesis.txt").is_file()
    assert "holds rois, but crops are needed" in said(data=roi_shards)
    assert "must end in .npz" in said(out=tmp_path / "x")
