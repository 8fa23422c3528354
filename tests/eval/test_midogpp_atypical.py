"""Atypical against normal mitotic figures: MIDOG25, AMi-Br, and folders of crops."""

import csv
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import plans
from eval.benchmarks import Request
from eval.benchmarks.midogpp import MidogPP
from lemon_muse.data.table import Table
from tests.fixtures import midogpp

BENCHMARK = MidogPP()
ASKED = Request(task="atypical")
GIVEN = Request(task="atypical", image_mpp=0.25)


def middle(table: Table, row: int) -> tuple[int, ...]:
    """The colour of the pixel that a nucleus lies in."""
    pixels = np.array(Image.open(table.image[row]))
    return tuple(pixels[int(table.y[row]), int(table.x[row])].tolist())


def listed(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_crops_of_midog25(tmp_path: Path) -> None:
    midogpp.write_midog25(tmp_path)
    table = BENCHMARK.load(tmp_path, ASKED)
    rows = {row["image_id"]: row for row in listed(tmp_path / midogpp.CSV25)}
    names = [Path(image).name for image in table.image]
    # 6.png is listed four times and given once; 9.png is there, but not listed.
    assert sorted(names) == sorted(rows) and "9.png" not in names
    mpp = {"Hamamatsu XR": 0.2268, "Hamamatsu S360": 0.2299, "Aperio CS2": 0.2533}
    for i, name in enumerate(names):
        row = rows[name]
        number = int(name.split(".")[0])
        assert middle(table, i) == (number % 250, number // 250, 7)
        assert (table.x[i], table.y[i]) == (64, 64)
        assert (
            table.classes[table.label[i]] == {"AMF": "atypical", "NMF": "normal"}[row["majority"]]
        )
        assert table.slide[i] == row["filename"] and table.patient[i] == row["filename"][:3]
        assert table.mpp[i] == mpp.get(row["Scanner"].replace("Hamamm", "Hamam"), 0.2487)
        # In some copies dogs are called human; the tumour type knows better.
        assert table.groups["species"][i] == row["Tumor"].split()[0]
        assert table.groups["origin"][i] == row["Origin"]
    assert {d for d in table.groups["domain"] if "lymph" in d} == {"canine lymphosarcoma"}
    assert "Hamamatsu XR" in table.groups["scanner"]


def test_check_of_midog25_names_the_odd_rows(tmp_path: Path) -> None:
    midogpp.write_midog25(tmp_path)
    said = "\n".join(BENCHMARK.check(tmp_path, ASKED))
    assert "3 rows of the list repeat another one of the same class" in said
    assert "1 crops are not listed, the first is 9.png" in said
    assert "in 1 rows of" in said and "the first is 16.png" in said
    counts = Counter(row["majority"] for row in listed(tmp_path / midogpp.CSV25))
    assert f"lists {counts['NMF']} normal and {counts['AMF']} atypical figures" in said
    assert "published for MIDOG25 are 10191 and 1748" in said
    assert "human melanoma: 0 figures are listed; MIDOG++ has 1150." in said
    assert "the published figure of the scanner" in said


def test_midog25_from_the_large_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truth = {(f.image, int(f.x), int(f.y)): f for f in midogpp.write(tmp_path)}
    midogpp.write_midog25(tmp_path, crops=False)
    (tmp_path / "images" / "353.tiff").unlink()
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(tmp_path, ASKED)
    places = {
        (row["filename"], row["coordinateX"], row["coordinateY"])
        for row in listed(tmp_path / midogpp.CSV25)
        if row["filename"] != "353.tiff"
    }
    # Both places of 6.png are figures of their own here.
    assert len(table) == len(places)
    for i in range(len(table)):
        figure = truth[table.slide[i], int(table.x[i]), int(table.y[i])]
        assert figure.mitotic and middle(table, i) == figure.colour
    assert "1 of 12 images are missing, the first is 353.tiff" in caplog.text
    # The mpp is that of the files' tags.
    assert set(table.mpp[table.slide == "245.tiff"].round(6)) == {0.2482}


def test_equal_files_count_once_and_contradicting_ones_not_at_all(tmp_path: Path) -> None:
    midogpp.write_midog25(tmp_path / "plain")
    midogpp.write_midog25(tmp_path / "copies", copies=True)
    plain, copies = (BENCHMARK.load(tmp_path / name, ASKED) for name in ("plain", "copies"))
    left = {Path(p).name for p in plain.image} - {Path(p).name for p in copies.image}
    # 11 is 10 again (both normal); 13 (normal) is 12 (atypical).
    assert left == {"11.png", "12.png", "13.png"}
    said = " ".join(BENCHMARK.check(tmp_path / "copies", ASKED))
    assert "1 crops (by content) repeat another one of the same class" in said
    assert "2 crops (by content) occur under both classes" in said


def test_a_half_downloaded_set_of_crops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    midogpp.write_midog25(tmp_path)
    before = len(BENCHMARK.load(tmp_path, ASKED))
    for number in (1, 2, 30):
        (tmp_path / midogpp.CROPS25 / f"{number}.png").unlink()
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(tmp_path, ASKED)
    assert len(table) == before - 3
    assert f"3 of {before} listed crops are missing, the first is 1.png" in caplog.text


def test_ami_br(tmp_path: Path) -> None:
    midogpp.write_ami_br(tmp_path)
    table = BENCHMARK.load(tmp_path, GIVEN)
    rows = {f"{r['dataset']}_{r['uid']}.png": r for r in listed(tmp_path / "AMI-BR.csv")}
    assert len(table) == len(rows) == 24
    breast = {"002.tiff": 0.2268, "060.tiff": 0.2299, "120.tiff": 0.2533}
    for i in range(len(table)):
        row = rows[Path(table.image[i]).name]
        assert table.label[i] == (row["majority_atypical"] == "True")
        assert table.groups["dataset"][i] == row["dataset"]
        assert table.slide[i] == f"{row['dataset']} {row['slide']}"
        assert table.mpp[i] == breast.get(row["slide"], 0.25)
    # Slide 72 of TUPAC16 is not slide 072 of MIDOG21.
    assert set(table.patient) == {
        *("MIDOG21 002", "MIDOG21 060", "MIDOG21 120", "TUPAC16 72", "TUPAC16 73")
    }
    said = " ".join(BENCHMARK.check(tmp_path, GIVEN))
    assert "published for AMi-Br are 2888 and 832" in said
    assert "10 images: image_mpp=." in said and "14 images: the published figure" in said


def test_a_crop_in_the_folder_of_the_other_class_is_said(tmp_path: Path) -> None:
    midogpp.write_ami_br(tmp_path)
    before = BENCHMARK.load(tmp_path, GIVEN)
    name = "MIDOG21_6.png"
    (tmp_path / "patches" / "normal" / name).rename(tmp_path / "patches" / "atypical" / name)
    after = BENCHMARK.load(tmp_path, GIVEN)
    np.testing.assert_array_equal(after.label, before.label)
    said = " ".join(BENCHMARK.check(tmp_path, GIVEN))
    assert (
        f"1 crops lie in the folder of the other class than AMI-BR.csv says, the first is {name}"
        in said
    )


def test_two_folders_of_crops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    midogpp.write_folders(tmp_path)
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(tmp_path, GIVEN)
    found = {f"{Path(p).parent.name}/{Path(p).name}" for p in table.image}
    normal = {f"Normal/N{i}.png" for i in range(8)} - {"Normal/N1.png", "Normal/N2.png"}
    assert found == normal | {f"Atypical/A{i}.png" for i in range(4)}
    for path, label in zip(table.image, table.label, strict=True):
        assert table.classes[label] == Path(path).parent.name.lower()
    assert "nothing says from which slide" in caplog.text


def test_default_folds_are_by_slide_and_the_paper_s_are_not(tmp_path: Path) -> None:
    midogpp.write_midog25(tmp_path)
    table = BENCHMARK.load(tmp_path, ASKED)
    folds = BENCHMARK.folds(table, ASKED)
    assert len(folds) == 5 and not plans.shares_patients(table, folds)
    asked = Request(task="atypical", protocol="paper", seed=7)
    papers = BENCHMARK.folds(table, asked)
    assert len(papers) == 5 and plans.shares_patients(table, papers)
    assert sorted(np.concatenate([fold.test for fold in papers])) == list(range(len(table)))
    share = table.label.mean()
    assert all(abs(table.label[fold.test].mean() - share) < 0.1 for fold in papers)
    paper = BENCHMARK.paper("atypical")
    assert paper.probes == ("logistic",) and "didn't use any metadata" in paper.says
    assert not plans.shares_patients(table, plans.from_word("leave_out:domain", table, seed=0))
