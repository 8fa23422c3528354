"""prep rois: pictures and nuclei as on the slide, readable by strangers, read as crops, checked."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import check, rois
from data_prep.nuclei_table import read_table
from lemon_muse.data import geometry, stain
from lemon_muse.data.reader import CropBatches, RoiCropReader, RoiReader
from lemon_muse.data.shards import Index, open_index
from lemon_muse.data.slides import open_slide
from lemon_muse.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"side": 64.0, "group": 3, "shard_mb": 1, "min_nuclei": 3, "quality": 95, "margin": 24}
SIDE = 256


def prep(data: Path, out: Path, **changes: object) -> Path:
    return rois.run(rois.Rois(data=data, out=out, **{"workers": 0, **SMALL, **changes}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(nuclei_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prep(nuclei_folder, tmp_path_factory.mktemp("set") / "rois")


def all_rois(index: Index) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    reader = RoiReader(index)
    return [(reader.pixels(b), reader.columns(b)) for b in range(len(index.blocks))]


def test_pictures_and_nuclei_are_those_of_the_slide(
    made: Path, nuclei_folder: Path, slide_folder: Path
) -> None:
    index = open_index(made, kind="rois")
    assert index.size == SIDE and len(index.blocks) > 20
    seen = set()
    for image, columns in all_rois(index):
        name = str(columns["slide"][0])
        left, top, side = (float(columns[k][0]) for k in ("left", "top", "side"))
        table = read_table(nuclei_folder / f"{name}.parquet")
        inside = (
            (table.x >= left) & (table.x < left + side) & (table.y >= top) & (table.y < top + side)
        )
        assert sorted(columns["id"].tolist()) == sorted(table.id[inside].tolist())
        where = {int(i): (x, y) for i, x, y in zip(table.id, table.x, table.y, strict=True)}
        for i, x, y in zip(columns["id"], columns["x"], columns["y"], strict=True):
            assert (x + left, y + top) == pytest.approx(where[int(i)], abs=1e-3)
            assert (name, int(i)) not in seen
            seen.add((name, int(i)))
        with open_slide(slide_folder / f"{name}.svs") as slide:
            plain = slide.read(0, int(left), int(top), SIDE, SIDE)
        assert np.abs(plain.astype(int) - image).mean() < 3  # JPEG


def test_inner_nuclei_come_first(made: Path) -> None:
    index = open_index(made)
    for row, (_, columns) in zip(index.blocks, all_rois(index), strict=True):
        xy = np.stack([columns["x"], columns["y"]], 1)
        _, kept = geometry.crop(np.zeros((SIDE, SIDE, 3), np.uint8), xy, size=48, edge="drop")
        np.testing.assert_array_equal(kept, np.arange(row["inner"]))
        assert len(xy) == row["count"]


def test_the_stain_of_each_slide_stands_in_the_index(made: Path) -> None:
    """As read as crops: Macenko over all nuclei's windows, which are more than were looked at."""
    index = open_index(made).as_crops(48)
    reader = RoiCropReader(index)
    pixels: dict[str, list[np.ndarray]] = {name: [] for name in index.header["slides"]}
    for block in np.flatnonzero(index.blocks["count"]).tolist():
        name = str(reader.columns(block)["slide"][0])
        pixels[name].append(reader.pixels(block).reshape(-1, 3))
    compared = 0
    for name, parts in pixels.items():
        said = index.header["slides"][name]["stain"]
        if not parts:
            continue
        wanted = stain.describe(np.concatenate(parts))
        assert np.abs(np.subtract(said["lab_mean"], wanted["lab_mean"])).max() < 2
        if said["vectors"] and wanted["vectors"]:
            cosine = (np.array(said["vectors"]) * np.array(wanted["vectors"])).sum(1)
            assert np.rad2deg(np.arccos(cosine.clip(-1, 1))).max() < 4
            compared += 1
    assert compared > 1


def test_plain_tar_and_plain_webdataset_read_them(made: Path) -> None:
    index = open_index(made)
    shard = index.shard(0)
    with tarfile.open(shard) as tar:
        first = tar.getnames()[0]
        assert first == "000000000000.roi.jpg"
        image = np.asarray(Image.open(io.BytesIO(tar.extractfile(first).read())))  # type: ignore[union-attr]
        meta = np.load(io.BytesIO(tar.extractfile("000000000000.meta.npz").read()))  # type: ignore[union-attr]
    assert image.shape == (SIDE, SIDE, 3) and len(meta["x"]) == index.blocks["count"][0]
    np.testing.assert_array_equal(image, RoiReader(index).pixels(0))
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgb8"))
    assert len(samples) == (index.blocks["shard"] == 0).sum()
    np.testing.assert_array_equal(samples[0]["roi.jpg"], image)


@pytest.mark.parametrize("edge", ["drop", "reflect"])
def test_the_same_store_gives_crops(made: Path, edge: str) -> None:
    """The batches of LEMON from ROIs, against crops cut by hand out of the decoded pictures."""
    index = open_index(made)
    crops = index.as_crops(48, edge=edge)
    column = "inner" if edge == "drop" else "count"
    assert crops.count == index.blocks[column].sum() and crops.size == 48
    batches = CropBatches(crops, seed=3, batch=16, window=8, rank=0, world=1, workers=2)
    pictures = all_rois(index)
    seen = []
    for batch in batches.iterate(0, batches.order.steps_a_pass):
        blocks, rows = crops.locate(batch["samples"])
        for pixels, block, row in zip(batch["pixels"], blocks, rows, strict=True):
            image, columns = pictures[block]
            padded = np.pad(image, ((48, 48), (48, 48), (0, 0)), mode="symmetric")
            left, top = (int(np.floor(columns[k][row] - 24 + 0.5)) + 48 for k in "xy")
            np.testing.assert_array_equal(pixels, padded[top : top + 48, left : left + 48])
        seen += batch["samples"].tolist()
    assert len(seen) == len(set(seen)) == crops.count // 16 * 16
    found = batches.reader.columns(0)
    assert (
        len(found["x"]) == crops.blocks["count"][0] and found["slide"][0] in index.header["slides"]
    )


def test_crops_larger_than_the_margin_are_refused(made: Path) -> None:
    with pytest.raises(UserError, match="do not fit into the margin of 24 px"):
        open_index(made).as_crops(64)


def test_killed_and_rerun_it_is_the_same_set(
    made: Path, nuclei_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, died, real = tmp_path / "rois", 0, Path.replace
    for limit in range(40):
        left = [limit % 6 + 1]

        def replace(self: Path, target: Path, left: list[int] = left) -> Path:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        try:
            prep(nuclei_folder, out)
            break
        except KeyboardInterrupt:
            died += 1
    names = [p.name for p in made.iterdir() if p.is_file()]
    assert died >= 3
    assert all((out / name).read_bytes() == (made / name).read_bytes() for name in names)


def test_dense_sampling_and_webp(made: Path, nuclei_folder: Path, tmp_path: Path) -> None:
    few = prep(nuclei_folder, tmp_path / "a", sampling="dense", per_slide=2, encoding="webp")
    index = open_index(few)
    assert index.encoding == "webp" and all(
        slide["rois"] == 2 for slide in index.header["slides"].values()
    )
    random = open_index(prep(nuclei_folder, tmp_path / "b", per_slide=2))
    assert index.count > random.count


def test_rois_at_another_resolution(nuclei_folder: Path, tmp_path: Path) -> None:
    index = open_index(prep(nuclei_folder, tmp_path / "a", mpp=0.5))
    assert index.size == 128
    _, columns = all_rois(index)[0]
    assert columns["side"][0] == 256 and columns["mpp"][0] == 0.5
    assert columns["x"].max() <= 128


def test_nothing_left_says_why(nuclei_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no ROI is left .*\d+ for few nuclei"):
        prep(nuclei_folder, tmp_path / "a", min_nuclei=10_000)
    with pytest.raises(UserError, match=r"5 for a slide smaller than a ROI"):
        prep(nuclei_folder, tmp_path / "b", side=400)


def test_check_passes_and_draws(made: Path, tmp_path: Path) -> None:
    result = check.run(check.Check(data=made, out=tmp_path, overlays=2, batch=64))
    header = open_index(made).header
    np.testing.assert_allclose(result["mean"], header["mean"], atol=0.01)
    assert result["problems"] == [] and result["density_per_mm2"]["p50"] > 100
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert pictures == {"roi-00.png", "roi-01.png", "contact_sheet.png", "histograms.png"}


def spoil_bit(folder: Path) -> None:
    tar = folder / "rois-00000-000.tar"
    payload = bytearray(tar.read_bytes())
    payload[int(open_index(folder).blocks[2]["offset"]) + 600] ^= 8
    tar.write_bytes(payload)


def spoil_end(folder: Path) -> None:
    tar = folder / "rois-00000-000.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])


def spoil_shard(folder: Path) -> None:
    (folder / "rois-00001-000.tar").unlink()


def spoil_record(folder: Path) -> None:
    """The samples of group 0 once more: every nucleus of them stands there twice."""
    header = json.loads((folder / "index.json").read_text())
    blocks = np.load(folder / "blocks.npy")
    twice = np.concatenate([blocks, blocks[blocks["shard"] == 0]])
    np.save(folder / "blocks.npy", twice)
    import zlib

    header["blocks_crc"] = zlib.crc32((folder / "blocks.npy").read_bytes())
    (folder / "index.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_bit, "block 2 of .* has changed since it was written"),
        (spoil_end, "bytes long instead of"),
        (spoil_shard, "is missing; copy it again"),
        (spoil_record, "nuclei stand in the set twice"),
    ],
)
def test_check_finds_damage(nuclei_folder: Path, tmp_path: Path, spoil, said: str) -> None:
    out = prep(nuclei_folder, tmp_path / "rois")
    spoil(out)
    with pytest.raises(UserError, match=said):
        check.run(check.Check(data=out, overlays=0))


def test_lemon_trains_on_roi_shards(made: Path, tmp_path: Path) -> None:
    """From the command line: the same trainer, the same words."""
    words = [
        f"data={made}", f"out={tmp_path / 'run'}", "steps=2", "batch=16", "window=24",
        "backbone.name=vit_tiny", "backbone.args={depth: 1}", "method.hidden=64", "device=cpu",
        "workers=1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "train", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "encoder" / "config.json").is_file()


def test_images_of_a_folder_are_a_source(shared_data: Path, tmp_path: Path) -> None:
    """BRCA-M2C's val images: 12 ROIs of 220 µm, each with the nuclei that lie in it."""
    out = prep(
        shared_data / "brca-m2c", tmp_path / "out", split="val", side=220.0, mpp=0.5, min_nuclei=1
    )
    index = open_index(out)
    assert len(index.blocks) == 12 and index.size == 440
    assert 0.7 * 3596 < index.count < 3596
    image, columns = all_rois(index)[0]
    middle = [
        image[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].mean()
        for x, y in zip(columns["x"], columns["y"], strict=True)
        if 5 < x < 435 and 5 < y < 435
    ]
    assert np.mean(middle) < image.mean() - 15
