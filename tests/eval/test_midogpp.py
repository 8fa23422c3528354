"""MIDOG++, mitotic figures against imposters: the published lists, and folders in their format."""

import csv
import json
import logging
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import plans
from eval.benchmarks import BENCHMARKS, Request, find
from eval.benchmarks.midogpp import MidogPP, random_fifths
from eval.benchmarks.midogpp.files import read_list, read_slides
from eval.benchmarks.midogpp.images import SCANNER_MPP, scanner_of
from lemon_muse.errors import UserError
from tests.fixtures import midogpp

BENCHMARK = MidogPP()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    midogpp.write(tmp_path / "MIDOGpp")
    return tmp_path / "MIDOGpp"


def json_of(root: Path) -> Path:
    return root / "databases" / "MIDOG++.json"


def test_the_benchmark_is_in_the_table() -> None:
    assert BENCHMARKS["midogpp"][0] == "eval.benchmarks.midogpp"
    assert find("midogpp").tasks == ("mitosis", "atypical")


def test_the_published_lists(shared_data: Path) -> None:
    folder = shared_data / "midogpp"
    listed, slides = read_list(folder / "MIDOG++.json"), read_slides(folder)
    assert slides is not None
    raw = json.loads((folder / "MIDOG++.json").read_text())
    assert len(listed.label) == len(raw["annotations"]) == 26286
    files = {image["id"]: image for image in raw["images"]}
    for i in (0, 3, 777, 15362, 26285):
        note = raw["annotations"][i]
        x1, y1, x2, y2 = note["bbox"]
        assert (listed.x[i], listed.y[i]) == ((x1 + x2) / 2, (y1 + y2) / 2)
        assert listed.image[i] == files[note["image_id"]]["file_name"]
        assert listed.label[i] == (note["category_id"] == 1)
    assert Counter(listed.label.tolist()) == {1: 11937, 0: 14349}
    assert {row["Scanner"] for row in slides.values()} == set(SCANNER_MPP)
    areas = []
    for number, row in slides.items():
        name = f"{number:03d}.tiff"
        # The scanner that the publication gives to a slide is that of the table ...
        assert scanner_of(number, listed.domain[name]) == row["Scanner"]
        assert listed.domain[name] == row["Tumor"]
        width, height = listed.sizes[name]
        areas.append(width * height * SCANNER_MPP[row["Scanner"]] ** 2 / 1e6)
    # ... and at its published mpp every region has the published 2 mm².
    assert len(areas) == 503 and abs(np.array(areas) - 2).max() < 0.04


def test_a_half_downloaded_set_in_its_real_size(
    shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real = shared_data / "midogpp"
    (tmp_path / "images").mkdir()
    (tmp_path / "databases").mkdir()
    shutil.copy(real / "MIDOG++.json", tmp_path / "databases")
    shutil.copy(real / "datasets_xvalidation.csv", tmp_path)
    raw = json.loads((real / "MIDOG++.json").read_text())
    here = ("001.tiff", "085.tiff", "305.tiff", "309.tiff", "405.tiff")
    for image in raw["images"]:
        if image["file_name"] in here:
            path = tmp_path / "images" / image["file_name"]
            midogpp.write_huge(path, image["width"], image["height"])
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(tmp_path)
    assert "498 of 503 labelled images are missing, the first is 002.tiff" in caplog.text
    assert set(table.slide.tolist()) == set(here)
    # What differs from the publication is what was downloaded, not what is listed.
    said = " ".join(BENCHMARK.check(tmp_path))
    assert "published are" not in said and "2 mm²" not in said
    assert "50 images (151.tiff to 200.tiff) carry no label" in said
    assert "2 nuclei have their centre up to 25 px outside" in said
    moved = (table.x == 0) | (table.y == 0)
    assert table.slide[moved].tolist() == ["305.tiff", "309.tiff"]
    # A slide of this size is read part by part, at the border too.
    assert table.crops(40, 0.25, np.flatnonzero(moved)).shape == (2, 40, 40, 3)


@pytest.mark.parametrize("layout", ["repo", "flat"])
def test_nuclei_lie_where_the_boxes_say(tmp_path: Path, layout: str) -> None:
    truth = midogpp.write(tmp_path / "set", layout=layout, bom=True)
    table = BENCHMARK.load(tmp_path / "set")
    assert len(table) == len(truth)
    for i, figure in enumerate(truth):
        assert Path(table.image[i]).name == table.slide[i] == figure.image
        assert table.patient[i] == figure.image[:3]
        assert table.classes[table.label[i]] == ("mitotic figure" if figure.mitotic else "imposter")
        if min(figure.x, figure.y) >= 0:
            assert (table.x[i], table.y[i]) == (figure.x, figure.y)
            pixels = np.array(Image.open(table.image[i]))
            assert tuple(pixels[int(table.y[i]), int(table.x[i])]) == figure.colour
    outside = [f for f in truth if min(f.x, f.y) < 0]
    at_border = np.flatnonzero((table.x == 0) | (table.y == 0))
    assert len(outside) == 2 and table.slide[at_border].tolist() == [f.image for f in outside]
    assert not np.isin(table.slide, ["151.tiff", "152.tiff"]).any()


def test_groups_and_splits_come_from_the_table_of_slides(root: Path) -> None:
    table = BENCHMARK.load(root)
    with (root / "datasets_xvalidation.csv").open() as stream:
        rows = {int(row["Slide"]): row for row in csv.DictReader(stream, delimiter=";")}
    for i in range(len(table)):
        row = rows[int(table.patient[i])]
        assert table.split[i] == row["Dataset"]
        assert table.groups["origin"][i] == row["Origin"]
        assert table.groups["species"][i] == row["Species"].lower()
        scanner = row["Scanner"].replace("Hamammatsu", "Hamamatsu").replace("3D H", "3DH")
        assert table.groups["scanner"][i] == scanner
        domain = row["Tumor"].replace("lymphoma", "lymphosarcoma")
        assert table.groups["domain"][i] == domain


def test_folds_share_no_patient_and_test_every_nucleus_once(root: Path) -> None:
    table = BENCHMARK.load(root)
    folds = BENCHMARK.folds(table, Request(seed=3))
    assert len(folds) == 5 and not plans.shares_patients(table, folds)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(len(table)))
    official = plans.from_word("official", table, seed=0)[0]
    assert set(table.slide[official.test]) == {"051.tiff", "202.tiff", "353.tiff"}
    assert not plans.shares_patients(table, [official])


@pytest.mark.parametrize("by", ["domain", "scanner"])
def test_cross_domain_plans_work_on_the_table(root: Path, by: str) -> None:
    table = BENCHMARK.load(root)
    groups = table.groups[by]
    held = plans.from_word(f"leave_out:{by}", table, seed=0)
    assert {fold.name for fold in held} == set(groups.tolist())
    for fold in held:
        assert set(groups[fold.test]) == {fold.name} and fold.name not in set(groups[fold.train])
    crossed = plans.from_word(f"cross:{by}", table, seed=0)
    # The Hamamatsu S360 has one case here: it can be tested, not trained.
    patients = {name: len(set(table.patient[groups == name])) for name in set(groups.tolist())}
    assert {f.name for f in crossed} == {name for name, count in patients.items() if count > 1}
    for fold in crossed:
        assert set(groups[fold.train]) == {fold.name}
        assert set(groups[fold.test]) == set(groups.tolist())
    assert not plans.shares_patients(table, [*held, *crossed])


def test_the_paper_protocol_draws_as_the_public_script_does(root: Path) -> None:
    count = 26286  # all of MIDOG++
    folds = random_fifths(count)
    assert [fold.name for fold in folds] == [f"seed {seed}" for seed in (42, 43, 44, 45, 46)]
    for fold, seed in zip(folds, (42, 43, 44, 45, 46), strict=True):
        dice = np.random.default_rng(seed)
        test = set(dice.choice(count, 5257, replace=False).tolist())
        rest = np.array([i for i in range(count) if i not in test])
        # 0.1, 1, 10 and 100 % of the rest, and of each 80 %; the last one is used.
        for drawn, kept in ((21, 16), (210, 168), (2102, 1681), (21029, 16823)):
            part = dice.choice(dice.choice(rest, drawn, replace=False), kept, replace=False)
        assert fold.test.tolist() == sorted(test)
        assert fold.train.tolist() == sorted(part.tolist())
        assert set(fold.val.tolist()) == set(rest.tolist()) - set(part.tolist())
    table = BENCHMARK.load(root)
    assert plans.shares_patients(table, BENCHMARK.folds(table, Request(protocol="paper")))
    paper = BENCHMARK.paper("mitosis")
    assert paper.probes == ("uni",) and "both sides" in paper.says


@pytest.mark.parametrize("imposter", [0, 2])
def test_the_lists_of_the_benchmark_code_imposters_as_2_or_as_0(
    tmp_path: Path, imposter: int
) -> None:
    root = tmp_path / "set"
    truth = midogpp.write(root, layout="flat", table=False)
    (root / "MIDOGpp.json").unlink()
    name = "MIDOGpp.csv" if imposter else "MIDOG2022_training_tiff.csv"
    midogpp.write_database(root / name, truth, imposter=imposter)
    table = BENCHMARK.load(root)
    assert [bool(label) for label in table.label] == [figure.mitotic for figure in truth]
    assert set(table.split) == {"all"}  # its column split says nothing
    for i, figure in enumerate(truth):
        x = figure.x if imposter == 0 else math.floor(figure.x)
        assert table.x[i] == max(x, 0)
    assert {"canine lymphosarcoma"} == {d for d in table.groups["domain"] if "lympho" in d}
    said = " ".join(BENCHMARK.check(root))
    assert ("MIDOG++ has 503" if imposter else "MIDOG 2022 has 354") in said


def test_png_images_are_found_under_the_listed_tiff_names(root: Path) -> None:
    before = BENCHMARK.load(root)
    for path in (root / "images").glob("*.tiff"):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()
    after = BENCHMARK.load(root)
    assert {Path(name).suffix for name in after.image} == {".png"}
    np.testing.assert_array_equal(after.x, before.x)
    np.testing.assert_array_equal(after.slide, before.slide)


@pytest.mark.parametrize("tag", ["centimetre", "inch"])
def test_mpp_from_the_tags_in_either_unit(tmp_path: Path, tag: str) -> None:
    midogpp.write(tmp_path / "set", tag=tag)
    table = BENCHMARK.load(tmp_path / "set")
    optics = {f"{number:03d}.tiff": midogpp.OPTICS[s] for number, _, s, *_ in midogpp.REGIONS}
    np.testing.assert_allclose(table.mpp, [optics[name] for name in table.slide], rtol=1e-5)
    said = BENCHMARK.check(tmp_path / "set", Request(image_mpp=0.5))
    assert "µm per pixel of 12 images: the resolution tags of the file." in said
    assert "image_mpp=0.5 is not used" in " ".join(said)


@pytest.mark.parametrize("tag", ["none", "screen"])
@pytest.mark.parametrize("table", [True, False])
def test_mpp_of_the_scanner_where_tags_say_nothing(tmp_path: Path, tag: str, table: bool) -> None:
    midogpp.write(tmp_path / "set", tag=tag, table=table)
    found = BENCHMARK.load(tmp_path / "set")
    expected = {"001": 0.2268, "051": 0.2299, "101": 0.2533, "201": 0.2487, "245": 0.2487}
    expected |= {"002": 0.2268, "202": 0.2487, "246": 0.2487, "305": 0.2533, "309": 0.2533}
    expected |= {"350": 0.2268, "353": 0.2268}
    assert found.mpp.tolist() == [expected[name] for name in found.patient]
    said = " ".join(BENCHMARK.check(tmp_path / "set"))
    assert "12 images: the published figure of the scanner." in said
    assert "12 images do not cover the published 2 mm²" in said


def test_mpp_from_the_table_of_slides_with_millimetres(tmp_path: Path) -> None:
    midogpp.write(tmp_path / "set", tag="none")
    path = tmp_path / "set" / "datasets_xvalidation.csv"
    lines = path.read_text().splitlines()
    rows = [f"{line};0.000248166;0.000249144" for line in lines[1:]]
    path.write_text("\n".join([lines[0] + ";mm_x;mm_y", *rows]))
    table = BENCHMARK.load(tmp_path / "set")
    np.testing.assert_allclose(table.mpp, 0.248655, rtol=1e-5)
    assert "columns mm_x and mm_y" in " ".join(BENCHMARK.check(tmp_path / "set"))


def test_an_unknown_mpp_is_asked_for_and_taken(tmp_path: Path) -> None:
    root = tmp_path / "set"
    midogpp.write(root, tag="none", table=False)
    path = json_of(root)
    raw = json.loads(path.read_text())
    for image in raw["images"]:
        del image["tumor_type"]
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"12 of 12 images .* pass image_mpp="):
        BENCHMARK.load(root)
    table = BENCHMARK.load(root, Request(image_mpp=0.24))
    assert set(table.mpp.tolist()) == {0.24} and set(table.groups) == set()
    assert "names no tumour types" in " ".join(BENCHMARK.check(root, Request(image_mpp=0.24)))
