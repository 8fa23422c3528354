"""PUMA: folders in its exact format against shapely, and every way to spoil one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from PIL import Image

from eval import plans
from eval.benchmarks import Request, find
from eval.benchmarks.puma import PUBLISHED, TASKS, Puma
from eval.benchmarks.puma.files import NAMES, centres
from eval.benchmarks.puma.split import SPLIT_OF
from lemon_muse.errors import UserError
from tests.fixtures import puma

BENCHMARK = Puma()
ASK = Request(image_mpp=puma.MPP)
PAPER = Request(protocol="paper")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return puma.write(tmp_path_factory.mktemp("puma") / "PUMA")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "PUMA")


def geojson_of(root: Path, name: str) -> Path:
    return root / "01_training_dataset_geojson_nuclei" / f"{name}_nuclei.geojson"


def features_of(root: Path, name: str) -> list[dict[str, Any]]:
    found: dict[str, Any] = json.loads(geojson_of(root, name).read_text(encoding="utf-8-sig"))
    return list(found["features"])


def rows_of(root: Path, name: str, *, holes: bool) -> list[tuple[float, float, str]]:
    """Nuclei by shapely: parts of shapes, or with `holes` all rings, cut off to whole px."""
    rows = []
    for feature in features_of(root, name):
        shape = shapely.geometry.shape(feature["geometry"])
        rings = []
        for part in shapely.get_parts(shape):
            rings += [part.exterior, *(part.interiors if holes else [])]
        for ring in rings:
            corners = np.array(ring.coords)
            polygon = shapely.Polygon(np.trunc(corners) if holes else corners)
            middle = np.array(polygon.centroid.coords[0])
            if polygon.area == 0:
                # Shapely adds a corner to so short a ring.
                raw = np.array(feature["geometry"]["coordinates"][0])
                middle = (np.trunc(raw) if holes else raw).mean(0)
            rows.append(
                (*middle.round(6).tolist(), feature["properties"]["classification"]["name"])
            )
    return rows


@pytest.mark.parametrize("request_", [ASK, PAPER], ids=["default", "paper"])
def test_every_nucleus_is_where_shapely_has_it(written: Path, request_: Request) -> None:
    holes = request_.protocol == "paper"
    task = Request(task="all10", protocol=request_.protocol, image_mpp=request_.image_mpp)
    table = BENCHMARK.load(written, task)
    for name in puma.NAMES:
        wanted = [(x, y, plain(kind)) for x, y, kind in rows_of(written, name, holes=holes)]
        rows = np.flatnonzero(table.slide == name)
        found = [
            (round(x, 6), round(y, 6), table.classes[label])
            for x, y, label in zip(table.x[rows], table.y[rows], table.label[rows], strict=True)
        ]
        for a, b in zip(found, wanted, strict=True):
            assert a[2] == b[2]
            np.testing.assert_allclose(a[:2], b[:2], atol=2e-5)
    assert table.patients_across() == []


def plain(name: str) -> str:
    return name.replace("nuclei_", "").replace("tumor", "tumour")


def test_a_hole_is_a_nucleus_in_the_paper_alone(written: Path) -> None:
    default, paper = BENCHMARK.load(written, ASK), BENCHMARK.load(written, PAPER)
    # One feature with a hole in each of the five ROIs that have nuclei.
    assert len(paper) == len(default) + 5
    features = sum(len(features_of(written, name)) for name in puma.NAMES)
    assert len(default) == features + 5  # one MultiPolygon of two parts in each


def test_points_lie_on_nuclei(written: Path) -> None:
    table = BENCHMARK.load(written, ASK)
    dark = []
    for path in sorted(set(table.image.tolist())):
        grey = np.array(Image.open(path).convert("L")).astype(float)
        rows = table.image == path
        dark.append(grey[table.y[rows].astype(int), table.x[rows].astype(int)] - grey.mean())
    assert np.concatenate(dark).mean() < -30


def test_the_three_class_maps(written: Path) -> None:
    tils = {"nuclei_lymphocyte": "til", "nuclei_plasma_cell": "til"}
    both = {
        "muse": {"nuclei_tumor": "tumour", "nuclei_lymphocyte": "lymphocyte"},
        "track1": {"nuclei_tumor": "tumour", **tils},
    }
    kinds = [
        kind for name in sorted(puma.NAMES) for _, _, kind in rows_of(written, name, holes=False)
    ]
    assert set(kinds) == set(NAMES)
    for task, names in both.items():
        table = BENCHMARK.load(written, Request(task=task, image_mpp=0.2266))
        found = [table.classes[label] for label in table.label]
        assert found == [names.get(kind, "other") for kind in kinds]
    assert BENCHMARK.tasks == ("muse", "track1", "all10") == tuple(TASKS)
    assert sum(PUBLISHED[1]) == pytest.approx(100, abs=0.02)


def test_the_split_is_by_name(written: Path) -> None:
    table = BENCHMARK.load(written, ASK)
    found = {
        split: set(table.slide[table.split == split].tolist()) for split in ("train", "val", "test")
    }
    assert found == {
        "train": set(puma.TRAIN) - {puma.EMPTY},
        "val": set(puma.VAL),
        "test": set(puma.TEST),
    }
    assert set(table.groups["tissue"]) == {"metastatic", "primary"}
    for split in ("val", "test"):
        names = [name for name, which in SPLIT_OF.items() if which == split]
        assert len(names) == 42 and sum("_primary_" in name for name in names) == 21
    fold = BENCHMARK.folds(table)[0]
    assert not plans.shares_patients(table, [fold]) and len(fold.val) and len(fold.test)


def test_the_mpp_is_never_guessed(written: Path) -> None:
    with pytest.raises(UserError, match=r"0\.2263 to 0\.2269 .* 0\.25.* give image_mpp="):
        BENCHMARK.load(written)
    assert (BENCHMARK.load(written, ASK).mpp == puma.MPP).all()
    assert (BENCHMARK.load(written, PAPER).mpp == 0.25).all()
    both = Request(protocol="paper", image_mpp=0.2266)
    assert (BENCHMARK.load(written, both).mpp == 0.2266).all()


def test_four_channels_and_both_suffixes_are_read(written: Path) -> None:
    table = BENCHMARK.load(written, ASK)
    for name in (puma.FOUR_CHANNELS, puma.LONG_SUFFIX):
        rows = np.flatnonzero(table.slide == name)[:3]
        crops = table.crops(40, 0.25, rows)
        assert crops.shape == (3, 40, 40, 3) and crops.std() > 10


def test_muse_is_the_paper_of_its_own_map_alone() -> None:
    paper = find("puma").paper("muse")
    assert paper is not None and paper.align == "released"
    assert "every ring" in paper.says and "0.25" in paper.says
    assert BENCHMARK.paper("track1") is None and BENCHMARK.paper("all10") is None


def test_a_partial_download_is_read_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = len(BENCHMARK.load(folder, ASK))
    geojson_of(folder, puma.VAL[0]).unlink()
    (folder / "01_training_dataset_tif_ROIs" / f"{puma.TEST[1]}.tif").unlink()
    lost = len(rows_of(folder, puma.TEST[1], holes=False))
    assert len(BENCHMARK.load(folder, ASK)) < whole - lost
    assert f"the first is {puma.TEST[1]}." in caplog.text
    said = BENCHMARK.check(folder)
    assert "4 ROIs are here; published are 205 or 206, by the version." in said
    assert (
        f"1 of 6 ROIs have no geojson file of nuclei and are left out, the first is {puma.VAL[0]}."
        in said
    )
    assert any(s.startswith("41 of MUSE's 42 val ROIs are missing") for s in said)
    assert any("patients are not published" in s for s in said)
    assert any("0.2263 to 0.2269" in s for s in said)
    assert not any("0.2263 to 0.2269" in s for s in BENCHMARK.check(folder, ASK))


def test_nuclei_outside_the_image_are_left_out_and_said(folder: Path) -> None:
    path = geojson_of(folder, puma.TEST[0])
    found = json.loads(path.read_text())
    found["features"][0]["geometry"] = {
        "type": "Polygon",
        "coordinates": [[[1020, 5], [1040, 5], [1040, 9], [1020, 9], [1020, 5]]],
    }
    path.write_text(json.dumps(found))
    table = BENCHMARK.load(folder, ASK)
    assert table.x.max() < 1024
    assert any(
        s.startswith("1 nuclei of 1 ROIs have their centre outside")
        for s in BENCHMARK.check(folder)
    )


def test_centres_of_open_closed_and_flat_rings() -> None:
    square = np.array([[1e4, 2], [1e4 + 4, 2], [1e4 + 4, 6], [1e4, 6.0]])
    line = np.array([[0.1, 0.1], [0.3, 0.3], [0.2, 0.2]])
    found = centres([square, np.concatenate([square, square[:1]]), square[::-1], line, line[:1]])
    np.testing.assert_allclose(found[:3], [[1e4 + 2, 4]] * 3, rtol=1e-12)
    np.testing.assert_allclose(found[3:], [[0.2, 0.2], [0.1, 0.1]])
    assert centres([]).shape == (0, 2)


def change(root: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = geojson_of(root, puma.TEST[0])
    found = json.loads(path.read_text())
    edit(found["features"][1])
    path.write_text(json.dumps(found))


def spoil_truncated(root: Path) -> None:
    path = geojson_of(root, puma.TEST[0])
    path.write_text(path.read_text()[:1000])


def spoil_list(root: Path) -> None:
    geojson_of(root, puma.TEST[0]).write_text("[]")


def spoil_class(root: Path) -> None:
    change(root, lambda f: f["properties"]["classification"].update(name="nuclei_tumour"))


def spoil_no_class(root: Path) -> None:
    change(root, lambda f: f["properties"].pop("classification"))


def spoil_point(root: Path) -> None:
    change(root, lambda f: f.update(geometry={"type": "Point", "coordinates": [1, 2]}))


def spoil_empty(root: Path) -> None:
    change(root, lambda f: f["geometry"].update(coordinates=[[]]))


def spoil_nan(root: Path) -> None:
    change(root, lambda f: f["geometry"].update(coordinates=[[[float("nan"), 1]] * 4]))


def spoil_image(root: Path) -> None:
    (root / "01_training_dataset_tif_ROIs" / f"{puma.TEST[1]}.tif").write_bytes(b"no tif")


def spoil_all_images(root: Path) -> None:
    for path in (root / "01_training_dataset_tif_ROIs").iterdir():
        path.unlink()


def spoil_all_nuclei(root: Path) -> None:
    for path in (root / "01_training_dataset_geojson_nuclei").iterdir():
        path.write_text('{"type": "FeatureCollection", "features": []}')


def spoil_folder(root: Path) -> None:
    (root / "01_training_dataset_geojson_nuclei").rename(root / "nuclei")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_truncated, "is no GeoJSON with features"),
        (spoil_list, "is no GeoJSON with features"),
        (spoil_class, "feature 2, has no class of PUMA"),
        (spoil_no_class, "feature 2, has no class of PUMA"),
        (spoil_point, "feature 2, is no Polygon or MultiPolygon"),
        (spoil_empty, "feature 2, is no Polygon or MultiPolygon"),
        (spoil_nan, "feature 2, is no Polygon or MultiPolygon with finite"),
        (spoil_image, f"{puma.TEST[1]}.tif cannot be read"),
        (spoil_all_images, "has no ROI with both its image and its nuclei"),
        (spoil_all_nuclei, "every geojson file is empty"),
        (spoil_folder, "has no 01_training_dataset_geojson_nuclei"),
    ],
)
def test_a_spoilt_folder_is_one_clear_sentence(
    folder: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(folder)
    with pytest.raises(UserError) as caught:
        BENCHMARK.load(folder, ASK)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and message.endswith(".")


def test_the_wrong_folder_level_names_the_right_one(folder: Path) -> None:
    for given in (folder.parent, folder / "01_training_dataset_tif_ROIs"):
        with pytest.raises(UserError, match=f"give root={folder} instead"):
            BENCHMARK.load(given, ASK)
