"""The table in the hands of anndata, scanpy, squidpy and pyarrow; GeoJSON read back."""

import json
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from data_prep import nuclei_formats
from launch.embed import Embed, reading, run
from lemon_muse.encoder import load
from lemon_muse.errors import UserError
from lemon_muse.synthetic import write_slide
from tests.eval.standins import small_encoder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slide of 600 px in every form, with GeoJSON in both styles."""
    folder = tmp_path_factory.mktemp("made")
    encoder = small_encoder(folder / "encoder")
    slide = write_slide(folder / "s.svs", side=600, seed=4)
    forms = [".parquet", ".h5ad", ".zarr"]
    styles = {".parquet": "qupath", ".h5ad": "cellvit"}
    patch = pytest.MonkeyPatch()
    patch.setattr(reading, "PART", 50)
    for form in forms if _has("anndata") else forms[:1]:
        cfg = Embed(
            encoder=str(encoder), slide=slide, nuclei=slide.with_suffix(".geojson"),
            out=folder / f"a{form}", patient=r"(s)\.svs",
            geojson=folder / styles.get(form, "none"), geojson_style=styles.get(form, "qupath"),
        )  # fmt: skip
        run(cfg)
    patch.undo()
    return folder


def _has(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_parquet_has_one_type_a_column(made: Path) -> None:
    file = parquet.ParquetFile(made / "a.parquet")
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    assert kinds["feature"] == "fixed_size_list<element: float>[48]"
    assert kinds["id"] == "string" and kinds["x_px"] == "double" and kinds["score"] == "float"
    assert kinds["slide"] == "dictionary<values=string, indices=int32, ordered=0>"
    assert file.num_row_groups == -(-file.metadata.num_rows // 50) > 1
    frame = file.read().to_pandas()
    assert frame["type"].dtype == "category" and np.isfinite(np.stack(frame["feature"])).all()


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_anndata_gives_what_parquet_has(made: Path, form: str) -> None:
    anndata = pytest.importorskip("anndata")
    read = anndata.read_h5ad if form == "h5ad" else anndata.read_zarr
    data, table = read(made / f"a.{form}"), parquet.read_table(made / "a.parquet")
    flat = table["feature"].combine_chunks().flatten().to_numpy()
    assert data.X.dtype == np.float32
    np.testing.assert_array_equal(data.X, flat.reshape(len(table), 48))
    assert data.obs_names.tolist() == table["id"].to_pylist() and data.obs_names.is_unique
    for name in ("x_px", "y_px", "x_um", "y_um", "type", "patient", "slide"):
        assert data.obs[name].tolist() == table[name].to_pylist()
    for name in ("type", "patient", "slide"):
        assert data.obs[name].dtype == "category"
    spatial = data.obsm["spatial"]
    assert spatial.dtype == np.float64 and spatial.shape == (len(table), 2)
    np.testing.assert_array_equal(spatial[:, 1], table["y_px"].to_numpy())
    about, encoder = data.uns["lemon_muse"], load(made / "encoder")
    assert about["encoder"]["content_hash"] == encoder.content_hash
    np.testing.assert_allclose(about["encoder"]["std"], encoder.std)
    assert about["slides"]["s"]["mpp"] == 0.25 and about["slides"]["s"]["height"] == 600
    assert about["command"].startswith("lemon-muse embed encoder=")


def test_scanpy_takes_it_unchanged(made: Path) -> None:
    scanpy = pytest.importorskip("scanpy")
    pytest.importorskip("leidenalg")
    data = scanpy.read_h5ad(made / "a.h5ad")
    scanpy.pp.neighbors(data, n_neighbors=8, use_rep="X")
    scanpy.tl.leiden(data, flavor="igraph", n_iterations=2)
    assert data.obsp["connectivities"].shape == (data.n_obs, data.n_obs)
    assert data.obs["leiden"].nunique() > 1


def test_squidpy_takes_it_unchanged(made: Path) -> None:
    squidpy = pytest.importorskip("squidpy")
    anndata = pytest.importorskip("anndata")
    data = anndata.read_h5ad(made / "a.h5ad")
    squidpy.gr.spatial_neighbors_knn(data, n_neighs=6)
    apart = data.obsp["spatial_distances"]
    row = data.obsm["spatial"]
    nearest = np.sort(np.linalg.norm(row - row[0], axis=1))[1:7]
    np.testing.assert_allclose(np.sort(apart[0].data), nearest, rtol=1e-6)


def test_without_anndata_it_says_which_extra(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anndata", None)
    cfg = Embed(encoder=str(made / "encoder"), slide=made / "s.svs", out=made / "b.h5ad")
    with pytest.raises(UserError, match=r"pip install lemon-muse\[embed\]"):
        run(cfg)
    assert not (made / "b.h5ad").exists() and not (made / "b.h5ad.parts").exists()


@pytest.mark.parametrize("style", ["qupath", "cellvit"])
def test_geojson_is_read_back_with_its_places_and_types(made: Path, style: str) -> None:
    file = made / style / "s.geojson"
    if not file.is_file():
        pytest.skip("made with anndata only")
    assert nuclei_formats.detect(file) == style
    facts = nuclei_formats.SlideFacts(600, 600, 0.25)
    found = nuclei_formats.read(file, slide=facts)
    table = parquet.read_table(made / "a.parquet")
    names = ("x_px", "y_px", "type")
    wanted = sorted(zip(*(table[name].to_pylist() for name in names), strict=True))
    given = sorted(zip(found.x.tolist(), found.y.tolist(), found.type.tolist(), strict=True))
    assert len(given) == len(wanted) and [g[2] for g in given] == [w[2] for w in wanted]
    np.testing.assert_allclose([g[:2] for g in given], [w[:2] for w in wanted], atol=0.006)


def test_geojson_has_what_qupath_reads(made: Path) -> None:
    """The members that QuPath's reader of GeoJSON looks at (QuPathTypeAdapters.java)."""
    tree = json.loads((made / "qupath" / "s.geojson").read_text(encoding="utf-8"))
    assert tree["type"] == "FeatureCollection"
    colours = {}
    for feature in tree["features"]:
        assert feature["type"] == "Feature" and uuid.UUID(feature["id"])
        assert feature["geometry"]["type"] == "Point"
        assert feature["properties"]["objectType"] == "detection"
        kind = feature["properties"]["classification"]
        assert all(0 <= value < 256 for value in kind["color"]) and len(kind["color"]) == 3
        colours.setdefault(kind["name"], set()).add(tuple(kind["color"]))
    assert len(colours) > 1 and all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(colours)
    assert len({feature["id"] for feature in tree["features"]}) == len(tree["features"])
