"""Parts of a set and draws by weight: compared with plain loops over every nucleus."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lemon_muse import checkpoint
from lemon_muse.data.compose import Subset, describe, select, slide_numbers
from lemon_muse.data.order import Order
from lemon_muse.data.reader import CropBatches, open_reader
from lemon_muse.data.rois import RoiBatches
from lemon_muse.data.selection import CHUNK, Selection, by_block, weighted
from lemon_muse.data.shards import Index, open_index
from lemon_muse.data.weights import Weights, write_weights
from lemon_muse.errors import RunError, UserError
from tests.conftest import write_blob_shards
from tests.test_resume import ENV, ROOT, command, equal, kill_at, train

BATCH = 16


def batches(index: Index, subset: Subset, rank: int = 0, world: int = 1) -> CropBatches:
    settings = {"seed": 3, "batch": BATCH, "window": 3, "rank": rank, "world": world, "workers": 0}
    return CropBatches(index, **settings, chosen=select(index, subset))


def seen(index: Index, subset: Subset, number: int = 0) -> np.ndarray:
    """Samples of a pass in their order, the rest at the end of the pass among them."""
    order = Order(index.blocks["count"], 3, 1, 3, select(index, subset))
    steps = range(number * order.steps_a_pass, (number + 1) * order.steps_a_pass)
    found = [order.batch_at(step) for step in steps]
    return np.concatenate([index.starts[block] + row for block, row in found])


def facts(index: Index) -> dict[str, np.ndarray]:
    """Slide and patient of every nucleus, block by block."""
    reader = open_reader(index)
    found = [reader.columns(block) for block in range(len(index.blocks))]
    return {k: np.concatenate([c[k] for c in found]) for k in ("slide", "patient")}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """700 nuclei of 7 slides and 4 patients in blocks of 64."""
    return open_index(write_blob_shards(tmp_path_factory.mktemp("compose") / "crops"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    organs = ["breast", "lung", "lung", "colon", "breast", "", "colon"]
    rows = [f"slide{i},{organ},x" for i, organ in enumerate(organs)]
    (tmp_path / "manifest.csv").write_text("\n".join(["slide,organ,other", *rows]))
    return tmp_path / "manifest.csv"


def test_nothing_asked_for_changes_nothing(index: Index) -> None:
    assert select(index, Subset()) is None
    assert describe(index, None) == "700 nuclei in 11 blocks"
    every = Selection(index.blocks["count"].astype(np.int64), index.blocks["count"], 0)
    plain = Order(index.blocks["count"], 3, BATCH, 3)
    for step in (0, 5, 43, 44, 90):
        chosen = Order(index.blocks["count"], 3, BATCH, 3, every).batch_at(step)
        np.testing.assert_array_equal(plain.batch_at(step), chosen)


@pytest.mark.parametrize("wanted", [16, 64, 100, 639, 699, 700])
def test_the_number_of_nuclei_is_exact_and_each_comes_once(index: Index, wanted: int) -> None:
    passes = [seen(index, Subset(nuclei=wanted), number) for number in (0, 1)]
    for found in passes:
        assert len(found) == len(set(found.tolist())) == wanted
    assert set(passes[0].tolist()) == set(passes[1].tolist())
    assert not np.array_equal(*passes)


def test_the_larger_part_holds_the_smaller_one(index: Index) -> None:
    for seed in (0, 1):
        sets = [set(seen(index, Subset(nuclei=n, seed=seed)).tolist()) for n in (20, 30, 90, 400)]
        assert all(small < large for small, large in pairwise(sets))
    other = set(seen(index, Subset(nuclei=400)).tolist())
    assert other != sets[-1]
    slides = [select(index, Subset(slides=n)).slides for n in (1, 3, 6)]  # type: ignore[union-attr]
    assert [int(s.sum()) for s in slides] == [1, 3, 6]
    assert (slides[0] <= slides[1]).all() and (slides[1] <= slides[2]).all()


def test_slides_patients_and_organs_are_those_of_a_plain_loop(index: Index, table: Path) -> None:
    about = facts(index)
    found = seen(index, Subset(slides=3))
    kept = set(about["slide"][found])
    assert len(kept) == 3
    assert sorted(found.tolist()) == [i for i, s in enumerate(about["slide"]) if s in kept]

    found = seen(index, Subset(patients=2))
    kept = set(about["patient"][found])
    assert len(kept) == 2
    assert sorted(found.tolist()) == [i for i, p in enumerate(about["patient"]) if p in kept]

    found = seen(index, Subset(organs=("lung", "colon"), table=table))
    kept = {"slide1", "slide2", "slide3", "slide6"}
    assert sorted(found.tolist()) == [i for i, s in enumerate(about["slide"]) if s in kept]

    two = Subset(organs=("lung", "colon"), table=table, slides=2, nuclei=50)
    found = seen(index, two)
    assert len(set(found.tolist())) == 50 and set(about["slide"][found]) <= kept
    blocks = len(set(index.locate(found)[0].tolist()))
    said = describe(index, select(index, two))
    assert said == f"50 of 700 nuclei in {blocks} of 11 blocks, 2 of 7 slides"


@pytest.mark.parametrize("what", ["nuclei", "slides", "weights"])
def test_any_rank_and_any_step_sees_its_part_of_the_same_batch(
    index: Index, what: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    given = Weights(rng.integers(0, 3, 700), np.array([1.0, 5, 0.1]), np.array(["a", "b", "c"]), {})
    write_weights(tmp_path / "w.npz", given, index)
    subset = {
        "nuclei": Subset(nuclei=100),
        "slides": Subset(slides=2, nuclei=150),
        "weights": Subset(weights=tmp_path / "w.npz", nuclei=300),
    }[what]
    one = [b["samples"] for b in batches(index, subset).iterate(0, 40)]
    for world in (2, 4):
        ranks = [batches(index, subset, rank, world) for rank in range(world)]
        for step in (39, 0, 17, 18):  # in any sequence, as after a resume
            parts = [r.batch_at(step) for r in ranks]
            np.testing.assert_array_equal(np.concatenate([p["samples"] for p in parts]), one[step])
    block, row = index.locate(parts[0]["samples"])
    reader = open_reader(index)
    plain = np.stack([reader.pixels(int(b))[r] for b, r in zip(block, row, strict=True)])
    np.testing.assert_array_equal(parts[0]["pixels"], plain)


def test_draws_are_those_of_a_plain_loop(index: Index, tmp_path: Path) -> None:
    """Systematic sampling, one nucleus after the other; and its means are the weights."""
    rng = np.random.default_rng(1)
    code = rng.choice(4, 700, p=[0.8, 0.15, 0.04, 0.01]).astype(np.int32)
    code[rng.random(700) < 0.1] = -1
    weight = np.array([0.3, 2.0, 7.0, 0.0])
    write_weights(tmp_path / "w.npz", Weights(code, weight, np.array(list("abcd")), {}), index)
    subset = Subset(weights=tmp_path / "w.npz")
    each = np.where(code < 0, 0, weight[code])
    total = int((each > 0).sum())
    expected = each / each.sum() * total
    sums = np.zeros(700)
    for number in range(40):
        u = np.random.default_rng([0, number, 1]).random()
        times, reached, k = np.zeros(700, int), 0.0, 0
        for i in range(700):
            reached += expected[i]
            while k < total and k + u < reached:
                times[i] += 1
                k += 1
        found = np.bincount(seen(index, subset, number), minlength=700)
        assert found.sum() == total
        # Sums of floats and of whole numbers may put a draw on either side of an edge.
        assert (found != times).sum() <= 2
        assert (np.abs(found - expected) < 1).all()
        sums += found
    assert np.abs(sums / 40 - expected).max() < 0.25
    assert not sums[each == 0].any()


def test_weights_within_a_part(index: Index, tmp_path: Path) -> None:
    about = facts(index)
    code = np.arange(700) % 5
    given = Weights(code, np.array([1.0, 1, 1, 20, 1]), np.array(list("abcde")), {})
    write_weights(tmp_path / "w.npz", given, index)
    pool = set(seen(index, Subset(slides=3, nuclei=200)).tolist())
    subset = Subset(slides=3, nuclei=200, weights=tmp_path / "w.npz")
    found = np.concatenate([seen(index, subset, number) for number in range(80)])
    assert set(found.tolist()) == pool and len(found) == 80 * 200
    assert len(set(about["slide"][found])) == 3
    numbers = np.bincount(code[list(pool)], minlength=5)
    share = np.bincount(code[found], minlength=5) / len(found)
    wanted = numbers * given.weight / (numbers @ given.weight)
    np.testing.assert_allclose(share, wanted, atol=0.005)


def test_sums_over_blocks_do_not_depend_on_the_pieces() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 300, 60_000)
    sizes[:3] = 0
    values = rng.integers(0, 5, sizes.sum())
    assert len(values) > 2 * CHUNK
    edges = np.concatenate([[0], np.cumsum(sizes)])
    plain = [values[a:b].sum() for a, b in pairwise(edges)]
    np.testing.assert_array_equal(by_block(sizes, lambda here: values[here]), plain)


def test_the_sum_of_weights_is_exact_in_a_large_set() -> None:
    sizes = np.full(40_000, 256)
    code = np.random.default_rng(0).choice(3, sizes.sum(), p=[0.9, 0.09, 0.01]).astype(np.int32)
    chosen = weighted(Selection(sizes, sizes, 0), code, np.array([1e-3, 1.0, 1e3]))
    counts = chosen.counts_at(7)
    assert counts.sum() == chosen.total == len(code)
    for block in (0, 17, 39_999):
        assert len(chosen.samples_at(7, np.array([block]))[1]) == counts[block]


def test_rois_as_samples_and_as_crops(roi_shards: Path, tmp_path: Path) -> None:
    index = open_index(roi_shards)
    subset = Subset(slides=2, cache=tmp_path / "cache")
    chosen = select(index, subset, reads="rois")
    settings = {"seed": 0, "batch": 2, "window": 4, "rank": 0, "world": 1, "workers": 0}
    rois = RoiBatches(index, **settings, chosen=chosen)
    found = [b["samples"] for b in rois.iterate(0, rois.order.steps_a_pass)]
    reader = open_reader(index)
    slides = [str(reader.columns(roi)["slide"][0]) for roi in range(24)]
    kept = {slides[i] for i in np.concatenate(found)}
    assert len(kept) == 2
    assert sorted(np.concatenate(found).tolist()) == [i for i in range(24) if slides[i] in kept]
    assert describe(index, chosen) == "12 of 24 ROIs, 2 of 4 slides"
    with pytest.raises(UserError, match=r"subset\.nuclei and subset\.weights are for methods"):
        select(index, Subset(nuclei=3), reads="rois")

    crops = index.as_crops(32)
    about = facts(crops)["slide"]
    found = seen(crops, subset)
    assert sorted(found.tolist()) == [i for i, s in enumerate(about) if s in kept]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2  # ROIs and crops are not mixed up


def test_the_table_of_slides_is_made_once(index: Index, tmp_path: Path) -> None:
    sizes = index.blocks["count"].astype(np.int64)
    first = slide_numbers(index, sizes, tmp_path)
    np.testing.assert_array_equal(np.array(list(index.slides))[first], facts(index)["slide"])
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    slide_numbers(index, sizes, tmp_path)
    assert file.stat().st_mtime_ns == stamp and isinstance(first, np.memmap)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"give subset\.cache=FOLDER"):
        slide_numbers(index, sizes, tmp_path / "file")


def test_bad_parts_are_one_clear_sentence(index: Index, table: Path, tmp_path: Path) -> None:
    def said(**words: object) -> str:
        with pytest.raises(UserError) as error:
            select(index, Subset(**words))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "subset.nuclei=701, but there are 700" in said(nuclei=701)
    assert "subset.slides=8, but there are 7" in said(slides=8)
    assert "subset.patients=5, but there are 4" in said(patients=5)
    assert "the organs are: breast, colon, lung." in said(organs=["liver"], table=table)
    assert "needs subset.table=FILE.csv" in said(organs=["liver"])
    assert "cannot be read as a csv" in said(organs=["lung"], table=tmp_path / "none.csv")
    (tmp_path / "bare.csv").write_text("slide,site\na,b\n")
    assert "needs the columns slide and organ" in said(organs=["lung"], table=tmp_path / "bare.csv")
    weights = tmp_path / "w.npz"
    assert "there is no file of weights" in said(weights=weights)
    weights.write_bytes(b"no zip")
    assert "is no file of weights" in said(weights=weights)
    np.savez(weights, code=np.zeros(700))
    assert "is no file of weights" in said(weights=weights)
    np.savez(weights, code=0, weight=0, names=0, about=np.array(json.dumps({"schema": 7})))
    assert "has schema 7" in said(weights=weights)
    none = Weights(np.full(700, -1), np.ones(1), np.array(["a"]), {})
    write_weights(weights, none, index)
    assert "no nucleus of the subset has a weight" in said(weights=weights)
    other = open_index(write_blob_shards(tmp_path / "other", seed=1))
    write_weights(weights, Weights(np.zeros(700), np.ones(1), np.array(["a"]), {}), other)
    assert "are of another set of shards" in said(weights=weights)
    for code, weight in ((0, -1.0), (0, np.nan), (0, np.inf), (1, 1.0), (-2, 1.0)):
        given = Weights(np.full(700, code), np.array([weight]), np.array(["a"]), {})
        write_weights(weights, given, index)
        assert "below 0 or not finite, or classes without a weight" in said(weights=weights)
    weights.write_bytes(b"")
    assert "is no file of weights" in said(weights=weights)
    mixed = np.random.default_rng(0).integers(0, 300, 700)
    write_weights(weights, Weights(mixed, np.ones(300), np.arange(300).astype(str), {}), index)
    whole = weights.read_bytes()
    for place in range(100, 1000, 9):  # most spoil a checksum, some the compressed bytes
        spoilt = bytearray(whole)
        spoilt[place] ^= 255
        weights.write_bytes(spoilt)
        assert "is no file of weights" in said(weights=weights), place


def test_the_digest_is_of_what_is_chosen(index: Index, table: Path, tmp_path: Path) -> None:
    def digest(**words: object) -> str:
        chosen = select(index, Subset(**words))  # type: ignore[arg-type]
        assert chosen is not None
        return chosen.digest()

    def weighed(code: np.ndarray, weight: float) -> str:
        given = Weights(code, np.array([1.0, weight]), np.array(["a", "b"]), {})
        write_weights(tmp_path / "w.npz", given, index)
        return digest(weights=tmp_path / "w.npz")

    code = np.arange(700) % 2
    found = [digest(nuclei=99), digest(nuclei=100), digest(nuclei=100, seed=1), digest(slides=3)]
    found += [weighed(code, 3.0), weighed(code, 4.0), weighed(code[::-1], 3.0)]
    assert len(set(found)) == 7 and weighed(code, 3.0) == found[4]
    lung = digest(organs=["lung"], table=table)
    table.write_text(table.read_text().replace(",x", ",y"))
    assert digest(organs=["lung"], table=table) == lung
    table.write_text(table.read_text().replace("slide3,colon", "slide3,lung"))
    assert digest(organs=["lung"], table=table) != lung


def test_slides_of_blocks_that_are_gone_are_not_kept(index: Index) -> None:
    found = batches(index, Subset(nuclei=700))
    found.with_slides = True
    names = np.array(list(index.slides))
    for step in range(2 * found.order.steps_a_pass):
        batch = found.batch_at(step)
        np.testing.assert_array_equal(
            names[batch["slide"]], facts(index)["slide"][batch["samples"]]
        )
        assert len(found.reader._slides) <= 2 * found.order.window < len(index.blocks)


def test_a_killed_run_on_a_drawn_part_goes_on_bit_for_bit(index: Index, tmp_path: Path) -> None:
    given = Weights(np.arange(700) % 5, np.array([1.0, 1, 1, 20, 1]), np.array(list("abcde")), {})
    write_weights(tmp_path / "w.npz", given, index)
    part = ["steps=4", "save_every=2", "subset.slides=4", "subset.nuclei=200"]
    part += [f"subset.weights={tmp_path / 'w.npz'}", f"subset.cache={tmp_path / 'cache'}"]
    train(index.folder, tmp_path / "whole", *part)
    kill_at(index.folder, tmp_path / "cut", 3, *part)
    found = checkpoint.load_newest(tmp_path / "cut" / "checkpoints")
    assert found is not None and found[0] == 2
    train(index.folder, tmp_path / "cut", *part)
    last = [checkpoint.load_newest(tmp_path / r / "checkpoints") for r in ("whole", "cut")]
    assert last[0] is not None and last[1] is not None and last[0][0] == last[1][0] == 4
    equal(last[0][1]["method"], last[1][1]["method"])

    def again(*words: str) -> str:
        words = (*part, *words)
        line = command(index.folder, tmp_path / "cut", *words)
        done = subprocess.run(line, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert "subset.nuclei: 200 -> 300" in again("subset.nuclei=300")
    assert "subset.cache" not in again(f"subset.cache={tmp_path / 'other'}", "subset.slides=5")
    said = again("subset.nuclei=20")
    assert "the subset of" in said and "holds 20 nuclei, fewer than batch=32" in said
    write_weights(
        tmp_path / "w.npz", Weights(given.code, given.weight[::-1], given.names, {}), index
    )
    said = again()
    assert "was trained on another part: the file subset.weights" in said
