"""prep crops and prep check: right pixels, each nucleus once, and every kind of bad input."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_prep import check, crops
from lemon_muse.data import reader as reader_module
from lemon_muse.data.reader import BlockReader, CropBatches
from lemon_muse.data.shards import open_index
from lemon_muse.errors import RunError, UserError
from lemon_muse.synthetic import tissue

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three small images with nuclei in the plain layout, two patients."""
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    (folder / "nuclei").mkdir()
    lines = ["slide,patient,image,nuclei,mpp,split"]
    for i, split in enumerate(["train", "train", "test"]):
        field = tissue(i, side=256, mpp=0.5)
        Image.fromarray(field.image).save(folder / "images" / f"s{i}.png")
        write_points(folder / "nuclei" / f"s{i}.geojson", field.xy)
        lines.append(f"s{i},p{i // 2},images/s{i}.png,nuclei/s{i}.geojson,0.5,{split}")
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_points(path: Path, xy: np.ndarray) -> None:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [float(x), float(y)]},
            "properties": {"classification": {"name": "tumour"}},
        }
        for x, y in xy
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def prep(source: Path, out: Path, **changes: object) -> Path:
    return crops.run(crops.Crops(data=source, out=out, **{"workers": 0, "block": 32, **changes}))  # type: ignore[arg-type]


def read_all(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    index = open_index(folder)
    reader = BlockReader(index)
    blocks = range(len(index.blocks))
    columns = [reader.columns(b) for b in blocks]
    joined = {k: np.concatenate([c[k] for c in columns]) for k in columns[0]}
    return np.concatenate([reader.pixels(b) for b in blocks]), joined


def test_every_nucleus_once_with_its_pixels(source: Path, tmp_path: Path) -> None:
    out = prep(source, tmp_path / "crops")
    pixels, columns = read_all(out)
    expected = {}
    for i in range(2):
        for x, y in tissue(i, side=256, mpp=0.5).xy:
            expected[f"s{i}", float(x), float(y)] = None
    found = list(zip(columns["slide"], columns["x"].tolist(), columns["y"].tolist(), strict=True))
    assert len(found) == len(set(found)) == len(expected) and set(found) == set(expected)
    assert set(columns["patient"]) == {"p0"} and (columns["source_mpp"] == 0.5).all()
    # against a plain way: Pillow's bicubic upsampling of the whole image, then a slice
    big = {
        f"s{i}": np.pad(
            np.asarray(
                Image.open(source / f"images/s{i}.png").resize((512, 512), Image.Resampling.BICUBIC)
            ),
            ((64, 64), (64, 64), (0, 0)),
            mode="symmetric",
        )
        for i in range(2)
    }
    for row in range(0, len(pixels), 7):
        x, y = round(columns["x"][row] * 2 + 0.001) + 32, round(columns["y"][row] * 2 + 0.001) + 32
        plain = big[columns["slide"][row]][y : y + 64, x : x + 64]
        assert np.abs(plain.astype(int) - pixels[row]).mean() < 1.0


def test_blocks_are_mixed_and_training_sees_no_type(source: Path, tmp_path: Path) -> None:
    out = prep(source, tmp_path / "crops", types=False)
    index = open_index(out)
    for block in range(len(index.blocks)):
        columns = BlockReader(index).columns(block)
        assert set(columns["type"]) == {""}
        if len(columns["slide"]) > 16:
            assert set(columns["slide"]) == {"s0", "s1"}
    batch = CropBatches(index, seed=0, batch=16, window=4, rank=0, world=1, workers=0).batch_at(0)
    assert set(batch) == {"pixels", "samples"}


def test_a_finished_set_is_left_alone_and_other_settings_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prep(source, tmp_path / "crops")
    before = (out / "crops-00000-000.tar").stat().st_mtime_ns
    prep(source, tmp_path / "crops")
    assert (out / "crops-00000-000.tar").stat().st_mtime_ns == before
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other settings \(mpp: 0.25 -> 0.5\)"):
        prep(source, tmp_path / "crops", mpp=0.5)


def test_the_same_words_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    a, b = prep(source, tmp_path / "a"), prep(source, tmp_path / "b", workers=2)
    assert (a / "crops-00000-000.tar").read_bytes() == (b / "crops-00000-000.tar").read_bytes()


def test_dropping_at_the_border(source: Path, tmp_path: Path) -> None:
    kept = open_index(prep(source, tmp_path / "kept")).count
    dropped = open_index(prep(source, tmp_path / "dropped", edge="drop")).count
    assert 0 < dropped < kept


def test_images_whose_nuclei_all_lie_at_the_border(source: Path, tmp_path: Path) -> None:
    write_points(source / "nuclei" / "s1.geojson", np.array([[3.0, 9.0], [250.0, 100.0]]))
    index = open_index(prep(source, tmp_path / "crops", edge="drop"))
    about = index.header["slides"]
    assert about["s1"]["count"] == 0 and about["s1"]["dropped"] == 2 and about["s0"]["count"] > 0
    check.run(check.Check(data=tmp_path / "crops"))
    write_points(source / "nuclei" / "s0.geojson", np.array([[3.0, 9.0]]))
    with pytest.raises(UserError, match="every nucleus is nearer to the border"):
        prep(source, tmp_path / "none", edge="drop")


def test_one_nucleus(source: Path, tmp_path: Path) -> None:
    write_points(source / "nuclei" / "s0.geojson", np.zeros((0, 2)))
    write_points(source / "nuclei" / "s1.geojson", np.array([[128.0, 100.0]]))
    assert open_index(prep(source, tmp_path / "crops")).count == 1
    assert check.run(check.Check(data=tmp_path / "crops"))["problems"] == []


def test_an_image_before_the_others_extends_the_set(source: Path, tmp_path: Path) -> None:
    table = source / "slides.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], lines[2]]) + "\n")
    out = prep(source, tmp_path / "crops")
    first = (out / "crops-00000-000.tar").read_bytes()
    table.write_text("\n".join(lines) + "\n")
    prep(source, tmp_path / "crops")
    assert (out / "crops-00000-000.tar").read_bytes() == first
    _, columns = read_all(out)
    assert set(columns["slide"]) == {"s0", "s1"}
    assert check.run(check.Check(data=out))["problems"] == []


def test_more_shards_than_files_may_be_open(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prep(source, tmp_path / "crops", shard_mb=1, block=8, size=96)
    monkeypatch.setattr(reader_module, "KEPT", 2)
    index = open_index(out)
    assert len(index.header["shards"]) > 3
    before = len(list(Path("/proc/self/fd").iterdir()))
    reader = BlockReader(index)
    with ThreadPoolExecutor(4) as pool:
        pixels = list(pool.map(reader.pixels, range(len(index.blocks))))
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2
    assert sum(map(len, pixels)) == index.count
    reader.close()


def test_out_that_is_a_file_and_balance_without_a_number_are_said_first(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="is a file; give a folder"):
        prep(source, source / "slides.csv")
    with pytest.raises(UserError, match="balance= needs per_slide="):
        prep(source, tmp_path / "out", balance="type")
    assert not (tmp_path / "out").exists()


def test_check_passes_and_draws(source: Path, tmp_path: Path) -> None:
    out = prep(source, tmp_path / "crops")
    result = check.run(check.Check(data=out, out=tmp_path / "check", batch=32))
    assert result["problems"] == [] and result["mixing"]["slides_in_a_batch"] == 2
    sheet = Image.open(tmp_path / "check" / "contact_sheet.png")
    assert sheet.size[0] == 20 * 66
    header = open_index(out).header
    np.testing.assert_allclose(result["mean"], header["mean"], atol=1e-5)
    np.testing.assert_allclose(result["std"], header["std"], atol=1e-5)


@pytest.mark.parametrize("member", ["offset", "meta_offset"])
def test_check_finds_a_flipped_bit(source: Path, tmp_path: Path, member: str) -> None:
    out = prep(source, tmp_path / "crops")
    index = open_index(out)
    tar = out / "crops-00000-000.tar"
    payload = bytearray(tar.read_bytes())
    payload[int(index.blocks[1][member]) + 400] ^= 4
    tar.write_bytes(payload)
    with pytest.raises(UserError, match=r"problem.*block 1 of .*has changed since"):
        check.run(check.Check(data=out, out=tmp_path / "check"))
    assert json.loads((tmp_path / "check" / "check.json").read_text())["problems"]


def test_check_finds_a_repeated_nucleus(tmp_path: Path) -> None:
    from lemon_muse.data.writer import ShardWriter
    from tests.conftest import blob_columns, blobs

    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "set", size=32, mpp=0.25) as writer:
        for start in (0, 20):  # rows 20..31 stand in both blocks
            writer.write(blobs(32, 32, rng), blob_columns(start, 32))
    with pytest.raises(UserError, match="12 nuclei stand in the set twice"):
        check.run(check.Check(data=tmp_path / "set"))


def spoil_mpp(folder: Path) -> None:
    path = folder / "slides.csv"
    path.write_text(path.read_text().replace(",0.5,", ",,"))


def spoil_image(folder: Path) -> None:
    path = folder / "images" / "s0.png"
    path.write_bytes(path.read_bytes()[:2000])


def spoil_point(folder: Path) -> None:
    write_points(folder / "nuclei" / "s1.geojson", np.array([[10.0, 300.0]]))


def spoil_json(folder: Path) -> None:
    (folder / "nuclei" / "s1.geojson").write_text("{")


def spoil_column(folder: Path) -> None:
    path = folder / "slides.csv"
    path.write_text(path.read_text().replace("nuclei,mpp", "nuclei,um"))


def empty_all(folder: Path) -> None:
    for i in range(3):
        write_points(folder / "nuclei" / f"s{i}.geojson", np.zeros((0, 2)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_mpp, "mpp"),
        (spoil_image, "s0.png cannot be read"),
        (spoil_point, "outside its image of 256 x 256 px"),
        (spoil_json, "s1.geojson is not"),
        (spoil_column, "must have the columns"),
        (empty_all, "no nucleus"),
    ],
)
def test_bad_sources_are_one_sentence_and_exit_2(
    source: Path,
    tmp_path: Path,
    spoil,
    said: str,
) -> None:
    spoil(source)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.cli",
            "prep",
            "crops",
            f"data={source}",
            f"out={tmp_path / 'out'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lemon-muse: ") and said in last
    assert not list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "out/index.json").exists()


def test_an_empty_nucleus_file_among_others_is_fine(source: Path, tmp_path: Path) -> None:
    write_points(source / "nuclei" / "s1.geojson", np.zeros((0, 2)))
    out = prep(source, tmp_path / "out")
    assert set(open_index(out).header["slides"]) == {"s0"}


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        prep(tmp_path / "nowhere", tmp_path / "out")


def test_a_disk_that_is_too_small_is_said_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(RunError, match="MiB are free; make room"):
        prep(source, tmp_path / "out")


def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    """BRCA-M2C: the count of the labels, and dark pixels in the middle of the crops."""
    out = prep(shared_data / "brca-m2c", tmp_path / "out", split="val", block=256)
    pixels, columns = read_all(out)
    assert len(pixels) == 3596 and len(set(columns["patient"])) == 10
    middle = pixels[:, 28:36, 28:36].mean()
    rim = pixels[:, :8].mean()
    assert middle < rim - 15
