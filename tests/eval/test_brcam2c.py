"""Dataset-BRCA-M2C: the real folder, folders in its exact format, and every way to spoil one."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.benchmarks import BENCHMARKS, find
from eval.benchmarks.brcam2c import BrcaM2C
from eval.table import Table
from lemon_muse.errors import UserError

BENCHMARK = BrcaM2C()
NAMES = {
    "train": [
        "TCGA-A1-A0SA-01Z-00-DX1_100_200_180_200_1.0",
        "TCGA-A1-A0SA-01Z-00-DX2_5_6_180_200_1.0",
        "TCGA-A1-A0SB-01Z-00-DX1_5_6_180_200_1.0",
    ],
    "val": ["TCGA-A1-A0SC-01Z-00-DX1_5_6_180_200_1.0"],
    "test": ["TCGA-A1-A0SD-01Z-00-DX1_5_6_180_200_0.9872000000000001"],
}
EVERY = [name for names in NAMES.values() for name in names]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small data set: white images of 90 x 100 px with one dark pixel under each point."""
    root = tmp_path / "brca"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for split, names in NAMES.items():
        (root / f"brca_ds_{split}.txt").write_text("".join(f"{n}.png\n" for n in names))
    for number, name in enumerate(EVERY):
        pixels = np.full((100, 90, 3), 255, np.uint8)
        lines = []
        for i in range(4):
            row, column = 10 + 25 * i, 80 - 20 * i - number
            pixels[row, column] = (10, 20, 30 + i)
            lines.append(f"{row} {column} {i % 3 + 1}\n")
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        (root / "labels" / f"{name}_gt_class_coords.txt").write_text("".join(lines))
    return root


def labels_of(root: Path, name: str) -> Path:
    return root / "labels" / f"{name}_gt_class_coords.txt"


def test_counts_of_the_real_folder(shared_data: Path) -> None:
    table = BENCHMARK.load(shared_data / "brca-m2c")
    expected = {
        "train": (60, 57, [3139, 7174, 4334]),
        "val": (12, 10, [1386, 1043, 1167]),
        "test": (18, 16, [374, 2472, 691]),
    }
    for split, (images, patients, nuclei) in expected.items():
        rows = table.rows(split)
        assert len(set(table.image[rows])) == images
        assert len(set(table.patient[rows])) == patients
        assert np.bincount(table.label[rows]).tolist() == nuclei
    assert table.patients_across() == []
    assert (table.mpp == 0.5).all()


def test_points_of_the_real_folder_lie_on_dark_nuclei(shared_data: Path) -> None:
    table = BENCHMARK.load(shared_data / "brca-m2c")
    right, swapped = [], []
    for path in sorted(set(table.image.tolist())):
        grey = np.array(Image.open(path).convert("L"))
        rows = np.flatnonzero(table.image == path)
        x, y = table.x[rows].astype(int), table.y[rows].astype(int)
        right.append(grey[y, x])
        inside = (x < grey.shape[0]) & (y < grey.shape[1])
        swapped.append(grey[x[inside], y[inside]])
    assert 80 < np.concatenate(right).mean() < 105
    assert np.concatenate(swapped).mean() > 140


def test_check_reports_the_subset_and_does_not_fail(shared_data: Path) -> None:
    said = " ".join(BENCHMARK.check(shared_data / "brca-m2c"))
    assert "train has 60 images" in said and "published are 80 images" in said
    # Every png of the real data has the size that its name gives at 0.5 mpp.
    assert "do not have the size" not in said


def test_columns_follow_the_file_to_the_pixel(folder: Path) -> None:
    table = BENCHMARK.load(folder)
    assert len(table) == 20
    for i in range(len(table)):
        pixels = np.array(Image.open(table.image[i]))
        assert pixels[int(table.y[i]), int(table.x[i]), 0] == 10
    # Half a pixel: the point is the centre of its pixel.
    assert (table.x % 1 == 0.5).all() and (table.y % 1 == 0.5).all()
    assert table.x[0] == 80.5 and table.y[0] == 10.5
    assert table.label[:4].tolist() == [0, 1, 2, 0]
    assert set(table.patient[table.rows("train")]) == {"TCGA-A1-A0SA", "TCGA-A1-A0SB"}
    assert len(set(table.slide[table.rows("train")])) == 3
    # The factor at the end of the name may carry float noise.
    assert set(table.slide[table.rows("test")]) == {"TCGA-A1-A0SD-01Z-00-DX1"}


def test_crops_have_the_nucleus_in_the_middle(folder: Path) -> None:
    table = BENCHMARK.load(folder)
    rows = np.array([17, 3, 0, 9, 3])
    crops = table.crops(9, 0.5, rows)
    assert crops.shape == (5, 9, 9, 3) and crops.dtype == np.uint8
    for crop, row in zip(crops, rows, strict=True):
        assert crop[4, 4].tolist() == [10, 20, 30 + row % 4]
    big = table.crops(20, 0.25)
    assert big.shape == (20, 20, 20, 3)
    # At twice the resolution the dark pixel fills the four middle ones.
    dark = big[:, 9:11, 9:11].astype(float).mean((1, 2, 3))
    assert (dark < big[:, :4].astype(float).mean((1, 2, 3)) - 60).all()
    wide = table.crops(64, 0.5)
    assert wide.shape == (20, 64, 64, 3)
    dropped = table.crops(64, 0.5, edge="drop")
    # Column X (x = X + 0.5) has 31 columns of its window before and 32 after it.
    fits = [
        31 <= int(x) < 90 - 32 and 31 <= int(y) < 100 - 32
        for x, y in zip(table.x, table.y, strict=True)
    ]
    assert len(dropped) == sum(fits)
    np.testing.assert_array_equal(dropped, wide[np.array(fits)])


def test_each_image_is_read_once_and_threads_change_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import eval.table as module

    opened = []
    original = module.read_image

    def counting(path: Path) -> np.ndarray:
        opened.append(path)
        return original(path)

    monkeypatch.setattr(module, "read_image", counting)
    table = BENCHMARK.load(folder)
    order = np.random.default_rng(0).permutation(len(table))
    crops = table.crops(11, 0.5, order)
    assert len(opened) == len(set(opened)) == 5
    threaded = np.zeros_like(crops)
    for positions, pixels in table.stream(11, 0.5, rows=order, workers=3):
        threaded[positions] = pixels
    np.testing.assert_array_equal(crops, threaded)


def test_windows_line_ends_blank_lines_and_a_mark_are_read(folder: Path) -> None:
    before = BENCHMARK.load(folder)
    path = labels_of(folder, EVERY[0])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    listed = folder / "brca_ds_train.txt"
    listed.write_bytes(listed.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    after = BENCHMARK.load(folder)
    assert after.content_hash == before.content_hash


def test_four_channels_are_read_as_three(folder: Path) -> None:
    path = folder / "images" / f"{EVERY[0]}.png"
    plain = BENCHMARK.load(folder).crops(9, 0.5)
    Image.open(path).convert("RGBA").save(path)
    np.testing.assert_array_equal(BENCHMARK.load(folder).crops(9, 0.5), plain)


def test_an_empty_label_file_is_an_image_without_nuclei(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels_of(folder, EVERY[0]).write_text("")
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(folder)
    assert len(table) == 16
    assert [r.message for r in caplog.records if "is empty" in r.message]


def test_missing_images_give_one_warning_that_counts_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (EVERY[0], EVERY[3]):
        (folder / "images" / f"{name}.png").unlink()
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(folder)
    assert len(table) == 12
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and said[0].startswith("2 of 5 listed images")
    assert any("2 listed images are missing" in s for s in BENCHMARK.check(folder))


def test_a_patient_in_two_splits_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = NAMES["val"][0], NAMES["train"][2].replace("DX1", "DX9")
    for place, suffix in (("images", ".png"), ("labels", "_gt_class_coords.txt")):
        (folder / place / f"{old}{suffix}").rename(folder / place / f"{new}{suffix}")
    (folder / "brca_ds_val.txt").write_text(f"{new}.png\n")
    with caplog.at_level(logging.WARNING):
        BENCHMARK.load(folder)
    assert "1 patients are in more than one split: TCGA-A1-A0SB" in caplog.text
    assert any("TCGA-A1-A0SB" in sentence for sentence in BENCHMARK.check(folder))


def test_the_hash_follows_rows_and_pixels_and_not_the_place(folder: Path) -> None:
    first = BENCHMARK.load(folder).content_hash
    moved = folder.rename(folder.with_name("moved"))
    assert BENCHMARK.load(moved).content_hash == first
    path = labels_of(moved, EVERY[0])
    path.write_text(path.read_text().replace("10 80 1", "10 80 2"))
    changed = BENCHMARK.load(moved).content_hash
    assert changed != first
    image = moved / "images" / f"{EVERY[1]}.png"
    Image.fromarray(255 - np.array(Image.open(image))).save(image)
    assert BENCHMARK.load(moved).content_hash != changed


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
        assert f"give root={folder} instead" in str(caught.value)


def test_an_unknown_benchmark_gets_the_nearest_name() -> None:
    assert find("brcam2c") is BENCHMARKS["brcam2c"]
    with pytest.raises(UserError, match="did you mean 'brcam2c'"):
        find("brca-m2c")
