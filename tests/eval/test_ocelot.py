"""OCELOT: folders in its exact format, against a reading of their own; every way to spoil one."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import plans
from eval.benchmarks import Request, find
from eval.benchmarks.ocelot import PAIRS, Ocelot
from lemon_muse.errors import UserError
from tests.fixtures import ocelot

BENCHMARK = Ocelot()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ocelot.write(tmp_path_factory.mktemp("ocelot") / "ocelot2023_v1.0.1")


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "ocelot")


def labels_of(root: Path, name: str) -> Path:
    return next(root.glob(f"annotations/*/cell/{name}.csv"))


def image_of(root: Path, name: str) -> Path:
    return next(root.glob(f"images/*/cell/{name}.jpg"))


def edit(root: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "metadata.json"
    found = json.loads(path.read_text())
    change(found["sample_pairs"][name])
    path.write_text(json.dumps(found))


def test_every_column_is_what_the_files_say(written: Path) -> None:
    table = BENCHMARK.load(written)
    wanted = []
    for name, pair in json.loads((written / "metadata.json").read_text())["sample_pairs"].items():
        with labels_of(written, name).open(encoding="utf-8-sig", newline="") as file:
            for x, y, label in csv.reader(file):
                kind = "tumour" if label == "2" else "background"
                place = (int(x) + 0.5, int(y) + 0.5, pair["cell"]["resized_mpp_x"], kind)
                about = (pair["slide_name"][:12], pair["slide_name"], pair["subset"])
                wanted.append((name, *place, *about, pair["organ"]))
    found = zip(
        [Path(path).stem for path in table.image],
        table.x.tolist(),
        table.y.tolist(),
        table.mpp.tolist(),
        [table.classes[label] for label in table.label],
        table.patient.tolist(),
        table.slide.tolist(),
        table.split.tolist(),
        table.groups["organ"].tolist(),
        strict=True,
    )
    assert sorted(found) == sorted(wanted) and len(wanted) > 500
    assert find("ocelot").load(written).content_hash == table.content_hash


def test_points_lie_on_nuclei_and_x_comes_first(written: Path) -> None:
    table = BENCHMARK.load(written)
    right, swapped = [], []
    for path in sorted(set(table.image.tolist())):
        grey = np.array(Image.open(path).convert("L")).astype(float)
        rows = table.image == path
        x, y = table.x[rows].astype(int), table.y[rows].astype(int)
        right.append(grey[y, x] - grey.mean())
        swapped.append(grey[x, y] - grey.mean())
    assert np.concatenate(right).mean() < -30
    assert np.concatenate(swapped).mean() > -10


def test_an_empty_csv_is_a_pair_without_cells(written: Path) -> None:
    table = BENCHMARK.load(written)
    assert not any(Path(path).stem == ocelot.EMPTY for path in table.image)
    # 001, 002, 004 and the empty 003.
    assert "train has 4 pairs; published are 400." in BENCHMARK.check(written)


def test_the_grand_challenge_form_holds_the_same(written: Path, tmp_path: Path) -> None:
    names = ("001", ocelot.EMPTY, "002")
    other = BENCHMARK.load(ocelot.write(tmp_path / "input", names=names, grand_challenge=True))
    table = BENCHMARK.load(written)
    table = table.take(np.flatnonzero([Path(path).stem == "001" for path in table.image]))
    assert {Path(path).name for path in other.image} == {"000.tif", "002.tif"}
    # A patch is drawn by its place in the list: the first is the same in both forms.
    other = other.take(np.flatnonzero([Path(path).stem == "000" for path in other.image]))
    for name in ("x", "y", "mpp", "label", "split", "slide", "patient"):
        np.testing.assert_array_equal(getattr(table, name), getattr(other, name))


def test_no_patient_of_test_is_trained_on_by_default(written: Path) -> None:
    table = BENCHMARK.load(written)
    official = BENCHMARK.folds(table, Request(protocol="paper"))
    assert plans.shares_patients(table, official)
    np.testing.assert_array_equal(official[0].train, np.flatnonzero(table.split == "train"))
    folds = BENCHMARK.folds(table)
    # 539 is of the patient of 001 and 002; 004 and 003, which is empty, may train.
    assert set(table.patient[folds[0].train]) == {"TCGA-BL-A0C8"}
    assert len(folds[0].train) == (table.patient == "TCGA-BL-A0C8").sum()
    assert not plans.shares_patients(table, folds)
    np.testing.assert_array_equal(folds[0].test, official[0].test)
    np.testing.assert_array_equal(folds[0].val, official[0].val)


def test_the_published_counts_leave_nothing_to_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PAIRS, "train", 4)
    monkeypatch.setitem(PAIRS, "val", 1)
    monkeypatch.setitem(PAIRS, "test", 2)
    edit(folder, "539", lambda pair: pair.update(slide_name="TCGA-ZZ-0001-01Z-00-DX1.A"))
    assert BENCHMARK.check(folder) == []


def test_a_partial_download_is_read_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_of(folder, "001").unlink()
    labels_of(folder, "538").unlink()
    shutil.copy(image_of(folder, "002"), folder / "images" / "val" / "cell" / "499.jpg")
    with labels_of(folder, "002").open("a") as file:
        file.write("1024,3,1\n5,-1,2\n")
    before = len(BENCHMARK.load(folder))
    assert "1 of 7 pairs have no image and are left out, the first is 001." in caplog.text
    said = BENCHMARK.check(folder)
    assert "1 of 7 pairs have no label file and are left out, the first is 538." in said
    assert (
        "2 labels of 1 pairs lie outside their image and are left out, the first pair is 002."
        in (said)
    )
    assert "1 images do not stand in metadata.json, the first is images/val/cell/499.jpg." in said
    assert before == sum(
        len(labels_of(folder, name).read_text().split()) - extra
        for name, extra in (("002", 2), ("004", 0), ("401", 0), ("539", 0))
    )


def test_an_mpp_that_does_not_follow_from_the_rectangle_is_said(folder: Path) -> None:
    def spoil(pair: dict[str, Any]) -> None:
        pair["cell"]["resized_mpp_x"] = pair["cell"]["resized_mpp_y"] = 0.25

    assert not any("does not follow" in said for said in BENCHMARK.check(folder))
    edit(folder, "401", spoil)
    said = BENCHMARK.check(folder)
    assert (
        "1 pairs have an mpp that does not follow from their rectangle in the slide, the first is "
        "401." in said
    )


def test_image_mpp_stands_in_only_where_a_pair_states_none(folder: Path) -> None:
    with pytest.raises(UserError, match="leave image_mpp out"):
        BENCHMARK.load(folder, Request(image_mpp=0.2))
    edit(folder, "401", lambda pair: pair["cell"].pop("resized_mpp_y"))
    with pytest.raises(UserError, match="for the pair 401; fetch it again, or give image_mpp="):
        BENCHMARK.load(folder)
    table = BENCHMARK.load(folder, Request(image_mpp=0.21))
    is_401 = np.array([Path(path).stem == "401" for path in table.image])
    assert (table.mpp[is_401] == 0.21).all() and (table.mpp[~is_401] < 0.2).all()


def test_the_paper_is_muse(written: Path) -> None:
    paper = BENCHMARK.paper("class")
    assert paper is not None and paper.align == "released"
    assert paper.probes == ("knn", "linear", "finetune") and "by slide" in paper.says
    with pytest.raises(UserError, match="ocelot has no task 'tissue'; use one of: class"):
        BENCHMARK.load(written, Request(task="tissue"))


def spoil_metadata(root: Path) -> None:
    path = root / "metadata.json"
    path.write_text(path.read_text()[:200])


def spoil_pairs(root: Path) -> None:
    (root / "metadata.json").write_text('{"pairs": {}}')


def spoil_slide(root: Path) -> None:
    edit(root, "001", lambda pair: pair.pop("slide_name"))


def spoil_subset(root: Path) -> None:
    edit(root, "001", lambda pair: pair.update(subset="training"))


def spoil_square(root: Path) -> None:
    edit(root, "001", lambda pair: pair["cell"].update(resized_mpp_y=0.25))


def spoil_nan(root: Path) -> None:
    edit(root, "001", lambda pair: pair["cell"].update(resized_mpp_x=float("nan")))


def spoil_header(root: Path) -> None:
    path = labels_of(root, "002")
    path.write_text("x,y,label\n" + path.read_text())


def spoil_columns(root: Path) -> None:
    labels_of(root, "002").write_text("1,2,1\n3,4\n")


def spoil_label(root: Path) -> None:
    labels_of(root, "002").write_text("1,2,0\n")


def spoil_size(root: Path) -> None:
    Image.new("RGB", (1024, 2048)).save(image_of(root, "002"))


def spoil_bytes(root: Path) -> None:
    image_of(root, "002").write_bytes(b"no jpeg")


def spoil_all_images(root: Path) -> None:
    for path in root.glob("images/*/cell/*.jpg"):
        path.unlink()


def spoil_all_labels(root: Path) -> None:
    for path in root.glob("annotations/*/cell/*.csv"):
        path.write_text("")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_metadata, "metadata.json is no JSON"),
        (spoil_pairs, "holds no sample_pairs"),
        (spoil_slide, "the pair 001 lacks slide_name, organ, subset or cell"),
        (spoil_subset, "the pair 001 has subset 'training'"),
        (spoil_square, "the pair 001 has pixels of 0.19427 x 0.25 µm"),
        (spoil_nan, "no cell.resized_mpp_x and _y for the pair 001"),
        (spoil_header, "002.csv, line 1, is 'x,y,label'"),
        (spoil_columns, "002.csv, line 2, is '3,4'"),
        (spoil_label, "002.csv, line 1, has label 0"),
        (spoil_size, "002.jpg has 1024 x 2048 px"),
        (spoil_bytes, "002.jpg does not decode"),
        (spoil_all_images, "none of the 7 pairs"),
        (spoil_all_labels, "every label file is empty"),
    ],
)
def test_a_spoilt_folder_is_one_clear_sentence(
    folder: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(folder)
    with pytest.raises(UserError) as caught:
        BENCHMARK.load(folder)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and message.endswith(".")


def test_the_wrong_folder_level_names_the_right_one(folder: Path) -> None:
    for given in (folder.parent, folder / "images"):
        with pytest.raises(UserError, match=f"give root={folder} instead"):
            BENCHMARK.load(given)
    with pytest.raises(UserError, match="there is no folder"):
        BENCHMARK.load(folder / "none")


def test_a_half_unpacked_set_says_what_is_missing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(folder / "annotations")
    with pytest.raises(UserError, match="has no annotations"):
        BENCHMARK.load(folder)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError):
        BENCHMARK.check(folder)
