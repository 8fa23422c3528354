"""Every way to spoil a folder of MIDOG++ is one clear sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from eval.benchmarks import Request
from eval.benchmarks.midogpp import MidogPP
from lemon_muse.errors import UserError
from tests.fixtures import midogpp

BENCHMARK = MidogPP()
LIST = Path("databases") / "MIDOG++.json"
TABLE = "datasets_xvalidation.csv"
ATYPICAL = Request(task="atypical", image_mpp=0.25)


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((root / LIST).read_text())
    change(raw)
    (root / LIST).write_text(json.dumps(raw))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def spoil_cut_list(root: Path) -> None:
    path = root / LIST
    path.write_text(path.read_text()[:3000])


def spoil_html(root: Path) -> None:
    (root / LIST).write_text("<!DOCTYPE html><html>404: Not Found</html>")


def spoil_key(root: Path) -> None:
    edit(root, lambda raw: raw.pop("categories"))


def spoil_image_id(root: Path) -> None:
    edit(root, lambda raw: raw["images"].pop(0))


def spoil_coco_boxes(root: Path) -> None:
    # x, y, width, height, as COCO has them.
    def to_coco(raw: dict[str, Any]) -> None:
        for note in raw["annotations"]:
            x1, y1, x2, y2 = note["bbox"]
            note["bbox"] = [x1, y1, x2 - x1, y2 - y1]

    edit(root, to_coco)


def spoil_category(root: Path) -> None:
    edit(root, lambda raw: raw["categories"][1].update(name="mast cell"))


def spoil_nan(root: Path) -> None:
    edit(root, lambda raw: raw["annotations"][5].update(bbox=[float("nan")] * 4))


def spoil_no_nuclei(root: Path) -> None:
    edit(root, lambda raw: raw.update(annotations=[]))


def spoil_far_outside(root: Path) -> None:
    edit(root, lambda raw: raw["annotations"][0].update(bbox=[4311, 321, 4361, 371]))


def spoil_resized(root: Path) -> None:
    path = root / "images" / "201.tiff"
    tifffile.imwrite(path, tifffile.imread(path)[::2, ::2], photometric="rgb")


def spoil_cut_image(root: Path) -> None:
    path = root / "images" / "245.tiff"
    path.write_bytes(path.read_bytes()[:-40000])


def spoil_bytes(root: Path) -> None:
    (root / "images" / "001.tiff").write_bytes(b"<html>not found</html>")


def spoil_empty_image(root: Path) -> None:
    (root / "images" / "001.tiff").write_bytes(b"")


def spoil_all_images(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.unlink()


def spoil_numbers(root: Path) -> None:
    # In MIDOG 2022 slide 201 is a lymphoma, in MIDOG++ a lung cancer.
    replace(root / TABLE, "201;train;canine lung cancer", "201;train;canine lymphoma")


def spoil_slide(root: Path) -> None:
    replace(root / TABLE, "\n353;", "\n354;")


def spoil_split(root: Path) -> None:
    replace(root / TABLE, "51;test", "51;val")


def spoil_table_column(root: Path) -> None:
    replace(root / TABLE, "Scanner", "Machine")


def spoil_cut_table(root: Path) -> None:
    path = root / TABLE
    path.write_text(path.read_text()[:-20])


def spoil_labels(root: Path) -> None:
    (root / LIST).unlink()
    midogpp.write_database(root / "MIDOGpp.csv", midogpp.figures(), imposter=2)
    replace(root / "MIDOGpp.csv", "40,40,1", "40,40,0")


def spoil_words(root: Path) -> None:
    (root / LIST).unlink()
    midogpp.write_database(root / "MIDOGpp.csv", midogpp.figures(), imposter=2)
    replace(root / "MIDOGpp.csv", "\n40,40,1", "\n40,4O,1")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_cut_list, "MIDOG++.json is damaged"),
        (spoil_html, "MIDOG++.json is damaged"),
        (spoil_key, "lacks 'categories'"),
        (spoil_image_id, "lacks 1, as a key or as the id"),
        (spoil_coco_boxes, "boxes that are not x1,y1,x2,y2"),
        (spoil_category, "category 'mast cell'"),
        (spoil_nan, "no finite numbers"),
        (spoil_no_nuclei, "lists no nucleus"),
        (spoil_far_outside, "outside of their images, the first at (4336, 346)"),
        (spoil_resized, "has 130 x 100 px, but MIDOG++.json lists it with 260 x 200"),
        (spoil_cut_image, "245.tiff is cut short"),
        (spoil_bytes, "001.tiff does not decode"),
        (spoil_empty_image, "001.tiff does not decode"),
        (spoil_all_images, "none of the 12 labelled images"),
        (spoil_numbers, "slide 201 is canine lymphosarcoma in the one and canine lung cancer"),
        (spoil_slide, "lacks the slide 353.tiff"),
        (spoil_split, "slide 51 is in 'val'"),
        (spoil_table_column, "no column Scanner"),
        (spoil_cut_table, "cut short or edited"),
        (spoil_labels, "has labels [0, 1, 2]"),
        (spoil_words, "something else than numbers"),
    ],
)
def test_a_spoilt_folder_is_one_clear_sentence(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    root = tmp_path / "MIDOGpp"
    midogpp.write(root)
    assert len(BENCHMARK.load(root)) == 84
    spoil(root)
    with pytest.raises(UserError) as caught:
        BENCHMARK.load(root)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("level", ["above", "images", "nowhere", "empty"])
def test_the_wrong_folder_level_names_the_right_one(tmp_path: Path, level: str) -> None:
    root = tmp_path / "data" / "MIDOGpp"
    midogpp.write(root)
    (tmp_path / "empty").mkdir()
    places = {"above": root.parent, "images": root / "images"}
    places |= {"nowhere": root / "no", "empty": tmp_path / "empty"}
    with pytest.raises(UserError) as caught:
        BENCHMARK.load(places[level])
    told = {"nowhere": "there is no folder", "empty": "does not hold MIDOG++.json"}
    assert told.get(level, f"give root={root} instead") in str(caught.value)


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use one of: mitosis, atypical"):
        BENCHMARK.load(tmp_path, Request(task="detection"))


def spoil_majority(root: Path) -> None:
    replace(root / midogpp.CSV25, "NMF,NMF,,NMF\n2.png", "NMF,NMF,,?\n2.png")


def spoil_one_class(root: Path) -> None:
    replace(root / midogpp.CSV25, "AMF", "NMF")


def spoil_column(root: Path) -> None:
    replace(root / midogpp.CSV25, ",majority", ",consensus")


def spoil_all_crops(root: Path) -> None:
    for path in (root / midogpp.CROPS25).iterdir():
        path.unlink()


def spoil_cut_crop(root: Path) -> None:
    path = root / midogpp.CROPS25 / "3.png"
    path.write_bytes(path.read_bytes()[:9000])


def spoil_crop_bytes(root: Path) -> None:
    (root / midogpp.CROPS25 / "3.png").write_bytes(b"no png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_majority, "line 2, has the class '?'; it must be NMF or AMF"),
        (spoil_one_class, "figures of one class only"),
        (spoil_column, "does not hold MIDOG25_Atypical"),
        (spoil_all_crops, "neither the crops of MIDOG25_Atypical"),
        (spoil_cut_crop, "3.png does not decode (it is cut short)"),
        (spoil_crop_bytes, "3.png does not decode"),
    ],
)
def test_a_spoilt_set_of_crops_is_one_clear_sentence(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    root = tmp_path / "midog25"
    midogpp.write_midog25(root)
    spoil(root)
    with pytest.raises(UserError) as caught:
        BENCHMARK.load(root, ATYPICAL)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message and message.endswith(".")


def test_ami_br_needs_its_csv_and_its_crops(tmp_path: Path) -> None:
    midogpp.write_ami_br(tmp_path / "ami")
    with pytest.raises(UserError, match=f"give root={tmp_path / 'ami'} instead"):
        BENCHMARK.load(tmp_path / "ami" / "patches", ATYPICAL)
    for kind in ("normal", "atypical"):
        for path in (tmp_path / "ami" / "patches" / kind).iterdir():
            path.unlink()
    with pytest.raises(UserError, match="none of the 24 listed crops is in"):
        BENCHMARK.load(tmp_path / "ami", ATYPICAL)
    (tmp_path / "ami" / "AMI-BR.csv").unlink()
    # Without the csv nobody knows which crop is of which slide: not to be taken for two folders.
    with pytest.raises(UserError, match=r"AMI-BR.csv with patches/"):
        BENCHMARK.load(tmp_path / "ami", ATYPICAL)


def test_crops_of_unknown_resolution_ask_for_it(tmp_path: Path) -> None:
    midogpp.write_ami_br(tmp_path / "ami")
    # The slides of MIDOG21 follow from the publication, those of TUPAC16 do not.
    with pytest.raises(UserError, match=r"10 of 24 crops.* pass image_mpp="):
        BENCHMARK.load(tmp_path / "ami", Request(task="atypical"))
    midogpp.write_folders(tmp_path / "folders")
    with pytest.raises(UserError, match=r"10 of 10 crops.* pass image_mpp="):
        BENCHMARK.load(tmp_path / "folders", Request(task="atypical"))
    np.testing.assert_array_equal(BENCHMARK.load(tmp_path / "folders", ATYPICAL).mpp, 0.25)
