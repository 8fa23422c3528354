"""prep nuclei: one table a slide, duplicates merged, wrong coordinates noticed, safe to rerun."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from data_prep import nuclei, nuclei_sanity
from data_prep.nuclei_formats.matching import match
from data_prep.nuclei_formats.record import nuclei as columns
from data_prep.nuclei_table import read_about, read_table
from lemon_muse.config import load
from lemon_muse.data.slides import open_slide
from lemon_muse.errors import UserError
from lemon_muse.synthetic import Tissue, tissue

SIDES = {"a": 700, "b": 600}
MPP = 0.5


@pytest.fixture(scope="module")
def fields() -> dict[str, Tissue]:
    """Two generated slides with every nucleus known."""
    return {n: tissue(i, side=SIDES[n], mpp=MPP, slide=i) for i, n in enumerate(SIDES)}


@pytest.fixture
def manifest(tmp_path: Path, fields: dict[str, Tissue]) -> Path:
    """The slides as images, and the manifest that lists them and a broken one."""
    lines = ["slide,path,width,height,mpp,mpp_source,patient,status,reason"]
    for name, field in fields.items():
        Image.fromarray(field.image).save(tmp_path / f"{name}.png")
        side = SIDES[name]
        lines.append(f"{name},{name}.png,{side},{side},{MPP},given,p-{name},ok,")
    lines.append("broken,broken.svs,,,,,,unreadable,no slide")
    path = tmp_path / "manifest.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_points(path: Path, xy: np.ndarray, score: np.ndarray | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    score = np.ones(len(xy)) if score is None else score
    lines = [f"{x},{y},{s}" for (x, y), s in zip(xy.tolist(), score.tolist(), strict=True)]
    path.write_text("x,y,score\n" + "\n".join(lines) + "\n")


def prep(manifest: Path, **words: object) -> Path:
    out = manifest.parent / "nuclei"
    given = {"data": manifest, "out": out, "workers": 0, **words}
    return nuclei.run(load(nuclei.Nuclei, [f"{k}={v}" for k, v in given.items()]))


def index_of(out: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((out / "nuclei.json").read_text())
    return tree


def test_tables_hold_what_was_detected(manifest: Path, fields: dict[str, Tissue]) -> None:
    folder = manifest.parent / "found"
    for name, field in fields.items():
        write_points(folder / f"{name}.csv", field.xy)
    extra = np.array([[-3.0, 5.0], [5.0, -0.1], [700.0, 5.0], [1e4, 1e4]])
    twin = fields["a"].xy[:1] + 1.0  # 0.7 µm away, and worse
    points = np.concatenate([fields["a"].xy, extra, twin])
    score = np.concatenate([np.ones(len(points) - 1), [0.5]])
    write_points(folder / "a.csv", points, score)
    write_points(folder / "stranger.csv", extra)
    out = prep(manifest, detections=folder)
    for name, field in fields.items():
        table = read_table(out / f"{name}.parquet")
        assert table.x.dtype == table.y.dtype == np.float32 and table.id.dtype == np.int64
        np.testing.assert_array_equal(np.stack([table.x, table.y], 1), field.xy)
        assert table.id.tolist() == list(range(len(field.xy)))
        # and without our reader
        plain = parquet.read_table(out / f"{name}.parquet")
        assert plain.column_names == ["id", "x", "y", "type", "score", "area"]
        about = json.loads(plain.schema.metadata[b"lemon_muse"])
        assert about["slide"] == name and about["patient"] == f"p-{name}"
        assert (about["mpp"], about["width"]) == (MPP, SIDES[name])
        assert about["format"] == "tables" and about["count"] == len(field.xy)
    index = index_of(out)
    a = index["slides"]["a"]
    assert (a["read"], a["outside"], a["merged"]) == (len(points), 4, 1)
    assert index["count"] == sum(len(f.xy) for f in fields.values())
    assert index["unusable"] and [Path(p).name for p in index["unused"]] == ["stranger.csv"]
    assert a["darker"] > 0.7 and index["slides"]["b"]["warning"] == ""


WRONG: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x and y look swapped": lambda xy: xy[:, ::-1],
    "coordinates look scaled by 0.5": lambda xy: xy * 0.5,
    "coordinates look scaled by 2": lambda xy: xy * 2,
    "coordinates look scaled by 4": lambda xy: xy * 4,
    "shifted or belong to another slide": lambda xy: (xy + np.array([41, 23])) % 690,
}


@pytest.mark.parametrize("sentence", list(WRONG))
def test_wrong_coordinates_are_noticed(
    manifest: Path, fields: dict[str, Tissue], sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_points(manifest.parent / "found" / "a.csv", WRONG[sentence](fields["a"].xy))
    out = prep(manifest, detections=manifest.parent / "found")
    about = index_of(out)["slides"]["a"]
    assert sentence in about["warning"] and about["darker"] < 0.6
    assert sentence in caplog.text
    assert index_of(out)["missing"] == ["b"]


class Shifted:
    """A slide whose scanned area begins at (300, 200): what an MRXS file looks like."""

    mpp, bounds = MPP, (300, 200)

    def __init__(self, image: np.ndarray) -> None:
        self.image = np.full((1100, 1200, 3), 255, np.uint8)
        self.image[200 : 200 + len(image), 300 : 300 + image.shape[1]] = image
        self.height, self.width = self.image.shape[:2]
        self.levels = [(self.width, self.height, 1.0)]

    def level_for(self, mpp: float) -> int:
        return 0

    def thumbnail(self, max_side: int) -> np.ndarray:
        return self.image

    def region(self, x: float, y: float, width: float, height: float, *, mpp: float) -> np.ndarray:
        left, top = max(0, round(x)), max(0, round(y))
        return self.image[top : max(top, round(y + height)), left : max(left, round(x + width))]


def test_a_forgotten_bounds_offset_is_noticed(fields: dict[str, Tissue]) -> None:
    slide, xy = Shifted(fields["a"].image), fields["a"].xy

    def told(points: np.ndarray) -> str:
        return nuclei_sanity.check(slide, columns(points)).warning  # type: ignore[arg-type]

    assert told(xy + np.array(slide.bounds)) == ""
    assert told(xy) == "the bounds offset (300, 200) looks missing"
    assert "added where it should not be" in told(xy + 2 * np.array(slide.bounds))


def test_rerun_does_only_what_is_missing(manifest: Path, fields: dict[str, Tissue]) -> None:
    folder = manifest.parent / "found"
    for name, field in fields.items():
        write_points(folder / f"{name}.csv", field.xy)
    out = prep(manifest, detections=folder)
    before = {n: (out / f"{n}.parquet").read_bytes() for n in SIDES}
    index = (out / "nuclei.json").read_bytes()
    stamp = (out / "a.parquet").stat().st_mtime_ns
    (out / "b.parquet").write_bytes(before["b"][:-9])  # damaged
    prep(manifest, detections=folder)
    assert (out / "a.parquet").stat().st_mtime_ns == stamp
    assert {n: (out / f"{n}.parquet").read_bytes() for n in SIDES} == before
    assert (out / "nuclei.json").read_bytes() == index
    write_points(folder / "b.csv", fields["b"].xy[:9])  # the detector ran again
    prep(manifest, detections=folder)
    assert read_about(out / "b.parquet")["count"] == 9
    assert (out / "a.parquet").stat().st_mtime_ns == stamp
    assert index_of(prep(manifest, detections=folder, merge=0))["settings"]["merge"] == 0
    assert (out / "a.parquet").stat().st_mtime_ns != stamp
    assert not list(out.glob("*.tmp"))


def test_a_process_gives_the_same(manifest: Path, fields: dict[str, Tissue]) -> None:
    write_points(manifest.parent / "found" / "a.csv", fields["a"].xy)
    out = prep(manifest, detections=manifest.parent / "found")
    before = (out / "a.parquet").read_bytes()
    for path in out.iterdir():
        path.unlink()
    prep(manifest, detections=manifest.parent / "found", workers=2)
    assert (out / "a.parquet").read_bytes() == before


def test_a_bad_file_stops_no_other_slide(manifest: Path, fields: dict[str, Tissue]) -> None:
    folder = manifest.parent / "found"
    write_points(folder / "a.csv", fields["a"].xy)
    (folder / "b.json").write_text('{"mag": 40, "nuc": {"1": ')
    with pytest.raises(UserError, match=r"b\.json is not complete, readable JSON"):
        prep(manifest, detections=folder)
    out = manifest.parent / "nuclei"
    index = index_of(out)
    assert list(index["slides"]) == ["a"] and list(index["failed"]) == ["b"]
    assert not (out / "b.parquet").exists()


def test_no_nuclei_is_no_mistake(manifest: Path) -> None:
    (manifest.parent / "found").mkdir()
    (manifest.parent / "found" / "a.json.gz").write_bytes(b"")
    out = prep(manifest, detections=manifest.parent / "found")
    assert len(read_table(out / "a.parquet")) == 0
    assert index_of(out)["slides"]["a"]["format"] == "hoverfast"


def test_builtin_detector_where_no_detections_are_given(manifest: Path) -> None:
    out = prep(manifest)
    about = index_of(out)["slides"]["a"]
    assert about["format"] == "builtin" and about["darker"] > 0.75 and about["warning"] == ""
    table = read_table(out / "a.parquet")
    assert len(table) > 100 and np.isfinite(table.area).all() and (table.score <= 1).all()


def test_real_slide(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "wsi" / "cmu-1-small-region.svs"
    if not path.is_file():
        pytest.skip(f"no {path}")
    (tmp_path / "m.csv").write_text(f"slide,path,mpp,patient,status\ncmu,{path},0.499,,ok\n")
    out = prep(tmp_path / "m.csv")
    table = read_table(out / "cmu.parquet")
    assert 1000 < len(table) < 4000 and table.about["darker"] > 0.8
    with open_slide(path, mpp=0.499) as slide:
        wrong = columns(np.stack([table.y, table.x], 1))
        assert nuclei_sanity.check(slide, wrong).warning == "x and y look swapped"


def test_files_find_their_slides(tmp_path: Path) -> None:
    slides = {name: Path(f"/slides/{name}.svs") for name in ("s.1", "s.10", "t", "u", "v", "w")}
    names = ["s.1.json.gz", "s.10/cells.json", "s.10/cell_detection.geojson",
             "t_cells.json.snappy", "u.svs.geojson", "v/cell_detection/cells.json",
             "w/cell_masks.json", "w/log.txt", "x.csv"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, unused = match(tmp_path, slides)
    assert {k: str(p.relative_to(tmp_path)) for k, p in found.items()} == {
        "s.1": names[0], "s.10": names[1], "t": names[3], "u": names[4], "v": names[5],
        "w": names[6],
    }  # fmt: skip
    assert [p.name for p in unused] == ["x.csv"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "u.svs.geojson").touch()
    with pytest.raises(UserError, match="two detection files"):
        match(tmp_path, slides)
    with pytest.raises(UserError, match="named like a slide"):
        match(tmp_path, {"other": Path("other.svs")})
    with pytest.raises(UserError, match="there is no folder"):
        match(tmp_path / "none", slides)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("slide,path\na,a.png\n", "no manifest"),
        ("slide,path,mpp,status\na,a.png,,ok\n", "has no mpp"),
        ("slide,path,mpp,status\na,a.png,.5,ok\na,b.png,.5,ok\n", "twice"),
        ("slide,path,mpp,status\na,gone.png,.5,ok\n", "make the manifest again"),
        ("slide,path,mpp,status\n../a,a.png,.5,ok\n", "cannot be a file's name"),
    ],
)
def test_bad_manifests(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        prep(tmp_path / "manifest.csv")
    with pytest.raises(UserError, match="there is no manifest"):
        prep(tmp_path / "gone.csv")
