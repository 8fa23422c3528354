"""The atlas: what the page holds against the file, the slide and scikit-learn; bad input."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
from sklearn.neighbors import NearestNeighbors

from eval.atlas import Atlas, project, run
from eval.atlas.columns import column, columns, span
from eval.atlas.source import draw, read
from eval.atlas.thumbs import Cells, cells
from lemon_muse.config import load
from lemon_muse.errors import UserError
from tests.eval.atlas_material import MPP, cell, opened, values, write_embedded, write_tissue

N = 600


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return write_tissue(tmp_path_factory.mktemp("tissue"), slides=2, side=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tissue: list[dict[str, Any]]) -> Path:
    path = tmp_path_factory.mktemp("embedded") / "both.h5ad"
    write_embedded(path, tissue, nuclei=N)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("atlas")
    return opened(run(Atlas(data=data, out=out, projection="pca")))


def test_holds_every_nucleus_with_its_facts(page: dict[str, Any], data: Path) -> None:
    obs = anndata.read_h5ad(data).obs.loc[page["ids"]]
    assert page["meta"]["n"] == N and len(set(page["ids"])) == N
    for name in ("type", "slide", "patient"):
        assert (values(page, name) == obs[name].astype(str)).all()
    for name in ("score", "area", "x_px", "y_px", "x_um", "y_um"):
        np.testing.assert_array_equal(values(page, name), obs[name].to_numpy(np.float32))
    offered = [c["name"] for c in page["meta"]["columns"] if c["menu"]]
    assert offered == ["type", "slide", "patient", "cluster", "score", "area"]


def test_neighbours_are_those_of_scikit_learn(page: dict[str, Any], data: Path) -> None:
    features = anndata.read_h5ad(data)[page["ids"]].X
    away, rows = NearestNeighbors(n_neighbors=13, metric="cosine").fit(features).kneighbors()
    np.testing.assert_array_equal(page["near"], rows[:, :12])
    said = page["cosine"].reshape(N, 12) / 32767.5 - 1
    np.testing.assert_allclose(said, 1 - away[:, :12], atol=2e-4)


def test_thumbnails_are_the_windows_of_the_slide(
    page: dict[str, Any], tissue: list[dict[str, Any]]
) -> None:
    assert page["there"].all() and page["meta"]["cell"] == 40
    padded = {
        f"tissue{s}": np.pad(tifffile.imread(t["path"], key=0), ((64, 64), (64, 64), (0, 0)))
        for s, t in enumerate(tissue)
    }
    slides, x, y = (values(page, name) for name in ("slide", "x_px", "y_px"))
    inner = [i for i in range(N) if min(x[i], y[i]) > 24 and max(x[i], y[i]) < 512 - 24]
    assert len(inner) > 300
    for i in inner:
        left, top = int(np.floor(x[i] + 0.5)) + 44, int(np.floor(y[i] + 0.5)) + 44
        wanted = padded[slides[i]][top : top + 40, left : left + 40].astype(int)
        # JPEG moves single values; a shift by one pixel would move the mean by more.
        assert np.abs(cell(page, i) - wanted).mean() < 3


def test_clusters_are_the_kinds_that_lie_apart(page: dict[str, Any]) -> None:
    table = pd.crosstab(values(page, "cluster"), values(page, "type")).to_numpy()
    assert table.max(1).sum() / N > 0.95  # purity
    counts = table.sum(1)
    assert len(counts) >= 4 and (np.diff(counts) <= 0).all()  # numbered by size


def test_map_is_the_principal_plane(page: dict[str, Any], data: Path) -> None:
    features = anndata.read_h5ad(data)[page["ids"]].X
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    left, size, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    plane = left[:, :2] * size[:2]
    # One scale for both axes, whatever the signs: the same distances between all.
    a, b = (np.linalg.norm(p - p[:1], axis=1) for p in (plane, page["xy"]))
    assert np.corrcoef(a, b)[0, 1] > 0.99999


def test_same_words_same_bytes(tmp_path: Path, data: Path) -> None:
    texts = [
        run(Atlas(data=data, out=tmp_path / str(i), projection="pca", nuclei=200, seed=seed))
        for i, seed in enumerate((3, 3, 4))
    ]
    one, two, three = (path.read_bytes() for path in texts)
    assert one == two != three


def test_draws_the_same_share_of_every_slide(tmp_path: Path, data: Path) -> None:
    slide = np.repeat(["a", "b", "c", "d"], [4000, 1000, 997, 3])
    rows = draw(slide, 600, seed=0)
    _, counts = np.unique(slide[rows], return_counts=True)
    assert len(set(rows)) == 600 and (np.abs(counts - [400, 100, 99.7, 1]) <= 1).all()
    assert len(draw(np.array([f"s{i}" for i in range(50)]), 20, seed=0)) == 20
    page = opened(run(Atlas(data=data, out=tmp_path, projection="pca", nuclei=100)))
    assert page["meta"]["n"] == 100 and f"100 of {N} nuclei" in page["text"]


@pytest.mark.slow
def test_umap_keeps_kinds_together_and_repeats() -> None:
    pytest.importorskip("umap")
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 4200)
    features = rng.normal(size=(4, 12))[kind] * 2 + rng.normal(size=(4200, 12)) * 0.5
    parts = project.components(features.astype(np.float32))
    graph = project.neighbours(features.astype(np.float32), 15)
    one = project.place(parts, graph, method="umap", seed=5)
    near = NearestNeighbors(n_neighbors=10).fit(one).kneighbors(return_distance=False)
    assert (kind[near] == kind[:, None]).mean() > 0.97
    assert one.min() > -0.5 and one.max() < 1.5
    few = parts[:200], project.neighbours(parts[:200], 15)
    again = [project.place(*few, method="umap", seed=seed) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any()


def test_tsne_keeps_kinds_together(tmp_path: Path, data: Path) -> None:
    page = opened(run(Atlas(data=data, out=tmp_path, projection="tsne", nuclei=300)))
    near = NearestNeighbors(n_neighbors=5).fit(page["xy"]).kneighbors(return_distance=False)
    kind = values(page, "type")
    assert (kind[near] == kind[:, None]).mean() > 0.9


def test_a_folder_of_files_is_one_map(tmp_path: Path, tissue: list[dict[str, Any]]) -> None:
    for number in (0, 1):
        one = [{**tissue[number]}]
        made = write_embedded(tmp_path / f"{number}.h5ad", one, nuclei=120, seed=number)
        made.obs["slide"] = f"slide {number}"
        made.uns["lemon_muse"]["slides"] = {
            f"slide {number}": made.uns["lemon_muse"]["slides"]["tissue0"]
        }
        made.write_h5ad(tmp_path / f"{number}.h5ad")
    page = opened(run(Atlas(data=tmp_path, out=tmp_path / "page", projection="pca")))
    # Both files number their nuclei alike.
    assert page["meta"]["n"] == 240 and "slide 0/n000000" in page["ids"]
    assert page["there"].all()
    write_embedded(tmp_path / "2.h5ad", tissue, nuclei=50, window=64)
    with pytest.raises(UserError, match="another encoder"):
        run(Atlas(data=tmp_path, out=tmp_path / "page"))


def test_many_nuclei_lie_beside_the_page(tmp_path: Path, tissue: list[dict[str, Any]]) -> None:
    made = write_embedded(tmp_path / "many.h5ad", tissue, nuclei=10_050, dim=8)
    page = opened(run(Atlas(data=tmp_path / "many.h5ad", out=tmp_path / "p", projection="pca")))
    assert page["meta"]["n"] == 10_050 and "data:image" not in page["text"]
    assert sorted(p.name for p in (tmp_path / "p/sprites").iterdir()) == [
        f"{i:03d}.jpg" for i in range(10)
    ]
    assert cell(page, 10_049).std() > 5  # the last cell of a sheet that is not full
    # A smaller atlas in the same folder leaves nothing of the larger one.
    made[:100].write_h5ad(tmp_path / "many.h5ad")
    run(Atlas(data=tmp_path / "many.h5ad", out=tmp_path / "p", projection="pca"))
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["index.html"]


def test_slides_that_are_gone_are_said(tmp_path: Path, tissue: list[dict[str, Any]]) -> None:
    moved = [{**tissue[0], "path": tmp_path / "old" / Path(tissue[0]["path"]).name}, tissue[1]]
    write_embedded(tmp_path / "e.h5ad", moved, nuclei=200)
    page = opened(run(Atlas(data=tmp_path / "e.h5ad", out=tmp_path / "p", projection="pca")))
    assert ((page["there"] == 1) == (values(page, "slide") == "tissue1")).all()
    assert "No thumbnails of tissue0" in page["text"] and str(tmp_path) not in page["text"]
    here = Path(tissue[0]["path"]).parent
    words = Atlas(data=tmp_path / "e.h5ad", out=tmp_path / "p", projection="pca", slides=here)
    page = opened(run(words))
    assert page["there"].all() and "No thumbnails" not in page["text"]


def test_colours_from_genes_and_features(tmp_path: Path, data: Path) -> None:
    words = [f"data={data}", f"out={tmp_path}", "projection=pca", "colour=EPCAM,cluster,3"]
    page = opened(run(load(Atlas, words)))
    file = anndata.read_h5ad(data)[page["ids"]]
    np.testing.assert_array_equal(values(page, "EPCAM"), np.float32(file.obsm["genes"]["EPCAM"]))
    np.testing.assert_array_equal(values(page, "3"), file.X[:, 3])
    offered = [c["name"] for c in page["meta"]["columns"] if c["menu"]]
    assert offered == ["EPCAM", "cluster", "3"]
    with pytest.raises(UserError, match="did you mean 'CD3E'"):
        run(Atlas(data=data, out=tmp_path, colour=("CD3",)))


def test_columns_of_every_kind() -> None:
    words = column("kind", pd.Series(["b", None, "a", "b", ""]), menu=True)
    assert words.labels == ("b", "a") and words.values.tolist() == [0, -1, 1, 0, -1]
    numbered = column("leiden", pd.Series(["10", "9", "9", "0"]), menu=True)
    assert numbered.labels == ("0", "9", "10")
    flags = column("mitotic", pd.Series([True, False, False]), menu=True)
    assert flags.labels == ("False", "True")
    numbers = column("age", pd.Series([1, None, 3], dtype="Int64"), menu=True)
    assert numbers.labels is None and np.isnan(numbers.values[1])
    many = column("site", pd.Series([f"s{i}" for i in range(100)]), menu=True)
    assert many.shown == 39 and len(many.labels or ()) == 100
    obs = pd.DataFrame({"slide": ["a"] * 99 + ["b"], "note": [f"{i}" for i in range(100)]})
    assert [c.name for c in columns(obs, np.zeros(100, int), ()) if c.menu] == ["slide", "cluster"]
    empty = pd.DataFrame({"type": [""] * 9, "slide": ["a"] * 9})
    assert [c.menu for c in columns(empty, None, ())] == [False, True]
    assert span(np.array([2.0, 2.0, np.nan])) == (2.0, 3.0)


def test_thumbnails_are_as_large_as_the_window() -> None:
    crop = {"kind": "crop", "window": 40, "mpp": 0.25}
    assert cells(crop, 0) == Cells(40, 0.25)
    assert cells(crop, 20) == Cells(40, 0.5)
    wide = cells({"window": 224, "mpp": np.float64(0.5)}, 0)
    assert wide.size == 48 and wide.size * wide.mpp == pytest.approx(112)
    dense = cells({"kind": "dense", "window": 512, "mpp": 0.5}, 0)
    assert dense.size * dense.mpp == pytest.approx(10) and cells({}, 0) == dense


def test_z_order_keeps_neighbours_together() -> None:
    xy = np.random.default_rng(0).random((2000, 2))
    walked = xy[project.along_curve(xy)]
    step = np.linalg.norm(np.diff(walked, axis=0), axis=1).mean()
    assert step < 0.1 * np.linalg.norm(np.diff(xy, axis=0), axis=1).mean()


def broken(path: Path, data: Path, what: str) -> None:
    file = anndata.read_h5ad(data)
    if what == "no slide":
        del file.obs["slide"]
    elif what == "few":
        file = file[:5].copy()
    elif what == "not finite":
        file.X[7, 0] = np.nan
    elif what == "all the same":
        file.X[:] = 1
    file.write_h5ad(path)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no slide", "obs lacks slide"),
        ("few", "needs 20"),
        ("not finite", "not finite"),
        ("all the same", "collapsed"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, data: Path, what: str, says: str) -> None:
    broken(tmp_path / "bad.h5ad", data, what)
    with pytest.raises(UserError, match=says):
        run(Atlas(data=tmp_path / "bad.h5ad", out=tmp_path / "page"))
    assert not (tmp_path / "page" / "index.html").exists()


def test_wrong_words_are_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        run(Atlas(data=tmp_path / "none.h5ad"))
    with pytest.raises(UserError, match=r"holds no \.h5ad"):
        run(Atlas(data=tmp_path, out=tmp_path / "page"))
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(UserError, match=r"no readable \.h5ad"):
        run(Atlas(data=tmp_path / "text.h5ad", out=tmp_path / "page"))
    with pytest.raises(UserError, match="is a file"):
        run(Atlas(data=data, out=tmp_path / "text.h5ad"))
    flat = np.zeros((project.TSNE_MOST + 1, 2), np.float32)
    with pytest.raises(UserError, match="for up to 20000"):
        project.place(flat, (flat, flat), method="tsne", seed=0)


def test_an_own_cluster_column_is_kept(tmp_path: Path, data: Path) -> None:
    file = anndata.read_h5ad(data)
    file.obs["cluster"] = np.arange(N) % 3  # numbers, but still names of clusters
    file.write_h5ad(tmp_path / "e.h5ad")
    page = opened(run(Atlas(data=tmp_path / "e.h5ad", out=tmp_path / "p", projection="pca")))
    assert (values(page, "cluster") == file.obs.loc[page["ids"], "cluster"].astype(str)).all()


def test_reads_only_what_is_drawn(data: Path) -> None:
    found = read(data, nuclei=50, wanted=(), seed=1)
    file = anndata.read_h5ad(data)
    np.testing.assert_array_equal(found.features, file[found.ids].X)
    assert found.total == N and found.encoder["window"] == 40 and found.encoder["mpp"] == MPP
