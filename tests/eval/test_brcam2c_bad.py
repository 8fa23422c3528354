"""Every way to spoil a BRCA-M2C folder is one clear sentence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.benchmarks import find
from eval.benchmarks.brcam2c import BrcaM2C
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError
from tests.eval.standins import EVERY, labels_of, write_brca

BENCHMARK = BrcaM2C()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_brca(tmp_path / "brca")


def spoil_no_labels(root: Path) -> None:
    (root / "labels").rename(root / "Labels_old")


def spoil_label_file(root: Path) -> None:
    labels_of(root, EVERY[1]).unlink()


def spoil_no_list(root: Path) -> None:
    (root / "brca_ds_val.txt").unlink()


def spoil_header(root: Path) -> None:
    path = labels_of(root, EVERY[0])
    path.write_text("Y X class\n" + path.read_text())


def spoil_two_columns(root: Path) -> None:
    labels_of(root, EVERY[0]).write_text("10 20 1\n30 40\n")


def spoil_class(root: Path) -> None:
    labels_of(root, EVERY[0]).write_text("10 20 4\n")


def spoil_outside(root: Path) -> None:
    # Row 95 fits into 100 rows, column 95 does not fit into 90 columns.
    labels_of(root, EVERY[0]).write_text("20 95 1\n")


def spoil_negative(root: Path) -> None:
    labels_of(root, EVERY[0]).write_text("-1 20 1\n")


def spoil_bytes(root: Path) -> None:
    (root / "images" / f"{EVERY[0]}.png").write_bytes(b"not a png at all")


def spoil_twice(root: Path) -> None:
    (root / "brca_ds_test.txt").write_text(f"{EVERY[0]}.png\n")


def spoil_all_images(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.unlink()


def spoil_name(root: Path) -> None:
    (root / "images" / f"{EVERY[0]}.png").rename(root / "images" / "one.png")
    labels_of(root, EVERY[0]).rename(labels_of(root, "one"))
    (root / "brca_ds_train.txt").write_text("one.png\n")


def spoil_all_labels(root: Path) -> None:
    for path in (root / "labels").iterdir():
        path.write_text("\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_no_labels, "has no folder 'labels'"),
        (spoil_label_file, "_gt_class_coords.txt is missing"),
        (spoil_no_list, "brca_ds_val.txt is missing"),
        (spoil_header, "line 1, is 'Y X class'"),
        (spoil_two_columns, "line 2, is '30 40'"),
        (spoil_class, "has class 4"),
        (spoil_outside, "outside its image of 90 x 100 px: Y 20, X 95"),
        (spoil_negative, "lies outside its image"),
        (spoil_bytes, "does not decode"),
        (spoil_twice, "listed twice"),
        (spoil_all_images, "none of the 5 images"),
        (spoil_name, "does not start with a TCGA slide barcode"),
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


def test_a_truncated_image_is_a_user_error_when_read(folder: Path) -> None:
    generator = np.random.default_rng(0)
    path = folder / "images" / f"{EVERY[0]}.png"
    Image.fromarray(generator.integers(0, 255, (100, 90, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    table: Table = BENCHMARK.load(folder)
    with pytest.raises(UserError, match="does not decode"):
        table.crops(9, 0.5)


@pytest.mark.parametrize("level", ["above", "below", "nowhere"])
def test_the_wrong_folder_level_names_the_right_one(folder: Path, level: str) -> None:
    given = {"above": folder.parent, "below": folder / "images", "nowhere": folder / "no"}[level]
    with pytest.raises(UserError) as caught:
        BENCHMARK.load(given)
    if level == "nowhere":
        assert "there is no folder" in str(caught.value)
    else:
        assert f"give {folder} instead" in str(caught.value)


def test_an_unknown_benchmark_gets_the_nearest_name() -> None:
    assert isinstance(find("brcam2c"), BrcaM2C)
    with pytest.raises(UserError, match="did you mean 'brcam2c'"):
        find("brca-m2c")
