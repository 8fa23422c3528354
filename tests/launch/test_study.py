"""The study: its words, its table, and a real small one that is killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.study import Study, intervals, score
from launch.study.report import Found, Line, write
from launch.study.settings import merge, trial, trials
from launch.study.table import page
from launch.study.work import Queue, _locked, _reason, eval_words
from launch.study.work import run as run_study
from lemon_muse.config import load
from lemon_muse.errors import UserError
from lemon_muse.recipe import Train
from lemon_muse.synthetic import write_images
from tests.conftest import write_blob_shards

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",
}
COMMON: dict[str, Any] = {
    "steps": 40,
    "batch": 32,
    "window": 16,
    "precision": "fp32",
    "device": "cpu",
    "method": {"hidden": 64, "out_dim": 32},
    "backbone": {"name": "vit_tiny", "patch": 8, "heads": 3, "args": {"depth": 2, "embed_dim": 48}},
    "optim": {"lr": 0.004, "clip": 1},
    "watch": {"every": 1},
    "workers": 1,
}


def study(**words: Any) -> Study:
    given: dict[str, Any] = {
        "recipes": {"one": {}, "two": {"view": {"policy": "a0"}}},
        "common": COMMON,
        "data": "crops",
        "benchmarks": {"own": {"benchmark": "folder", "root": "tissue"}},
    }
    return Study.model_validate({**given, **words})


def test_words_of_a_recipe_beat_common_ones_and_those_its_file() -> None:
    recipes = {
        "one": {"config": "demo.yaml", "without": ["backbone"], "optim.lr": 0.5, "batch": 64},
        "two": {"data": "others", "method.temperature": 0.3},
    }
    cfg = study(recipes=recipes, common={**COMMON, "window": 24, "view": {"hue": 0.05}})
    one, two = (trial(cfg, name, 7).train for name in ("one", "two"))
    file = load(Train, ["demo.yaml", "data=x"])
    assert one.backbone == file.backbone and two.backbone != file.backbone
    assert (one.batch, two.batch) == (64, 32) and one.window_px == 24
    assert one.optim.lr == 0.5 and one.optim.beta2 == file.optim.beta2 != two.optim.beta2
    assert one.view.centred and one.view.hue == 0.05  # file and common words are joined
    assert (two.method.temperature, two.method.hidden) == (0.3, 64)
    assert (str(one.data), str(two.data)) == ("crops", "others")
    assert (one.seed, one.name) == (7, "one-7") and one.out == cfg.out / "runs" / "one-7"


def test_words_of_the_study_are_not_changed_by_its_runs() -> None:
    cfg = study()
    before = json.dumps(cfg.model_dump(mode="json"))
    trials(cfg)
    assert json.dumps(cfg.model_dump(mode="json")) == before
    tree = {"a": {"b": 1}}
    merge(tree, {"a.c": {"d": 2}, "e": {"f.g": 3}})
    assert tree == {"a": {"b": 1, "c": {"d": 2}}, "e": {"f": {"g": 3}}}


def test_runs_come_seed_by_seed_and_the_reference_first() -> None:
    cfg = study(reference="two", seeds=[3, 1], only="one,two")
    names = [one.name for one in trials(cfg, cfg.chosen)]
    assert names == ["two-3", "one-3", "two-1", "one-1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"reference": "three"}, "reference=three is no recipe; there are one, two"),
        ({"only": "one,tow"}, "only= names 'tow'"),
        ({"seeds": [1, 1]}, "one seed twice"),
        ({"benchmarks": {}}, "at least one of recipes, benchmarks and seeds"),
        ({"recipes": {"a/b": {}}}, "'a/b' names files"),
        ({"recipes": {"a.b": {}}}, "'a.b' names files"),
    ],
)
def test_words_that_do_not_fit(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        study(**words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"recipes": {"one": {"optim.rl": 1}}}, "recipe one: unknown key 'optim.rl'; did you mean"),
        ({"data": None}, "recipe one has no shards"),
        ({"recipes": {"one": {"without": ["bath"]}}}, "without 'bath', which is no common word"),
        ({"benchmarks": {"own": {"benchmark": "floder", "root": "."}}}, "benchmark own: "),
        ({"benchmarks": {"own": {"benchmark": "folder", "root": "gone"}}}, "no folder gone"),
        ({"probe": "knn,logstic"}, "recipe one: probe=knn,logstic is not known; there are knn, "),
        ({"recipes": {"one": {"eval": {"windw": 3}}}}, "recipe one: unknown key 'windw'"),
    ],
)
def test_mistakes_stop_a_study_before_it_trains(
    words: dict[str, Any], said: str, crop_shards: Path, tmp_path: Path
) -> None:
    tissue = {"own": {"benchmark": "folder", "root": str(tmp_path)}}
    given = {"data": crop_shards, "benchmarks": tissue, **words, "out": tmp_path / "out"}
    with pytest.raises(UserError, match=said):
        run_study(study(**given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "study").glob("*.yaml")))
def test_every_study_that_ships_loads_with_all_its_recipes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "lemon-muse study study/" in text.split("\n\n")[0]
    joint = ["recipes.joint.data=rois"] if "\n  joint:" in text else []
    cfg = load(Study, [f"study/{path.name}", "data=crops", *joint])
    found = trials(cfg)
    assert len(found) == len(cfg.recipes) * len(cfg.seeds) >= 6 * 3
    # A batch of joint training is of ROIs, each with up to `crops_per_roi` nuclei.
    each = {one.recipe: getattr(one.train.method, "crops_per_roi", 1) for one in found}
    budgets = {one.train.steps * one.train.batch * each[one.recipe] for one in found}
    assert len(budgets) == 1 and cfg.reference in cfg.recipes


def test_the_table_marks_what_excludes_zero() -> None:
    def line(recipe: str, value: float, half: float | None) -> list[Line]:
        own = intervals.Estimate(value, value - 0.1, value + 0.1, 0.5)
        change = intervals.Estimate(value - 0.5, value - 0.5 - half, value - 0.5 + half, 0.5) \
            if half else None  # fmt: skip
        return [Line(recipe, "own", "knn", m, (0,), (value,), own, change)
                for m in intervals.METRICS]  # fmt: skip

    cfg = study(recipes={"one": {}, "two": {}, "three": {}, "four": {}}, seeds=[0])
    found = Found([*line("one", 0.5, None), *line("two", 0.6, 0.04), *line("three", 0.45, 0.09)])
    found.sizes["own"] = (80, 4)
    text = page(cfg, found, {"four-0": "train: broken"})
    assert "| one | 1 | 0.500 [0.400, 0.600] |" in text
    assert "**+0.100 [+0.060, +0.140]**" in text and "**" + "\N{MINUS SIGN}0.050" not in text
    assert "- four-0: train: broken" in text and "80 nuclei of 4 patients" in text


def test_what_has_no_predictions_of_classes_is_said_to_be_left_out(tmp_path: Path) -> None:
    marks = {"genes": {"benchmark": "hest", "root": "hest"}}
    cfg = study(benchmarks=marks, out=tmp_path, seeds=[0, 1])
    for one in trials(cfg, ["one"]):
        (one.folder / "encoder").mkdir(parents=True)
        about = {"lemon_muse": {"content_hash": "c0"}}
        (one.folder / "encoder" / "config.json").write_text(json.dumps(about))
        row = {"encoder": one.name, "probe": "ridge", "metric": "pearson", "value": 0.2}
        floor = {**row, "encoder": "floor:colour", "probe": "floors_only"}
        task = {"hash": "c0", "jobs": eval_words(cfg, one), "rows": {"genes": [row, floor]}}
        one.beside(".rows.json").write_text(json.dumps(task))
    text = write(cfg, trials(cfg), {}).read_text()
    assert text.count("genes, ridge: not in a table") == 1 and "results.jsonl" in text
    assert "floors_only" not in text


def test_the_reason_is_that_of_the_last_process(tmp_path: Path) -> None:
    cfg = study(out=tmp_path)
    (one,) = trials(cfg, ["one"])[:1]
    one.folder.parent.mkdir(parents=True)
    one.beside(".log").write_text("lemon-muse: the disk was full.\n")
    lock = _locked(one.beside(".lock"))
    assert lock is not None
    process = Queue(cfg, [one])._process(one, lock, "launch.no_such_job")
    assert process.wait() == 1
    os.close(lock)
    assert _reason(one, "train", 1).startswith("train: ended with code 1")
    with one.beside(".log").open("a") as log:
        log.write("lemon-muse: the loss is not finite.\n")
    assert "train: the loss is not finite (see" in _reason(one, "train", 1)


def test_a_benchmark_that_fails_leaves_the_rows_of_the_others(tmp_path: Path) -> None:
    write_images(tmp_path / "tissue", slides=5, side=128)
    words = {"encoder": "floor:colour", "probe": "knn", "out": str(tmp_path / "out")}
    jobs = {
        "gone": {**words, "benchmark": "folder", "root": str(tmp_path)},
        "own": {**words, "benchmark": "folder", "root": str(tmp_path / "tissue"), "floors": False},
    }
    task = {"jobs": jobs, "hash": "0", "target": str(tmp_path / "rows.json")}
    (tmp_path / "task.json").write_text(json.dumps(task))
    assert score.main(tmp_path / "task.json") == 1
    found = json.loads((tmp_path / "rows.json").read_text())
    assert list(found["rows"]) == ["own"] and "wrong folder level" in found["failed"]["gone"]
    assert {row["probe"] for row in found["rows"]["own"]} == {"knn"}
    assert found["jobs"] == jobs and found["hash"] == "0"


# A real one -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with crops/, tissue/ and study.yaml."""
    root = tmp_path_factory.mktemp("study")
    write_blob_shards(root / "crops", count=300)
    write_images(root / "tissue", slides=8, side=192)
    cfg = study(
        data=root / "crops",
        benchmarks={"own": {"benchmark": "folder", "root": str(root / "tissue")}},
        recipes={"one": {}, "two": {"view": {"policy": "a0"}}, "bad": {"optim.lr": 1e30}},
        reference="one",
        seeds=[0, 1],
        probe="knn",
        floors=False,
        draws=200,
    )  # fmt: skip
    (root / "study.yaml").write_text(yaml.safe_dump(cfg.model_dump(mode="json")))
    return root


def command(places: Path, out: Path, *words: str) -> list[str]:
    job = [sys.executable, "-m", "launch.cli", "study", str(places / "study.yaml"), f"out={out}"]
    return [*job, *words]


def until(path: Path, said: str, seconds: float = 400) -> None:
    """Wait for a text in a file."""
    end = time.monotonic() + seconds
    while not path.is_file() or said not in path.read_text():
        assert time.monotonic() < end, f"no '{said}' in {path}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_study_is_killed_stopped_and_finished(places: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / "out" / "runs"
    run.mkdir(parents=True)
    words = command(places, out, "only=one,two", "jobs=2")
    given: dict[str, Any] = {"cwd": ROOT, "env": ENV, "text": True}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    held = _locked(run / "one-0.lock")  # as another study would
    assert held is not None
    process = subprocess.Popen(words, **given, **pipes)
    until(run / "two-0" / "metrics.jsonl", '"step": 5,')
    process.kill()
    assert _locked(run / "two-0.lock") is None, "the run of a killed study goes on, and is locked"
    assert "one-0: is held by" in process.communicate()[1]
    assert not (run / "one-0").exists()
    os.close(held)
    process = subprocess.Popen(words, **given, **pipes)
    until(run / "one-0" / "metrics.jsonl", '"step": 3,')
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 1 and "stopped by SIGTERM" in said
    free = _locked(run / "one-0.lock")
    assert free is not None, "its runs have ended"
    os.close(free)
    done = subprocess.run(words, **given, capture_output=True)
    assert done.returncode == 0, done.stderr
    for name in ("one-0", "two-0", "one-1", "two-1"):
        lines = (run / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 41)), name
    check(out)
    again = subprocess.run(words, **given, capture_output=True)
    assert again.returncode == 0 and again.stderr.count("done already") == 4
    assert "| one | 2 |" in again.stdout and "Not trained yet: bad-0, bad-1." in again.stdout
    refuse(places, out)


def check(out: Path) -> None:
    """The study's numbers are those of eval's rows; the picture is one."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    told = {(r["encoder"], r["metric"]): r["value"] for r in rows}
    lines = json.loads((out / "study.json").read_text())["lines"]
    assert len(lines) == 4
    for line in lines:
        for seed, value in zip(line["seeds"], line["per_seed"], strict=True):
            assert value == pytest.approx(
                told[f"{line['recipe']}-{seed}", line["metric"]], abs=1e-6
            )
        assert line["estimate"]["value"] == pytest.approx(np.mean(line["per_seed"]))
        assert (line["difference"] is None) == (line["recipe"] == "one")
    assert (out / "study.png").read_bytes()[:4] == b"\x89PNG"


def refuse(places: Path, out: Path) -> None:
    """The same folder with other words is not taken."""
    cfg = load(Study, [str(places / "study.yaml"), f"out={out}", "only=one", "common.steps=41"])
    with pytest.raises(UserError, match=r"one-0 holds a run with other settings \(steps: 40 -> 41"):
        run_study(cfg)


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_done(places: Path, tmp_path: Path) -> None:
    words = command(places, tmp_path, "only=bad,two", "seeds=[0]", "common.steps=4", "jobs=2")
    done = subprocess.run(words, cwd=ROOT, env=ENV, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    assert "1 of 2 runs failed: bad-0" in done.stderr
    page = (tmp_path / "study.md").read_text()
    assert "- bad-0: train: the loss is not finite at step" in page
    assert "| two | 1 |" in page and "Not trained yet: one-0." in page
