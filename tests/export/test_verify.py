"""EXPORT.json, and `lemon-muse export check=FOLDER`: what differs is named, and exit code 1."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from launch.cli import main
from lemon_muse import encoder as enc
from lemon_muse.backbones import Backbone, build, timm_arguments
from lemon_muse.errors import RunError, UserError
from lemon_muse.export import FORMATS, verify
from lemon_muse.export.job import Export
from lemon_muse.export.job import run as export

FORMS = ["timm", "hf", "pt2", "onnx", "muse"]


@pytest.mark.parametrize("form", FORMS)
def test_the_record_holds_what_sha256sum_says(form: str, finished: dict[str, Path]) -> None:
    folder = finished[form]
    said = json.loads((folder / "EXPORT.json").read_text())
    sums = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name != "EXPORT.json"
    }
    assert said["sha256"] == sums and said["format"] == form
    assert 0 <= said["largest_difference"] < 1e-5
    assert said["encoder"]["mpp"] == (0.5 if form == "muse" else 0.25)
    assert said["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    # The card lists the same sums, in sha256sum's own form; it cannot hold its own.
    text = (folder / "README.md").read_text()
    listed = text.split("```text\n")[-1].split("```")[0].split("\n")
    assert {line[66:]: line[:64] for line in listed if line} == {
        name: digest for name, digest in sums.items() if name != "README.md"
    }
    assert f"features: {said['largest_difference']:.2g}." in text
    # Nothing but the export: no part of it under another name, nothing beside it.
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("form", FORMS)
def test_a_good_folder_passes(
    form: str, finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"check={finished[form]}"]) == 0
    out = capsys.readouterr().out
    assert f": {form}, " in out and "files as exported; largest difference" in out


@pytest.mark.parametrize("form", FORMS)
def test_a_byte_that_changed_is_named(
    form: str,
    finished: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in json.loads((finished[form] / "EXPORT.json").read_text())["sha256"]:
        folder = shutil.copytree(finished[form], tmp_path / name)
        payload = bytearray((folder / name).read_bytes())
        payload[len(payload) // 2] ^= 1
        (folder / name).write_bytes(payload)
        assert main(["export", f"check={folder}"]) == 1
        said = capsys.readouterr().err
        assert f"{name} has other bytes" in said and said.count("other bytes") == 1
        (folder / name).unlink()
        with pytest.raises(RunError, match=f"{name} is missing"):
            verify.check(folder)


def _reseal(folder: Path) -> None:
    """Sums that fit the files again: only the pair can tell that something is wrong."""
    said = json.loads((folder / "EXPORT.json").read_text())
    for name in said["sha256"]:
        said["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "EXPORT.json").write_text(json.dumps(said))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["output", "cls"])
def test_another_output_is_noticed_in_every_format(
    form: str, key: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    pair = load_file(finished[form] / "check.safetensors")
    if key not in pair:
        pytest.skip("one output only")
    folder = shutil.copytree(finished[form], tmp_path / "copy")
    pair[key][1, 3] += 0.01 * pair[key].abs().max()
    save_file(pair, folder / "check.safetensors")
    _reseal(folder)
    with pytest.raises(RunError, match="features differ from the stored ones by") as error:
        verify.check(folder)
    assert "the packages have the versions of the export" in str(error.value)


def test_other_heads_and_other_versions_are_said(finished: dict[str, Path], tmp_path: Path) -> None:
    """Two heads have the tensors of four: sums of an edited folder may fit, its features do not."""
    folder = shutil.copytree(finished["timm"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["num_heads"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    said = json.loads((folder / "EXPORT.json").read_text())
    now, said["packages"]["timm"] = said["packages"]["timm"], "0.9.16"
    (folder / "EXPORT.json").write_text(json.dumps(said))
    _reseal(folder)
    with pytest.raises(RunError, match=rf"differ .* exported with timm 0\.9\.16, now {now}"):
        verify.check(folder)


def test_files_that_do_not_open_are_a_sentence(finished: dict[str, Path], tmp_path: Path) -> None:
    for form, name in (("pt2", "encoder.pt2"), ("onnx", "encoder.onnx"), ("muse", "muse.pth")):
        folder = shutil.copytree(finished[form], tmp_path / form)
        (folder / name).write_bytes(b"PK\x03\x04 not a model")
        _reseal(folder)
        assert main(["export", f"check={folder}"]) == 1
        with pytest.raises(RunError, match=r"do not open|cut short|not a file"):
            verify.check(folder)


def test_folders_that_are_no_exports(
    source: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    assert main(["export", f"check={source / 'encoder'}"]) == 2
    with pytest.raises(UserError, match=r"holds no EXPORT\.json"):
        verify.check(tmp_path / "none")
    folder = shutil.copytree(finished["timm"], tmp_path / "copy")
    for text in ('{"format": "timm"', '{"format": "timm"}', '{"format": 3}', "[]"):
        (folder / "EXPORT.json").write_text(text)
        with pytest.raises(RunError, match=r"EXPORT\.json is damaged"):
            verify.check(folder)
        with pytest.raises(UserError, match=r"damaged EXPORT\.json; remove it"):
            export(Export(run=source, format="timm", out=folder))
    folder = shutil.copytree(finished["timm"], tmp_path / "more")
    (folder / "notes.txt").write_text("mine")
    assert "beside them: notes.txt" in verify.check(folder)


def test_the_words_are_checked(source: Path, tmp_path: Path) -> None:
    for words, match in (
        ({"run": source}, "out=FOLDER"),
        ({"out": tmp_path}, "exactly one of"),
        ({"run": source, "checkpoint": source, "out": tmp_path}, "exactly one of"),
        ({"check": source, "out": tmp_path}, "goes alone"),
        ({"run": source, "out": tmp_path, "format": "keras"}, "Input should be"),
    ):
        with pytest.raises(ValidationError, match=match):
            Export(**words)  # type: ignore[arg-type]


def test_an_export_replaces_nothing_but_its_own(
    source: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(source, tmp_path / "run")
    before = (run / "encoder" / "README.md").read_bytes()
    for out in (run, run / "encoder"):
        with pytest.raises(UserError, match="folder of a run or of its encoder"):
            export(Export(run=run, out=out))
    assert (run / "encoder" / "README.md").read_bytes() == before
    held = shutil.copytree(finished["hf"], tmp_path / "held")
    with pytest.raises(UserError, match="holds an export in format=hf"):
        export(Export(run=run, format="timm", out=held))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export(Export(run=run, out=tmp_path / "file"))
    # The same format again: the new one as a whole, a file of the old one gone, ours left alone.
    again = shutil.copytree(finished["timm"], tmp_path / "again")
    said = json.loads((again / "EXPORT.json").read_text())
    (again / "old.bin").write_bytes(b"old")
    (again / "notes.txt").write_text("mine")
    (tmp_path / "outside.txt").write_text("mine")
    said["sha256"] |= {"old.bin": "0", "../outside.txt": "0"}
    (again / "EXPORT.json").write_text(json.dumps(said))
    export(Export(run=run, out=again))
    assert not (again / "old.bin").exists() and (tmp_path / "outside.txt").exists()
    assert "beside them: notes.txt" in verify.check(again)


def test_an_export_that_differs_or_fails_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FORMATS["timm"]

    def worse(*given: object) -> float:
        writer(*given)  # type: ignore[arg-type]
        return float("nan")

    monkeypatch.setitem(FORMATS, "timm", worse)
    with pytest.raises(RunError, match="differs from its source by nan; nothing was written"):
        export(Export(run=source, out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_the_card_keeps_what_the_source_says(source: Path, tmp_path: Path) -> None:
    run = shutil.copytree(source, tmp_path / "run")
    encoder = enc.load(run)
    enc.save_encoder(encoder, run / "encoder", card={"Data": "blobs", "Recipe": {"steps": 3}})
    export(Export(run=run, format="timm", out=tmp_path / "one"))
    # From an export to another one: its own sections are not carried along.
    export(Export(run=tmp_path / "one", format="hf", out=tmp_path / "two"))
    for folder in ("one", "two"):
        text = (tmp_path / folder / "README.md").read_text()
        assert "## Data\n\nblobs\n" in text and '## Recipe\n\n```json\n{\n "steps": 3' in text
        assert text.count("## Export") == 1 and text.startswith("---\nlibrary_name: ")
    assert "encoder.pth" not in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize(
    ("form", "backbone", "window"),
    [
        ("lemon", Backbone(), 40),
        ("cellvit", Backbone(patch=16, heads=6, sincos=False), 224),
    ],
)
def test_layouts_of_full_size_are_repeated_too(
    form: str, backbone: Backbone, window: int, tmp_path: Path
) -> None:
    architecture, arguments = timm_arguments(backbone, window)
    encoder = enc.Encoder(
        build(backbone, window, seed=0),
        architecture=architecture,
        arguments=arguments,
        image_size=window,
        mpp=0.25,
        mean=(0.6, 0.4, 0.55),
        std=(0.2, 0.2, 0.15),
    )
    enc.save_encoder(encoder, tmp_path / "source")
    out = export(Export(run=tmp_path / "source", format=form, out=tmp_path / "out"))  # type: ignore[arg-type]
    said = verify.check(out)
    assert f"out: {form}, " in said and said.endswith("stored output 0")
    pair = load_file(out / "check.safetensors")
    key = "tokens" if form == "cellvit" else "output"
    pair[key][0, 3] += 0.1
    save_file(pair, out / "check.safetensors")
    _reseal(out)
    with pytest.raises(RunError, match="features differ from the stored ones by"):
        verify.check(out)
