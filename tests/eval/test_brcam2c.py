"""Dataset-BRCA-M2C: the real folder, and folders in its exact format."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.benchmarks.brcam2c import BrcaM2C
from tests.eval.standins import EVERY, NAMES, labels_of, write_brca

BENCHMARK = BrcaM2C()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_brca(tmp_path / "brca")


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
    import lemon_muse.data.table as module

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
