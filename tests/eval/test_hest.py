"""HEST: slides as they are published, counted again by plain loops."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from PIL import Image

from eval.benchmarks import Request
from eval.benchmarks import hest as module
from eval.benchmarks.hest import GENES, Hest, files_of
from eval.benchmarks.hest import counts as hest_counts
from eval.benchmarks.hest.counts import Counts, count
from eval.benchmarks.hest.facts import LINKED, SIZES, SLIDES, patients
from eval.plans import Fold, shares_patients
from lemon_muse.data.table import Table
from tests.fixtures import hest as fixture

BENCHMARK = Hest()
BREAST = Request(task="breast")
LUNG = ("NCBI856", "NCBI857", "NCBI866", "NCBI875", "NCBI876")


@pytest.fixture(scope="module")
def breast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All slides of the task; not to be written to."""
    return fixture.write(tmp_path_factory.mktemp("hest"), SLIDES["breast"])


@pytest.fixture(scope="module")
def table(breast: Path) -> Table:
    return BENCHMARK.load(breast, BREAST)


@pytest.fixture
def own(breast: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(breast, tmp_path / "hest")


def plain(value: Any) -> str | None:
    """An id or a name in its plainest form."""
    if value is None or value != value:
        return None
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str) and value[:2] in ("b'", 'b"'):
        return value[2:-1]
    return str(int(value)) if isinstance(value, (int, float)) else value


def looped(root: Path, name: str, *, nuclear: bool = True) -> dict[str, Counter[str]]:
    """Counts of each outlined cell, transcript by transcript."""
    files = files_of(root, name)
    outlined = {
        plain(row["__index_level_0__"]) for row in pq.read_table(files.outlines).to_pylist()
    }
    counts: dict[str, Counter[str]] = {}
    for row in pq.read_table(files.transcripts).to_pylist():
        cell, gene = plain(row["cell_id"]), plain(row["feature_name"])
        assert gene is not None
        if row["qv"] < 20 or gene.split("_")[0] in {c.split("_")[0] for c in fixture.CONTROLS}:
            continue
        if cell in (None, "-1", "UNASSIGNED") or (nuclear and row["overlaps_nucleus"] != 1):
            continue
        if cell in outlined:
            counts.setdefault(cell, Counter())[gene] += 1
    return counts


def as_dicts(counts: Counts) -> dict[str, Counter[str]]:
    dense = counts.matrix.toarray()
    return {
        cell: Counter({counts.genes[g]: int(dense[k, g]) for g in np.flatnonzero(dense[k])})
        for k, cell in enumerate(counts.cell.tolist())
    }


@pytest.mark.parametrize("name", [*SLIDES["breast"], "TENX111"])
def test_counts_are_those_of_a_plain_loop(name: str, breast: Path, tmp_path: Path) -> None:
    """Five kinds of ids; controls, quality, place, cells without an outline."""
    root = breast
    if name == "TENX111":
        fixture.write_slide(tmp_path, name)
        root = tmp_path
    files = files_of(root, name)
    assert pq.ParquetFile(files.transcripts).num_row_groups > 3
    counts = count(files.transcripts, files.outlines)
    expected = looped(root, name)
    assert as_dicts(counts) == expected and len(expected) == 38
    assert list(counts.genes) == sorted(counts.genes)
    panel = {plain(v) for v in pq.read_table(files.transcripts)["feature_name"].to_pylist()}
    assert set(counts.genes) == panel - set(fixture.CONTROLS)
    summary = counts.summary
    assert (summary.nuclei, summary.silent, summary.shapeless) == (40, 2, 0)
    assert summary.counted == sum(map(Counter.total, expected.values()))
    assert summary.homeless == 20 and summary.nuclear


@pytest.mark.parametrize(("rows", "keys"), [(300, 50), (70, 1), (300, 10**6)])
def test_reading_and_adding_up_in_small_steps_changes_nothing(
    rows: int, keys: int, breast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(breast, "TENX94")
    monkeypatch.setattr(hest_counts, "ROWS", rows)
    monkeypatch.setattr(hest_counts, "KEYS", keys)
    counts = count(files.transcripts, files.outlines)
    assert as_dicts(counts) == looped(breast, "TENX94")
    assert counts.summary.homeless == 20


def test_a_nucleus_lies_where_its_outline_is(breast: Path) -> None:
    for name in ("TENX94", "NCBI785"):
        files = files_of(breast, name)
        counts = count(files.transcripts, files.outlines)
        rows = pq.read_table(files.outlines).to_pylist()
        largest: dict[str | None, Any] = {}
        for row in rows:
            for piece in getattr(shape := shapely.from_wkb(row["geometry"]), "geoms", [shape]):
                if piece.area > getattr(largest.get(plain(row["__index_level_0__"])), "area", 0):
                    largest[plain(row["__index_level_0__"])] = piece
        assert len(rows) == len(largest) + 1  # one id has two rows
        for cell, x, y in zip(counts.cell.tolist(), counts.x, counts.y, strict=True):
            corners = np.array(largest[cell].exterior.coords)[:-1]
            # Regular polygons: the centroid is the mean of the corners.
            np.testing.assert_allclose((x, y), corners.mean(0), atol=1e-6)
        order = [plain(row["__index_level_0__"]) for row in rows[1:]]
        assert counts.cell.tolist() == [cell for cell in order if cell in set(counts.cell.tolist())]


def test_columns_of_the_table(breast: Path, table: Table) -> None:
    assert table.classes == () and (table.label == 0).all() and set(table.split) == {"all"}
    assert set(table.slide) == set(SLIDES["breast"]) and (table.slide == table.patient).all()
    # 40 nuclei: one outside the image, two without a counted transcript.
    assert np.unique(table.slide, return_counts=True)[1].tolist() == [37] * 5
    for name in SLIDES["breast"]:
        rows = table.slide == name
        stated = json.loads((breast / "metadata" / f"{name}.json").read_text())
        assert (table.mpp[rows] == stated["pixel_size_um_estimated"]).all()
        assert stated["pixel_size_um_embedded"] not in table.mpp[rows]
        assert set(table.image[rows]) == {str(breast / "wsis" / f"{name}.tif")}
    assert table.targets is not None
    assert table.targets.shape == (len(table), GENES) and table.targets.dtype == np.float32


def test_nuclei_are_dark_where_the_table_says(breast: Path, table: Table) -> None:
    for path in sorted(set(table.image.tolist())):
        grey = np.array(Image.open(path).convert("L"))
        rows = np.flatnonzero(table.image == path)
        assert grey[table.y[rows].astype(int), table.x[rows].astype(int)].max() < 110
    crops = table.crops(40, 0.25)
    assert crops.shape == (len(table), 40, 40, 3)
    assert crops[:, 18:22, 18:22].mean() < 110 < 160 < crops[:, :3, :3].mean()


def test_targets_are_the_logarithms_of_the_loops_counts(breast: Path, table: Table) -> None:
    assert table.targets is not None
    for name in ("NCBI783", "TENX95"):
        files = files_of(breast, name)
        counts, expected = count(files.transcripts, files.outlines), looped(breast, name)
        at = dict(zip(zip(counts.x, counts.y, strict=True), counts.cell.tolist(), strict=True))
        for k in np.flatnonzero(table.slide == name):
            cell = expected[at[(table.x[k], table.y[k])]]
            logs = [np.log1p(cell[gene]) for gene in table.target_names]
            np.testing.assert_allclose(table.targets[k], logs, rtol=1e-6)


def test_the_genes_are_those_that_vary_most_in_all_slides(breast: Path, table: Table) -> None:
    shared: set[str] = set(fixture.GENES)
    spreads: list[dict[str, float]] = []
    for name in SLIDES["breast"]:
        files = files_of(breast, name)
        panel = {plain(v) for v in pq.read_table(files.transcripts)["feature_name"].to_pylist()}
        shared &= panel  # type: ignore[arg-type]
        outside = plain(pq.read_table(files.outlines)["__index_level_0__"][1].as_py())
        cells = [c for cell, c in looped(breast, name).items() if cell != outside]
        spreads.append(
            {gene: float(np.var([np.log1p(c[gene]) for c in cells])) for gene in fixture.GENES}
        )
    assert GENES < len(shared) < len(fixture.GENES)
    ranks = dict.fromkeys(shared, 0.0)
    for spread in spreads:
        for gene in shared:
            above = sum(spread[other] > spread[gene] + 1e-9 for other in shared)
            equal = sum(abs(spread[other] - spread[gene]) <= 1e-9 for other in shared)
            ranks[gene] += above + (equal + 1) / 2
    assert list(table.target_names) == sorted(shared, key=lambda g: (ranks[g], g))[:GENES]


def test_the_draw_of_nuclei_follows_the_seed_and_nothing_else(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = BENCHMARK.load(own, BREAST)
    monkeypatch.setattr(module, "NUCLEI", 20)
    first, again = BENCHMARK.load(own, BREAST), BENCHMARK.load(own, BREAST)
    other = BENCHMARK.load(own, replace(BREAST, seed=1))
    assert len(first) == 100 and first.content_hash == again.content_hash
    assert first.content_hash != other.content_hash
    # Genes are chosen on all nuclei.
    assert first.target_names == other.target_names == whole.target_names
    drawn = set(zip(first.x.tolist(), first.y.tolist(), strict=True))
    assert len(drawn) == 100 and drawn <= set(zip(whole.x.tolist(), whole.y.tolist(), strict=True))
    (own / "wsis" / "NCBI783.tif").unlink()
    fewer = BENCHMARK.load(own, BREAST)
    assert drawn >= set(zip(fewer.x.tolist(), fewer.y.tolist(), strict=True))


def test_slides_of_one_patient_are_never_on_both_sides(tmp_path: Path) -> None:
    fixture.write(tmp_path, LUNG, nuclei=12)
    for request in (Request(task="lung"), Request(task="lung", protocol="paper")):
        table = BENCHMARK.load(tmp_path, request)
        folds = BENCHMARK.folds(table, request)
        names = [fold.name for fold in folds]
        assert names == ["NCBI856+NCBI857", "NCBI866", "NCBI875+NCBI876"]
        for fold in folds:
            held, seen = (set(table.slide[rows]) for rows in (fold.test, fold.train))
            assert held == set(fold.name.split("+")) and held | seen == set(LUNG)
            assert not any(set(group) & held and set(group) & seen for group in LINKED)
        tested = np.concatenate([fold.test for fold in folds])
        assert sorted(tested.tolist()) == list(range(len(table)))
        assert not shares_patients(table, folds)
        # The check itself sees a leak.
        row = np.flatnonzero(table.slide == "NCBI875")
        leak = Fold("leak", row, row[:0], np.flatnonzero(table.slide == "NCBI876"))
        assert shares_patients(table, [leak])


def test_patients_of_all_published_slides() -> None:
    linked = [name for group in LINKED for name in group]
    assert len(linked) == len(set(linked))
    lung = patients(list(SLIDES["lung"]))
    assert len(SLIDES["lung"]) == 20 and len(set(lung.values())) == 15
    assert lung["NCBI882"] == lung["NCBI881"] == "NCBI881+NCBI882"
    # The other slides of these patients are in no task.
    for task in ("bowel", "breast"):
        assert patients(list(SLIDES[task])) == {name: name for name in SLIDES[task]}
    assert set(SIZES) == {name for names in SLIDES.values() for name in names}


def test_without_overlaps_nucleus_the_whole_cell_counts(own: Path) -> None:
    files = files_of(own, "TENX95")
    fixture.edit(files.transcripts, lambda t: t.drop_columns(["overlaps_nucleus"]))
    assert as_dicts(count(files.transcripts, files.outlines)) == looped(
        own, "TENX95", nuclear=False
    )
    said = [s for s in BENCHMARK.check(own, BREAST) if "overlaps_nucleus" in s]
    assert len(said) == 1 and said[0].startswith("TENX95 has no column")


def test_rows_that_are_no_gene_and_categories_are_understood(own: Path) -> None:
    """Columns of newer software, and of frames with categories."""
    files = files_of(own, "TENX95")
    expected = looped(own, "TENX95")

    def newer(table: pa.Table) -> pa.Table:
        names = table["feature_name"].to_pylist()
        no_gene = [name == "ADDED_TENX95" for name in names]
        table = table.append_column("is_gene", pa.array([not value for value in no_gene]))
        for column in ("feature_name", "cell_id"):
            at = table.schema.names.index(column)
            table = table.set_column(at, column, table[column].dictionary_encode())
        return table

    fixture.edit(files.transcripts, newer)
    counts = count(files.transcripts, files.outlines)
    assert "ADDED_TENX95" not in counts.genes
    for counter in expected.values():
        counter.pop("ADDED_TENX95", None)
    assert as_dicts(counts) == expected
