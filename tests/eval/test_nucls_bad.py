"""Every way to spoil a NuCLS folder is one clear sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eval.benchmarks import Request
from eval.benchmarks.nucls import Nucls
from lemon_muse.errors import UserError
from tests.fixtures import nucls as fixture
from tests.fixtures.nucls import SLIDES, write

BENCHMARK = Nucls()
QUARTER = Request(image_mpp=0.25)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "nucls")
    return tmp_path / "nucls"


def first(root: Path) -> Path:
    return min(p for p in (root / "csv").iterdir() if p.name.startswith("TCGA"))


def spoil_header(root: Path) -> None:
    first(root).write_text(first(root).read_text().replace(",xmin,", ",x_min,"))


def spoil_classes(root: Path) -> None:
    first(root).write_text(first(root).read_text().replace("_classification", "_class"))


def spoil_cut(root: Path) -> None:
    text = first(root).read_text()
    first(root).write_text(text[: text.rindex(",") - 2])


def spoil_cut_row(root: Path) -> None:
    lines = first(root).read_text().splitlines()
    first(root).write_text("\n".join([*lines[:3], "2,tumor,tumor_nonMitotic,tum"]))


def spoil_nan(root: Path) -> None:
    names = "tumor,tumor_nonMitotic,tumor_any,rectangle"
    first(root).write_text(f"{fixture.HEADER}\n0,{names},nan,1,20,30,,\n")


def spoil_binary(root: Path) -> None:
    first(root).write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")


def spoil_image(root: Path) -> None:
    (root / "rgb" / f"{first(root).stem}.png").write_bytes(b"not a png")


def spoil_names(root: Path) -> None:
    for path in (root / "rgb" / f"{first(root).stem}.png", first(root)):
        path.rename(path.with_stem("field_1"))


def spoil_images(root: Path) -> None:
    for path in (root / "rgb").iterdir():
        path.unlink()


def spoil_rgb(root: Path) -> None:
    (root / "rgb").rename(root / "rgbs_colorNormalized")


def spoil_csv(root: Path) -> None:
    (root / "csv").rename(root / "csvs")


def spoil_every_csv(root: Path) -> None:
    for path in (root / "csv").glob("TCGA*"):
        path.write_text(fixture.HEADER)


def spoil_fold_twice(root: Path) -> None:
    with (root / "train_test_splits" / "fold_4_test.csv").open("a") as stream:
        stream.write(f"2,{SLIDES[0]},BH,test,4\n")


def spoil_fold_leak(root: Path) -> None:
    with (root / "train_test_splits" / "fold_1_train.csv").open("a") as stream:
        stream.write(f"8,{SLIDES[0]},BH,train,1\n")


def spoil_fold_header(root: Path) -> None:
    (root / "train_test_splits" / "fold_3_train.csv").write_text("a,b\n")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_header, r"has no column xmin; the release has xmin, ymin"),
        (spoil_classes, r"has no class: none of the columns raw_classification"),
        (spoil_cut, r"\.csv is no whole csv"),
        (spoil_cut_row, r"\.csv, line 4, has 4 columns instead of 11"),
        (spoil_nan, r"\.csv, line 2, lacks a number: '0,tumor"),
        (spoil_binary, r"\.csv is no whole csv"),
        (spoil_image, r"\.png does not decode"),
        (spoil_names, r"field_1\.png has no TCGA slide barcode"),
        (spoil_images, r"no image has a csv of the same name .*0 images, 12 csvs"),
        (spoil_rgb, r"no rgb/ and no rgbs/: .* original pngs"),
        (spoil_csv, r"has no csv; the folder holds rgb/"),
        (spoil_every_csv, r"holds no nucleus of tumor_any"),
        (spoil_fold_twice, r"BH-A0BL-DX1 stands in fold_4_test\.csv and in fold_1_test\.csv"),
        (spoil_fold_leak, r"BH-A0BL-DX1 stands in fold_1_test\.csv and in fold_1_train\.csv"),
        (spoil_fold_header, r"fold_3_train\.csv has no column slide_name"),
    ],
)
def test_spoilt_folders_are_one_sentence(
    folder: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=says) as raised:
        BENCHMARK.load(folder)
    assert "\n" not in str(raised.value)


def test_the_wrong_level_names_the_right_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"give root={folder} instead"):
        BENCHMARK.load(folder / "csv")
    with pytest.raises(UserError, match=rf"give root={folder} instead"):
        BENCHMARK.load(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        BENCHMARK.load(tmp_path / "nothing")
    other = tmp_path / "other" / "set"
    write(other, form="detection")
    for place in (other.parent, other / "test"):
        with pytest.raises(UserError, match=rf"give root={other} instead"):
            BENCHMARK.load(place, QUARTER)
    (other / "test" / "labels").rename(other / "test" / "old")
    with pytest.raises(UserError, match="has no test/labels"):
        BENCHMARK.load(other, QUARTER)


def test_pixel_size_is_never_guessed(folder: Path, tmp_path: Path) -> None:
    assert (BENCHMARK.load(folder, Request(image_mpp=0.2)).mpp == 0.2).all()
    with pytest.raises(UserError, match=r"published at 0\.2 µm per pixel, not at 0\.25"):
        BENCHMARK.load(folder, QUARTER)
    write(tmp_path / "set", form="detection")
    with pytest.raises(UserError, match="states the µm per pixel of the images; pass image_mpp="):
        BENCHMARK.load(tmp_path / "set")
