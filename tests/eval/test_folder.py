"""The folder benchmark: what the generator writes, and folders that do not fit."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.benchmarks.folder import Folder
from lemon_muse.errors import UserError
from lemon_muse.synthetic import CLASSES, write_images

BENCHMARK = Folder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three slides of 64 x 48 px in the generator's format, written by hand."""
    rows = []
    for number, split in enumerate(("train", "val", "test")):
        name = f"slide{number}"
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "nuclei").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (200, 150, 200)).save(tmp_path / "images" / f"{name}.png")
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": [10.25 + i, 40.5]},
                "properties": {"classification": {"name": CLASSES[i]}},
            }
            for i in range(4)
        ]
        nuclei = {"type": "FeatureCollection", "features": features}
        (tmp_path / "nuclei" / f"{name}.geojson").write_text(json.dumps(nuclei))
        paths = (f"images/{name}.png", f"nuclei/{name}.geojson")
        rows.append((name, f"p{number}", *paths, "0.25", split))
    with (tmp_path / "slides.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("slide", "patient", "image", "nuclei", "mpp", "split"))
        writer.writerows(rows)
    return tmp_path


def test_reads_what_the_generator_writes(tmp_path: Path) -> None:
    write_images(tmp_path, slides=3, side=320, seed=1)
    table = BENCHMARK.load(tmp_path)
    assert table.classes == tuple(sorted(table.classes)) and set(table.classes) <= set(CLASSES)
    assert set(table.split.tolist()) == {"train", "val", "test"}
    assert table.patients_across() == []
    total = 0
    for path in (tmp_path / "nuclei").glob("*.geojson"):
        features = json.loads(path.read_text())["features"]
        total += len(features)
        rows = np.flatnonzero(table.slide == path.stem)
        for row, feature in zip(rows, features, strict=True):
            assert [table.x[row], table.y[row]] == feature["geometry"]["coordinates"]
            name = feature["properties"]["classification"]["name"]
            assert table.classes[table.label[row]] == name
    assert total == len(table) > 20
    crops = table.crops(40, 0.25)
    # Nuclei are darker than the tissue around them.
    middle = crops[:, 18:22, 18:22].mean()
    assert middle < crops.mean() - 10


def test_columns_and_check(folder: Path) -> None:
    table = BENCHMARK.load(folder)
    assert len(table) == 12
    assert table.x[:4].tolist() == [10.25, 11.25, 12.25, 13.25]
    assert (table.y == 40.5).all() and (table.mpp == 0.25).all()
    names = [table.classes[i] for i in table.label[:4]]
    assert names == list(CLASSES[:4]) and table.classes == tuple(sorted(CLASSES[:4]))
    assert BENCHMARK.check(folder) == []


def test_check_names_a_class_that_a_split_lacks(folder: Path) -> None:
    path = folder / "nuclei" / "slide0.geojson"
    path.write_text(path.read_text().replace(CLASSES[0], CLASSES[1]))
    said = BENCHMARK.check(folder)
    assert len(said) == 1 and said[0].endswith(f"has no {CLASSES[0]}.")


def test_nuclei_without_a_class_are_left_out(folder: Path) -> None:
    path = folder / "nuclei" / "slide0.geojson"
    collection = json.loads(path.read_text())
    del collection["features"][0]["properties"]["classification"]
    path.write_text(json.dumps(collection))
    assert len(BENCHMARK.load(folder)) == 11


def test_one_class_is_not_enough(folder: Path) -> None:
    for path in (folder / "nuclei").glob("*.geojson"):
        text = path.read_text()
        for name in CLASSES:
            text = text.replace(name, "cell")
        path.write_text(text)
    with pytest.raises(UserError, match=r"have 1 class\(es\), but a probe needs two"):
        BENCHMARK.load(folder)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("slides.csv", "0.25", "", "has mpp ''"),
        ("slides.csv", "0.25", "0", "has mpp '0'"),
        ("slides.csv", "val", "dev", "has split 'dev'"),
        ("slides.csv", "patient", "person", "must have the columns"),
        ("slides.csv", "images/slide0.png", "images/none.png", "is missing"),
        ("nuclei/slide0.geojson", "10.25", "64.0", "outside its image of 64 x 48 px"),
        ("nuclei/slide0.geojson", '"Point"', '"Polygon"', "is not a GeoJSON"),
        ("nuclei/slide0.geojson", '{"type"', '{"type', "is not a GeoJSON"),
    ],
)
def test_bad_files_are_one_sentence(
    folder: Path, file: str, old: str, new: str, words: str
) -> None:
    replace(folder / file, old, new)
    with pytest.raises(UserError) as caught:
        BENCHMARK.load(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_wrong_folder_level_names_the_right_one(folder: Path) -> None:
    with pytest.raises(UserError, match=f"give {folder} instead"):
        BENCHMARK.load(folder / "images")
    with pytest.raises(UserError, match=r"there is no .*slides\.csv"):
        BENCHMARK.load(folder.parent / "elsewhere")
