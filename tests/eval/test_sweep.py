"""Sweeps: every combination once, failures told at the end, nothing done twice."""

import json
from pathlib import Path

import pytest

from eval.run import Eval, run
from eval.sweep import plan
from launch.cli import main
from lemon_muse.errors import RunError, UserError
from lemon_muse.synthetic import write_images
from tests.eval.standins import small_encoder
from tests.fixtures import hest, nucls


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_images(folder / "tissue", slides=9, side=128, seed=3)
    nucls.write(folder / "nucls")
    hest.write(folder / "hest", ("NCBI783", "TENX94", "TENX98"))
    small_encoder(folder / "encoder")
    (folder / "sweep.yaml").write_text(
        f"encoders: [{folder / 'encoder'}, 'floor:colour']\n"
        "benchmarks:\n"
        f"  - {{benchmark: folder, root: {folder / 'tissue'}, probe: knn}}\n"
        f"  - {{benchmark: nucls, root: {folder / 'nucls'}, probe: logistic}}\n"
        f"  - {{benchmark: nucls, root: {folder / 'nucls'}, probe: knn, plan: 'cross:hospital'}}\n"
        f"  - {{benchmark: hest, root: {folder / 'hest'}, task: breast}}\n"
        "floors: false\n"
        "workers: 0\n"
    )
    return folder


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_combination_once_and_a_killed_sweep_goes_on(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Eval(sweep=material / "sweep.yaml", out=tmp_path, device="cpu")
    run(words)
    found = {
        (r["encoder"].split("@")[0], r["benchmark"], r["task"], r["probe"]) for r in rows(tmp_path)
    }
    assert found == {
        (encoder, *mark)
        for encoder in ("small", "floor:colour")
        for mark in (
            ("folder", "class", "knn"),
            ("nucls", "super", "logistic"),
            ("nucls", "super cross:hospital", "knn"),
            ("hest", "breast", "ridge"),
        )
    }
    whole = rows(tmp_path)
    # Killed while a row was written: only what is missing is computed.
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    counted = []
    from eval import measure

    real = measure._found
    monkeypatch.setattr(measure, "_found", lambda *a: counted.append(a[2]) or real(*a))
    run(words)
    assert len(counted) == 1
    key = ("encoder", "benchmark", "task", "probe", "metric", "value")
    assert [[r[k] for k in key] for r in rows(tmp_path)] == [[r[k] for k in key] for r in whole]
    monkeypatch.setattr(measure, "_found", None)
    run(words)


def test_one_failure_is_told_at_the_end_and_stops_no_other(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        f"encoders: [no/such, 'floor:colour']\n"
        f"benchmarks: [{{benchmark: folder, root: {material / 'tissue'}}}]\n"
        "seeds: [0, 1]\nprobe: knn\nfloors: false\n"
    )
    assert main(["eval", f"sweep={path}", f"out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr()
    assert "2 of 4 combinations failed" in said.err and "no/such" in said.err
    assert {r["seed"] for r in rows(tmp_path / "out")} == {0, 1}
    with pytest.raises(RunError, match="Mend them and run the same words"):
        run(Eval(sweep=path, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("encoders: [a]\n", "needs the lists"),
        ("encoders: [a\n", "not readable YAML"),
        ("encoders: [a]\nbenchmarks: [{benchmark: folder}]\n", "root= is needed"),
        (
            "encoders: [a]\nbenchmarks: [{benchmark: folder, root: x, taks: y}]\n",
            "did you mean 'task'",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        plan(path, {})
