"""Fields cut again from slides: places, pixels, and what can go wrong."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.registration import phase_cross_correlation

from eval.benchmarks import Request
from eval.benchmarks.brcam2c import BrcaM2C
from eval.benchmarks.fields import Field, field_image, find_slides
from eval.benchmarks.ocelot import Ocelot
from eval.benchmarks.puma import Puma
from lemon_muse.data import geometry
from lemon_muse.data.slides import open_slide
from lemon_muse.data.table import Table, read_image
from lemon_muse.errors import UserError
from tests.fixtures import ocelot, puma

MPP = {"cmu-1-small-region": 0.499, "tcga-cr-7395-01a-01-ts1": 0.25}
SLIDE = "TCGA-A1-A0SA-01Z-00-DX1"


def write_brca_from(root: Path, source: Path, fields: list[tuple[int, int, int, int]]) -> Path:
    """BRCA-M2C made of a real slide: pngs at 0.5 µm/px, cut and shrunk as its authors did."""
    mpp = MPP[source.stem]
    factor = round(mpp / 0.25, 4)
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    names = []
    with open_slide(source, mpp=mpp) as slide:
        for x, y, width, height in fields:
            name = f"{SLIDE}_{x}_{y}_{width}_{height}_{factor}"
            pixels = Image.fromarray(slide.read(0, x, y, width, height))
            size = (int(width * factor / 2), int(height * factor / 2))
            pixels.resize(size, Image.Resampling.BICUBIC).save(root / "images" / f"{name}.png")
            rng = np.random.default_rng(x)
            points = np.stack([rng.integers(0, size[1], 40), rng.integers(0, size[0], 40)], 1)
            points[:2] = [[0, 0], [size[1] - 1, size[0] - 1]]
            text = "".join(
                f"{row} {column} {1 + i % 3}\n" for i, (row, column) in enumerate(points)
            )
            (root / "labels" / f"{name}_gt_class_coords.txt").write_text(text)
            names.append(name)
    for split, name in zip(("train", "val", "test"), names, strict=True):
        (root / f"brca_ds_{split}.txt").write_text(f"{name}.png\n")
    return root


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A folder as the GDC client leaves it: a folder a file, and another slide of the patient."""
    root = tmp_path_factory.mktemp("slides")
    for name, uuid in ((SLIDE, "8fa7dfcd"), (f"{SLIDE}0", "0a5c2d4e")):
        (root / uuid).mkdir()
        source = "cmu-1-small-region" if name == SLIDE else "tcga-cr-7395-01a-01-ts1"
        shutil.copy(shared_data / "wsi" / f"{source}.svs", root / uuid / f"{name}.8FA7-{uuid}.svs")
        (root / uuid / f"{name}.8FA7-{uuid}.svs.partial").write_bytes(b"")
    return root


@pytest.mark.parametrize("source", list(MPP))
def test_a_real_field_cut_again_is_the_field(
    shared_data: Path, tmp_path: Path, source: str
) -> None:
    path = shared_data / "wsi" / f"{source}.svs"
    # The second touches the slide's corner: white lies beyond.
    fields = [(700, 500, 500, 450), (0, 0, 480, 480), (1000, 903, 417, 500)]
    root = write_brca_from(tmp_path / "brca", path, fields)
    (tmp_path / "slides").mkdir()
    shutil.copy(path, tmp_path / "slides" / f"{SLIDE}.svs")
    plain = BrcaM2C().load(root)
    request = Request(slides=tmp_path / "slides", cache=tmp_path / "cache")
    again = BrcaM2C().load(root, request)
    assert len(plain) == len(again) == 120
    for name in ("label", "split", "patient", "slide"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(again, name))
    np.testing.assert_allclose(again.mpp, MPP[source], atol=1e-9)
    inside = inner_rows(plain, 40)
    seen, cut = plain.crops(64, 0.5, inside), again.crops(64, 0.5, inside)
    # A window begins at a whole pixel, so the nucleus lies up to one px further in the second.
    clear = np.flatnonzero(seen.std((1, 2, 3)) > 15)
    shifts = [
        phase_cross_correlation(a.mean(2), b.mean(2), upsample_factor=20)[0][::-1]
        for a, b in zip(seen[clear], cut[clear], strict=True)
    ]
    wanted = place_in_window(plain, inside[clear]) - place_in_window(again, inside[clear])
    apart = np.abs(np.array(shifts) - wanted)
    assert len(apart) > 20 and np.ptp(wanted) > 0.3
    # Shrunk by a fifth of a percent, a field is blurred here and there: less exact to register.
    assert np.median(apart) < (0.05 if source.startswith("tcga") else 0.15)
    assert np.percentile(apart, 90) < 0.3
    # Exactly: the field's pixels in the PNG are the slide's.
    x, y, width, height = fields[0]
    with open_slide(path, mpp=MPP[source]) as slide:
        pixels = slide.read(0, x, y, width, height)
    row = int(np.flatnonzero(plain.split == "train")[0])
    first = plain.x[row] * width / int(width * MPP[source] * 2)
    left = round(again.x[row] - first)
    top = round(again.y[row] - plain.y[row] * height / int(height * MPP[source] * 2))
    image = read_image(Path(again.image[row]))
    np.testing.assert_array_equal(image[top : top + height, left : left + width], pixels)


def place_in_window(table: Table, rows: np.ndarray) -> np.ndarray:
    """x and y of nuclei in their windows of 64 px at 0.5 µm/px, float [n, 2]."""
    places = []
    for row in rows:
        sides = np.array(Image.open(table.image[row]).size)
        scale = table.mpp[row] / 0.5
        exact = np.ones(2) if abs(scale - 1) <= 0.02 else np.round(sides * scale) / sides
        centre = np.array([table.x[row], table.y[row]]) * exact
        places.append(centre - np.floor(centre - 31.5))
    return np.array(places)


def inner_rows(table: Table, margin: int) -> np.ndarray:
    """Rows whose window of 2 * margin px lies in the published image."""
    kept = []
    for row in range(len(table)):
        width, height = Image.open(table.image[row]).size
        x, y = table.x[row], table.y[row]
        if margin <= x <= width - margin and margin <= y <= height - margin:
            kept.append(row)
    return np.array(kept)


def test_a_rerun_reads_and_other_words_cut_anew(slides: Path, tmp_path: Path) -> None:
    source = find_slides(slides, [SLIDE])[SLIDE]
    field = Field(source, 300.4, 200.6, 200, 150.5, 0.499)
    path, where = field_image(tmp_path, "one", field)
    # 112 µm are 224.4 px: the corner lies that far or less than one px further.
    assert all(224.44 <= w < 225.45 for w in where)
    assert (300.4 - where[0]) % 1 == pytest.approx(0, abs=1e-9)
    with Image.open(path) as image:
        right, bottom = (224.45 + side + 368.73 for side in (200, 150.5))
        assert right - 1 <= image.size[0] <= right + 2 and bottom - 1 <= image.size[1] <= bottom + 2
    Image.new("RGB", (3, 3)).save(path)  # stands for "was there"
    assert field_image(tmp_path, "one", field)[0] == path and Image.open(path).size == (3, 3)
    others = [
        field_image(tmp_path, "one", Field(source, 301.4, 200.6, 200, 150.5, 0.499))[0],
        field_image(tmp_path, "one", field, margin_um=(10.0, 10.0))[0],
    ]
    assert len({path, *others}) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_beyond_the_slide_it_is_white(slides: Path, tmp_path: Path) -> None:
    source = find_slides(slides, [SLIDE])[SLIDE]
    path, where = field_image(tmp_path, "one", Field(source, 0, 0, 100, 100, 0.499))
    pixels = read_image(path)
    corner = (int(where[0]), int(where[1]))
    assert (pixels[: corner[1]] == 255).all() and (pixels[:, : corner[0]] == 255).all()
    assert pixels[corner[1] :, corner[0] :].std() > 10


def test_slides_are_found_by_the_start_of_their_names(slides: Path, tmp_path: Path) -> None:
    found = find_slides(slides, [SLIDE, f"{SLIDE}0", "TCGA-ZZ-0001-01Z-00-DX1"])
    assert {name: path.name for name, path in found.items()} == {
        SLIDE: f"{SLIDE}.8FA7-8fa7dfcd.svs",
        f"{SLIDE}0": f"{SLIDE}0.8FA7-0a5c2d4e.svs",
    }
    with pytest.raises(UserError, match=r"none of the 1 slides is below .* TCGA-ZZ\*\.svs"):
        find_slides(slides, ["TCGA-ZZ"])
    with pytest.raises(UserError, match="there is no folder"):
        find_slides(tmp_path / "none", [SLIDE])
    (tmp_path / f"{SLIDE}.A.svs").write_bytes(b"1")
    (tmp_path / f"{SLIDE}.B.svs").write_bytes(b"12")
    with pytest.raises(UserError, match="two different slides are called"):
        find_slides(tmp_path, [SLIDE])


def test_brcam2c_leaves_fields_without_a_slide_out(
    slides: Path, shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shared_data / "wsi" / "cmu-1-small-region.svs"
    fields = [(700, 500, 200, 200), (100, 100, 200, 200), (900, 900, 200, 200)]
    root = write_brca_from(tmp_path / "brca", source, fields)
    for path in [*root.glob("*.txt"), *root.rglob("*_900_900_*")]:
        if path.parent == root:
            text = path.read_text()
            path.write_text(text.replace(f"{SLIDE}_900", "TCGA-B6-A0WX-01Z-00-DX1_900"))
        else:
            path.rename(path.with_name(path.name.replace(SLIDE, "TCGA-B6-A0WX-01Z-00-DX1")))
    request = Request(slides=slides, cache=tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        table = BrcaM2C().load(root, request)
    sentence = (
        "1 of 3 fields have no slide and are left out, the first is "
        "TCGA-B6-A0WX-01Z-00-DX1_900_900_200_200_1.996."
    )
    assert sentence in caplog.text and len(table) == 80
    assert sentence in BrcaM2C().check(root, request)
    with pytest.raises(UserError, match="give a cache folder"):
        BrcaM2C().load(root, Request(slides=slides))
    with pytest.raises(UserError, match=r"have 0\.5 µm per pixel by their publication"):
        BrcaM2C().load(root, Request(image_mpp=0.25))


def test_another_slide_is_noticed(slides: Path, tmp_path: Path) -> None:
    source = find_slides(slides, [SLIDE])[SLIDE]
    with pytest.raises(
        UserError, match=r"states 0\.499 µm per pixel, but the field one was cut at"
    ):
        field_image(tmp_path, "one", Field(source, 0, 0, 100, 100, 0.25))
    with pytest.raises(UserError, match=r"the field one ends at \(2300, 100\), outside"):
        field_image(tmp_path, "one", Field(source, 2200, 0, 100, 100, 0.499))
    assert not list(tmp_path.iterdir())


def test_ocelot_is_cut_again_where_metadata_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("001", "004", "401")
    root = ocelot.write(tmp_path / "ocelot", names=names, slides=tmp_path / "slides")
    plain = Ocelot().load(root)
    request = Request(slides=tmp_path / "slides", cache=tmp_path / "cache")
    again = Ocelot().load(root, request)
    assert "1 of 3 fields have no slide and are left out, the first is 004." in caplog.text
    items = json.loads((root / "metadata.json").read_text())["sample_pairs"]
    kept = np.array([Path(path).stem in ("001", "401") for path in plain.image])
    plain = plain.take(np.flatnonzero(kept))
    assert plain.label.tolist() == again.label.tolist()
    for row in range(0, len(plain), 17):
        item = items[Path(plain.image[row]).stem]
        cell, slide = item["cell"], tmp_path / "slides" / f"{item['slide_name']}.svs"
        x = cell["x_start"] + plain.x[row] * (cell["x_end"] - cell["x_start"]) / 1024
        y = cell["y_start"] + plain.y[row] * (cell["y_end"] - cell["y_start"]) / 1024
        with open_slide(slide) as opened:
            assert again.mpp[row] == item["mpp_x"] == pytest.approx(opened.mpp)
            wanted = opened.read(0, int(x) - 10, int(y) - 10, 21, 21)
        pixels = read_image(Path(again.image[row]))
        near = pixels[int(again.y[row]) - 10 :, int(again.x[row]) - 10 :][:21, :21]
        np.testing.assert_array_equal(near, wanted)
    whole = geometry.resample(read_image(Path(again.image[0])), source_mpp=again.mpp[0], mpp=0.5)[0]
    assert len(whole) > 200 / 0.5 + (112 + 184) / 0.5 - 3


def test_puma_is_cut_from_its_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = (puma.NAMES[0], puma.FOUR_CHANNELS)
    root = puma.write(tmp_path / "PUMA", names=names, contexts=names[1:])
    folder = root / "01_training_dataset_tif_context_ROIs"
    request = Request(image_mpp=puma.MPP, slides=folder, cache=tmp_path / "cache")
    again = Puma().load(root, request)
    assert "1 of 2 fields have no slide and are left out" in caplog.text
    plain = Puma().load(root, Request(image_mpp=puma.MPP))
    plain = plain.take(np.flatnonzero(plain.slide == puma.FOUR_CHANNELS))
    moved = np.stack([again.x - plain.x, again.y - plain.y])
    # 112 µm at 0.2266 are 494.3 px.
    np.testing.assert_allclose(moved, 495)
    pixels, roi = read_image(Path(again.image[0])), read_image(Path(plain.image[0]))
    np.testing.assert_array_equal(pixels[495:1519, 495:1519], roi)
    np.testing.assert_array_equal(
        pixels[495:1519, 1519:1719], np.roll(roi, (137, 311), (0, 1))[:, :200]
    )
    said = Puma().check(root, request)
    assert any("1 of 2 fields have no slide" in s for s in said)
    assert not any("is not" in s for s in said)
    with Image.open(folder / f"{puma.FOUR_CHANNELS}_context.tif") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
            folder / f"{puma.FOUR_CHANNELS}_context.tif"
        )
    assert any(s.startswith("the middle of") for s in Puma().check(root, request))
    Image.new("RGB", (4096, 4096)).save(folder / f"{puma.FOUR_CHANNELS}_context.tif")
    with pytest.raises(UserError, match="must have 5120 x 5120 and 1024 x 1024 px"):
        Puma().load(root, request)
    with pytest.raises(UserError, match="has no context image of any ROI"):
        Puma().load(root, Request(image_mpp=0.2266, slides=tmp_path, cache=tmp_path))
