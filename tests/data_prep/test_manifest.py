"""prep manifest: every slide listed, with what is wrong; reruns do only what is new."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import manifest
from data_prep.manifest_file import COLUMNS, read_manifest
from data_prep.pool import in_processes
from lemon_muse.config import load
from lemon_muse.errors import UserError
from lemon_muse.synthetic import write_slide


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of known mpp, an image without, a text file, a cut file, and what is no slide."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "TCGA-ab-1234-01Z.svs", side=256, seed=1, mpp=0.25)
    write_slide(folder / "deep" / "case7_b.svs", side=512, seed=2, mpp=0.5)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "case8_plain.png")
    (folder / "text.svs").write_text("not a slide")
    whole = (folder / "TCGA-ab-1234-01Z.svs").read_bytes()
    (folder / "cut.svs").write_bytes(whole[: len(whole) // 2])
    (folder / ".hidden.svs").write_text("x")
    (folder / "notes.txt").write_text("x")
    return folder


def make(data: object, out: Path, **words: object) -> dict[str, dict[str, str]]:
    """Run the job as the command line does; rows by slide."""
    texts = [f"data={data}", f"out={out}", *(f"{k}={v}" for k, v in words.items())]
    cfg = load(manifest.Manifest, texts if "workers" in words else [*texts, "workers=0"])
    assert manifest.run(cfg) == out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(out.name)] == [out.name]
    return {row["slide"]: row for row in rows}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture, workers: int
) -> None:
    rows = make(slides, tmp_path / "M.csv", workers=workers)
    assert sorted(rows) == ["TCGA-ab-1234-01Z", "case7_b", "case8_plain", "cut", "text"]
    first = rows["TCGA-ab-1234-01Z"]
    path = slides / "TCGA-ab-1234-01Z.svs"
    expected = {
        "path": str(path), "width": "256", "height": "256", "levels": "1", "mpp": "0.25",
        "mpp_source": "file", "vendor": "aperio", "patient": "TCGA-AB-1234",
        "bytes": str(path.stat().st_size), "status": "ok", "reason": "",
    }  # fmt: skip
    assert {k: first[k] for k in expected} == expected
    assert rows["case7_b"]["mpp"] == "0.5" and rows["case7_b"]["levels"] == "2"
    plain = rows["case8_plain"]
    assert (plain["status"], plain["width"], plain["height"]) == ("no mpp", "60", "40")
    assert "give mpp=" in plain["reason"] and plain["mpp"] == ""
    assert rows["cut"]["status"] == rows["text"]["status"] == "unreadable"
    assert "cannot be read" in rows["cut"]["reason"] and rows["cut"]["width"] == ""
    said = capsys.readouterr().out
    assert "5 slides: 2 ok, 2 unreadable, 1 no mpp" in said
    assert [r["slide"] for r in read_manifest(tmp_path / "M.csv")] == [
        "TCGA-ab-1234-01Z",
        "case7_b",
    ]


def test_words_for_all(slides: Path, tmp_path: Path) -> None:
    rows = make(slides, tmp_path / "M.csv", mpp=0.4, patient=r"(case\d)_", organ="lung")
    assert [rows[s]["patient"] for s in ("case7_b", "case8_plain", "TCGA-ab-1234-01Z")] == [
        "case7",
        "case8",
        "",
    ]
    assert (rows["case8_plain"]["mpp"], rows["case8_plain"]["mpp_source"]) == ("0.4", "given")
    assert rows["case7_b"]["mpp"] == "0.5", "the word is for slides that state none"
    assert {row["organ"] for row in rows.values()} == {"lung"}


def test_a_table(slides: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(
        "path,slide,patient,mpp,organ,scanner\n"
        f"{slides}/deep/case7_b.svs,A,p1,0.45,skin,S1\n"
        f"{slides}/case8_plain.png,,,0.3,,\n"
        f"{slides}/TCGA-ab-1234-01Z.svs,,,,,\n"
        f"{slides}/gone.svs,,,,,\n"
        "text.svs,,,,,\n"
    )
    (tmp_path / "text.svs").write_text("relative to the table")
    rows = make(table, tmp_path / "M.csv")
    keys = ("patient", "mpp", "mpp_source", "file_mpp", "organ", "scanner", "status")
    assert [rows["A"][k] for k in keys] == ["p1", "0.45", "given", "0.5", "skin", "S1", "ok"]
    assert (rows["case8_plain"]["mpp"], rows["case8_plain"]["patient"]) == ("0.3", "")
    assert rows["TCGA-ab-1234-01Z"]["patient"] == "TCGA-AB-1234"
    assert "there is no slide" in rows["gone"]["reason"]
    assert rows["text"]["path"] == str(tmp_path / "text.svs")
    both = make(f"{slides},{table}", tmp_path / "N.csv")
    assert len(read_manifest(tmp_path / "N.csv", status="")) == 7
    assert both["A"]["mpp"] == "0.45", "a table adds to what was walked"


def test_a_rerun_opens_only_what_changed(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = manifest.inspect

    def counted(name: str) -> dict[str, str]:
        opened.append(Path(name).name)
        return plain(name)

    monkeypatch.setattr(manifest, "inspect", counted)
    before = make(slides, tmp_path / "M.csv")
    assert len(opened) == 5
    opened.clear()
    assert make(slides, tmp_path / "M.csv") == before
    assert sorted(opened) == ["cut.svs", "text.svs"], "what failed is tried again"
    opened.clear()
    os.utime(slides / "deep" / "case7_b.svs", ns=(1, 10**18))
    after = make(slides, tmp_path / "M.csv", mpp=0.3)
    assert "case7_b.svs" in opened and len(opened) == 3
    assert after["case8_plain"]["mpp"] == "0.3", "words count for slides that were not opened"


def test_a_killed_run_goes_on(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = manifest.inspect

    def dies(name: str) -> dict[str, str]:
        if len(opened) == 3:
            raise KeyboardInterrupt
        opened.append(name)
        return plain(name)

    monkeypatch.setattr(manifest, "inspect", dies)
    monkeypatch.setattr(manifest, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make(slides, tmp_path / "M.csv")
    assert not (tmp_path / "M.csv").exists(), "nothing that looks finished"
    first = [name for name in opened if "cut" not in name and "text" not in name]
    opened[:] = []

    def works(name: str) -> dict[str, str]:
        opened.append(name)
        return plain(name)

    monkeypatch.setattr(manifest, "inspect", works)
    rows = make(slides, tmp_path / "M.csv")
    assert len(rows) == 5 and first and not set(first) & set(opened)


def test_twins_are_marked(slides: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    source = slides / "TCGA-ab-1234-01Z.svs"
    for name in ("a.svs", "b.svs"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
    (folder / "c").mkdir()
    (folder / "c" / "a.svs").write_bytes((slides / "deep" / "case7_b.svs").read_bytes())
    make(folder, tmp_path / "M.csv")
    rows = {Path(r["path"]): r for r in read_manifest(tmp_path / "M.csv", status="")}
    assert rows[folder / "a.svs"]["status"] == "ok"
    assert "the same file as" in rows[folder / "b.svs"]["reason"]
    assert "the same name" in rows[folder / "c" / "a.svs"]["reason"]


def test_the_checksum_notices(tmp_path: Path) -> None:
    path = tmp_path / "x"
    rng = np.random.default_rng(0)
    seen = set()
    for size in (0, 5, 2**20, 2**20 + 5, 3 * 2**20):
        content = bytearray(rng.bytes(size))
        for place in (None, 0, size - 1):
            if place is not None and size:
                content[place] ^= 1
            path.write_bytes(content)
            seen.add(manifest.checksum(path))
    assert len(seen) == 1 + 4 * 3


def test_nothing_to_read(slides: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="has no slide"):
        make(empty, tmp_path / "M.csv")
    (empty / "x.svs").write_text("x")
    with pytest.raises(UserError, match="none of the 1 slides can be read"):
        make(empty, tmp_path / "M.csv")
    assert (tmp_path / "M.csv").is_file(), "the csv says why"
    with pytest.raises(UserError, match="not there"):
        make(tmp_path / "nowhere", tmp_path / "M.csv")
    for text, message in (("a,b\n1,2\n", "column 'path'"), ("path,mpp\nx,big\n", "not a number")):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            make(tmp_path / "t.csv", tmp_path / "N.csv")
    with pytest.raises(UserError, match="is no manifest"):
        make(slides, tmp_path / "t.csv")
    with pytest.raises(UserError, match="one group"):
        make(slides, tmp_path / "N.csv", patient="case")


def test_a_crash_of_the_reader_is_a_reason() -> None:
    items = ["a", "crash", "b", "raise", *map(str, range(8)), "c"]
    found = {i: (r, p) for i, r, p in in_processes(fragile, items, workers=2)}
    assert sorted(found) == sorted(items)
    assert "crashed" in found["crash"][1] and found["crash"][0] is None
    assert "ZeroDivisionError" in found["raise"][1]
    assert all(found[i] == (i * 2, "") for i in items if i not in ("crash", "raise"))


def fragile(item: str) -> str:
    """Runs in another process."""
    if item == "crash":
        os.abort()
    if item == "raise":
        raise ZeroDivisionError
    return item * 2


def test_the_real_slides(shared_data: Path, tmp_path: Path) -> None:
    rows = make(shared_data / "wsi", tmp_path / "M.csv")
    cmu, tcga = rows["cmu-1-small-region"], rows["tcga-cr-7395-01a-01-ts1"]
    assert (cmu["mpp"], cmu["status"], cmu["scanner"]) == ("0.499", "ok", "CPAPERIOCS")
    assert (tcga["status"], tcga["patient"], tcga["levels"]) == ("no mpp", "TCGA-CR-7395", "2")
    assert "give mpp=" in tcga["reason"]


def test_pictures_of_checks_are_no_slides(tmp_path: Path) -> None:
    for folder in (tmp_path / "slides", tmp_path / "slides" / "out" / "check"):
        folder.mkdir(parents=True)
        Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(folder / "a.png")
    (tmp_path / "slides" / "out" / "check" / "check.json").write_text("{}")
    out = manifest.run(
        manifest.Manifest(data=str(tmp_path / "slides"), out=tmp_path / "m.csv", mpp=0.5, workers=0)
    )
    assert [row["path"] for row in read_manifest(out)] == [str(tmp_path / "slides" / "a.png")]
