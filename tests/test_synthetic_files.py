"""Files of generated tissue: what is written opens elsewhere, agrees, and is never half there."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image

from lemon_muse.errors import RunError, UserError
from lemon_muse.synthetic import CLASSES, tissue, write_images, write_slide
from lemon_muse.synthetic.draw import patch, plan


def test_images_nuclei_and_table(tmp_path: Path) -> None:
    write_images(tmp_path, slides=7, side=128, seed=3, mitotic_rate=0.1)
    with (tmp_path / "slides.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide", "patient", "image", "nuclei", "mpp", "split"]
    assert len(rows) == 7 and {r["split"] for r in rows} == {"train", "val", "test"}
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["patient"], set()).add(row["split"])
        assert Image.open(tmp_path / row["image"]).size == (128, 128)
        assert float(row["mpp"]) == 0.25
        assert json.loads((tmp_path / row["nuclei"]).read_text())["type"] == "FeatureCollection"
    assert all(len(s) == 1 for s in splits.values()), "a patient is in one split"
    field = tissue(3 * 100_003 + 2, side=128, slide=3 * 100_003 + 2, scanner=2, mitotic_rate=0.1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / rows[2]["image"])), field.image)
    check_geojson(tmp_path / rows[2]["nuclei"], field.xy, field.kinds)


def check_geojson(path: Path, xy: np.ndarray, kinds: np.ndarray) -> None:
    features = json.loads(path.read_text())["features"]
    points = np.array([f["geometry"]["coordinates"] for f in features], np.float32)
    assert np.array_equal(points, xy)
    names = [f["properties"]["classification"]["name"] for f in features]
    assert names == [CLASSES[k] for k in kinds]
    assert len({f["id"] for f in features}) == len(features)
    assert {f["geometry"]["type"] for f in features} == {"Point"}


def test_a_second_call_keeps_what_is_there_and_mends_what_is_not(tmp_path: Path) -> None:
    write_images(tmp_path, slides=3, side=64)
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    gone = tmp_path / "images" / "slide001.png"
    gone.unlink()
    write_images(tmp_path, slides=3, side=64)
    assert {p: p.read_bytes() for p in files} == {p: b for p, (b, _) in before.items()}
    kept = tmp_path / "images" / "slide000.png"
    assert kept.stat().st_mtime_ns == before[kept][1]
    with pytest.raises(UserError, match="another folder"):
        write_images(tmp_path, slides=3, side=128)


def test_slide_opens_everywhere(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.svs", side=640, seed=1, slide=2, scanner=1, mpp=0.25)
    with tifffile.TiffFile(path) as file:
        sizes = [page.shape[:2] for page in file.pages]
        first = file.pages.first
        assert sizes[:2] == [(640, 640), (320, 320)]
        assert first.is_tiled and first.description.startswith("Aperio")
        assert "MPP = 0.2500" in first.description
        assert first.tags["XResolution"].value[0] / first.tags["XResolution"].value[1] == 40_000
    image = pyvips.Image.new_from_file(str(path))
    assert (image.width, image.height, image.bands) == (640, 640, 3)
    world = plan(1, side=640, mpp=0.25, slide=2, scanner=1, mitotic_rate=0.02, glass=True)
    drawn = patch(world, x=0, y=0, width=640, height=640)
    assert np.abs(image.numpy().astype(int) - drawn).mean() < 6, "JPEG changes pixels, but little"
    check_geojson(tmp_path / "a.geojson", *world.nuclei())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.geojson", "a.svs"]


def test_openslide_reads_the_mpp(tmp_path: Path) -> None:
    openslide = pytest.importorskip("openslide", reason="openslide-python is not installed")
    path = write_slide(tmp_path / "a.svs", side=512, mpp=0.5)
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        assert slide.level_count >= 2


def test_a_killed_writer_leaves_no_finished_slide(tmp_path: Path) -> None:
    target = tmp_path / "a.svs"
    code = (
        "from pathlib import Path; from lemon_muse.synthetic import write_slide;"
        f"write_slide(Path({str(target)!r}), side=6000)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".a.svs.*.raw")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(tmp_path.glob(".a.svs.*.raw")), "it was killed while it wrote"
    assert not target.exists()


def test_a_failed_writer_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lemon_muse.synthetic.files._save_pyramid", full)
    with pytest.raises(RunError, match="No space left"):
        write_slide(tmp_path / "a.svs", side=128)
    assert [p.name for p in tmp_path.iterdir()] == ["a.geojson"]


def test_too_few_slides(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 or more"):
        write_images(tmp_path / "x", slides=2, side=64)
    assert not (tmp_path / "x").exists()
