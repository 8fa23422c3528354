"""HEST: the cache, what `check` says, and folders that are half there, broken or mixed up."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shapely

from eval.benchmarks import Request
from eval.benchmarks.hest import Hest, files_of
from eval.benchmarks.hest import counts as hest_counts
from eval.benchmarks.hest.counts import Counts, count
from eval.benchmarks.hest.facts import SIZES, SLIDES, differing
from lemon_muse.errors import UserError
from tests.fixtures.hest import edit, write

BENCHMARK = Hest()
BREAST = Request(task="breast")


@pytest.fixture(scope="module")
def breast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All slides of the task; not to be written to."""
    return write(tmp_path_factory.mktemp("hest"), SLIDES["breast"])


@pytest.fixture
def own(breast: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(breast, tmp_path / "hest")


def test_the_cache_is_used_mended_and_renewed(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = replace(BREAST, cache=tmp_path / "cache")
    first = BENCHMARK.load(own, request)
    kept = sorted((tmp_path / "cache").iterdir())
    assert len(kept) == 5
    calls = []

    def counting(transcripts: Path, outlines: Path) -> Counts:
        calls.append(transcripts.name)
        return count(transcripts, outlines)

    monkeypatch.setattr(hest_counts, "count", counting)
    assert BENCHMARK.load(own, request).content_hash == first.content_hash
    assert BENCHMARK.check(own, request) == BENCHMARK.check(own, BREAST) and len(calls) == 5
    calls.clear()
    damaged = next(path for path in kept if "TENX95" in path.name)
    damaged.write_bytes(damaged.read_bytes()[:-900])
    with caplog.at_level(logging.WARNING):
        assert BENCHMARK.load(own, request).content_hash == first.content_hash
    assert calls == ["TENX95_transcripts.parquet"] and "is damaged" in caplog.text
    assert sorted((tmp_path / "cache").iterdir()) == kept
    calls.clear()
    # Other transcripts under the same name.
    edit(files_of(own, "TENX94").transcripts, lambda t: pa.concat_tables([t, t]))
    assert BENCHMARK.load(own, request).content_hash != first.content_hash
    assert calls == ["TENX94_transcripts.parquet"]


def test_check_names_what_differs(breast: Path, own: Path) -> None:
    said = BENCHMARK.check(breast, BREAST)
    assert "wsis/TENX95.tif is 700 x 560 px; published are 48376 x 53738 px." in said
    listed = ", ".join(f"{name} 1" for name in SLIDES["breast"])
    assert f"nuclei outside the image are left out: {listed}." in said
    assert "10 of 200 nuclei have no counted transcript and are left out." in said
    assert len(said) == 7
    metadata = own / "metadata" / "TENX94.json"
    metadata.write_text(metadata.read_text().replace("0.2125", "0.5"))
    (own / "wsis" / "NCBI785.tif").unlink()
    for path in files_of(own, "TENX98").lacking or [*own.rglob("TENX98*")]:
        path.unlink()
    more = BENCHMARK.check(own, BREAST)
    assert more[0].startswith("2 of the 5 slides of breast are not there (NCBI785, TENX98)")
    assert more[1] == "NCBI785 is left out: wsis/NCBI785.tif is missing."
    assert "TENX94 has 0.5000 µm per pixel; published are 0.2125." in more
    assert any(s.startswith("HEST_v1_1_0.csv says that TENX94 has 0.2125 µm") for s in more)
    assert len(BENCHMARK.load(own, BREAST)) == 3 * 37


def test_check_is_silent_about_published_slides(tmp_path: Path) -> None:
    for name, (width, height, mpp) in SIZES.items():
        assert differing(name, (width, height), mpp, tmp_path) == []
        assert len(differing(name, (width, height + 1), mpp, tmp_path)) == 1
        assert len(differing(name, (width, height), 2 * mpp, tmp_path)) == 1
    (tmp_path / "HEST_v1_1_0.csv").write_text("id,organ\nTENX95,Breast\n")
    assert "says nothing usable" in differing("TENX95", SIZES["TENX95"][:2], 0.2125, tmp_path)[0]
    assert differing("TENX94", SIZES["TENX94"][:2], 0.2125, tmp_path) == [
        "HEST_v1_1_0.csv does not list TENX94."
    ]


def test_absent_slides_are_told_and_one_slide_is_too_few(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in SLIDES["breast"][2:]:
        files_of(own, name).transcripts.unlink()
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(own, BREAST)
    assert set(table.slide) == set(SLIDES["breast"][:2])
    assert "TENX94, TENX95, TENX98" in caplog.text
    assert "transcripts/TENX95_transcripts.parquet is missing" in caplog.text
    files_of(own, "NCBI785").outlines.unlink()
    with pytest.raises(UserError, match=r"1 of the 5 slides of breast.*needs two") as error:
        BENCHMARK.load(own, BREAST)
    assert "xenium_seg/NCBI785_xenium_nucleus_seg.parquet is missing" in str(error.value)
    with pytest.raises(UserError, match="0 of the 20 slides of lung"):
        BENCHMARK.load(own, Request(task="lung"))


def test_the_mpp_is_never_guessed(own: Path) -> None:
    metadata = own / "metadata" / "TENX95.json"
    facts = json.loads(metadata.read_text())
    for value in ("", float("nan"), 0, None, "gone"):
        facts["pixel_size_um_estimated"] = value
        if value == "gone":
            del facts["pixel_size_um_estimated"]
        metadata.write_text(json.dumps(facts))
        with pytest.raises(UserError, match=r"TENX95\.json states no usable .*image_mpp="):
            BENCHMARK.load(own, BREAST)
    table = BENCHMARK.load(own, replace(BREAST, image_mpp=0.21))
    assert set(table.mpp[table.slide == "TENX95"]) == {0.21}
    assert set(table.mpp[table.slide == "TENX94"]) == {0.2125}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["image", "metadata", "transcripts", "outlines"])
def test_half_files_are_named(kind: str, own: Path) -> None:
    path = getattr(files_of(own, "TENX95"), kind)
    _cut(path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        BENCHMARK.load(own, BREAST)


def test_files_of_other_slides_are_refused(own: Path) -> None:
    files = files_of(own, "TENX95")
    edit(
        files.outlines,
        lambda t: t.set_column(1, "__index_level_0__", pa.array([f"x{k}" for k in range(len(t))])),
    )
    with pytest.raises(UserError, match=r"cell ids do not meet \(\d+ transcripts"):
        BENCHMARK.load(own, BREAST)
    shutil.copy(files_of(own, "NCBI783").outlines, files.outlines)
    shutil.copy(files_of(own, "NCBI783").transcripts, files.transcripts)
    far = shapely.Polygon([(9000, 9000), (9010, 9000), (9010, 9010)]).wkb
    edit(files.outlines, lambda t: t.set_column(0, "geometry", pa.array([far] * len(t))))
    with pytest.raises(UserError, match=r"none of the \d+ nuclei .* lies inside .*TENX95\.tif"):
        BENCHMARK.load(own, BREAST)


def test_outlines_without_an_extent_are_left_out(own: Path) -> None:
    files = files_of(own, "TENX95")
    before = count(files.transcripts, files.outlines)

    def spoil(table: pa.Table) -> pa.Table:
        shapes = table["geometry"].to_pylist()
        shapes[10], shapes[11], shapes[12] = None, shapely.Polygon().wkb, b"no outline"
        return table.set_column(0, "geometry", pa.array(shapes, pa.binary()))

    edit(files.outlines, spoil)
    after = count(files.transcripts, files.outlines)
    assert after.summary.shapeless == 3 and after.summary.nuclei == before.summary.nuclei - 3
    lost = set(before.cell.tolist()) - set(after.cell.tolist())
    gone = np.isin(before.cell, sorted(lost))
    assert len(lost) == 3 and set(after.cell.tolist()) < set(before.cell.tolist())
    assert after.summary.homeless == before.summary.homeless + before.matrix[gone].sum()
    assert (after.matrix != before.matrix[~gone]).nnz == 0
    assert "3 outlines are empty and are left out." in BENCHMARK.check(own, BREAST)


def test_missing_columns_and_empty_files_are_named(own: Path) -> None:
    files = files_of(own, "TENX95")
    kept = files.transcripts.read_bytes()
    edit(files.transcripts, lambda t: t.drop_columns(["qv"]))
    with pytest.raises(UserError, match=r"TENX95_transcripts\.parquet has no column qv"):
        BENCHMARK.load(own, BREAST)
    files.transcripts.write_bytes(kept)
    outlines = files.outlines.read_bytes()
    edit(files.outlines, lambda t: t.drop_columns(["__index_level_0__"]))
    with pytest.raises(UserError, match="has no cell ids"):
        BENCHMARK.load(own, BREAST)
    files.outlines.write_bytes(outlines)
    edit(files.outlines, lambda t: t.slice(0, 0))
    with pytest.raises(UserError, match="holds no nucleus"):
        BENCHMARK.load(own, BREAST)
    edit(files.transcripts, lambda t: t.slice(0, 0))
    files.outlines.write_bytes(outlines)
    with pytest.raises(UserError, match="no transcript of"):
        BENCHMARK.load(own, BREAST)


def test_the_level_above_or_below_is_named(own: Path) -> None:
    for wrong in (own / "wsis", own.parent):
        for ask in (BENCHMARK.load, BENCHMARK.check):
            with pytest.raises(UserError, match=re.escape(f"give root={own} instead")):
                ask(wrong, BREAST)
    with pytest.raises(UserError, match="has no task 'skin'"):
        BENCHMARK.load(own, Request(task="skin"))
