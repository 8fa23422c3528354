"""Several jobs with one `out`, and what must not be in it: duplicates, lost predictions, NaN."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eval import results
from eval.bootstrap import Interval
from eval.features import encode
from eval.run import Eval, run
from eval.sweep import plan
from launch.cli import main
from lemon_muse.errors import RunError, UserError
from tests.eval.standins import TinyEncoder
from tests.eval.test_plans import table
from tests.fixtures import nucls

KEY = results.Key("hash", "nucls", "1", "default", "knn", 0, "test", "super")
OTHER = KEY._replace(encoder_hash="another")

HOOK = """
import torch


class Net(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.layer = scale, torch.nn.Linear(3, 8)

    def forward(self, images):
        return self.layer(images.mean((2, 3))) * self.scale


def net(seed=0, scale=1.0, name="same"):
    torch.manual_seed(seed)
    half = (0.5, 0.5, 0.5)
    found = {"network": Net(scale), "image_size": 40, "mpp": 0.25, "mean": half, "std": half}
    return {**found, "name": name}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    nucls.write(root)
    return root


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"hook_{os.urandom(4).hex()}"
    (tmp_path / f"{name}.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    return f"python:{name}.net"


def rows_of(key: results.Key) -> list[results.Row]:
    found = {name: Interval(0.5, 0.4, 0.6) for name in ("accuracy", "macro_f1")}
    return results.make_rows(key, found, encoder="same", n=3, seconds=1.0, params={})


def test_a_row_that_another_job_has_written_gets_no_second(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, rows_of(KEY)[:1])
    # Cut off while the second line was written.
    with path.open("a") as stream:
        stream.write(json.dumps(rows_of(KEY)[1])[:50])
    results.append(path, rows_of(KEY))
    results.append(path, rows_of(OTHER))
    results.append(path, rows_of(KEY))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["encoder_hash"], row["metric"]) for row in lines] == [
        (key.encoder_hash, row["metric"]) for key in (KEY, OTHER) for row in rows_of(key)
    ]


def test_two_jobs_that_ask_for_one_name_both_keep_their_predictions(tmp_path: Path) -> None:
    nuclei = table(n=30, people=4)
    rows = np.arange(len(nuclei))
    # Both ask before either has written.
    paths = [results.predictions_path(tmp_path, key, encoder="same") for key in (KEY, OTHER)]
    for number, (path, key) in enumerate(zip(paths, (KEY, OTHER), strict=True)):
        scores = np.eye(3)[np.full(len(rows), number)]
        results.write_predictions(path, key, nuclei, rows, scores, encoder="same")
    for number, key in enumerate((KEY, OTHER)):
        path = results.predictions_path(tmp_path, key, encoder="same")
        assert results.has_predictions(path, key)
        with np.load(path) as file:
            assert (file["predicted"] == number).all()


def test_processes_with_one_out_write_each_row_once(data: Path, hook: str, tmp_path: Path) -> None:
    words = f"benchmark=nucls root={data} out={tmp_path / 'out'} probe=linear floors=false"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "eval", *words.split(), f"encoder={hook}"],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    said = [job.communicate()[1].decode() for job in started]
    assert [job.returncode for job in started] == [0, 0], said
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    found = [(*results.key_of(row), row["metric"]) for row in map(json.loads, lines)]
    assert len(found) == len(set(found)) > 4


def test_scores_that_are_not_finite_are_no_result(data: Path, hook: str, tmp_path: Path) -> None:
    given = Eval(
        encoder=f"{hook},scale=1.0e+30",
        benchmark="nucls",
        root=data,
        out=tmp_path / "out",
        floors=False,
        workers=0,
        device="cpu",
    )
    with pytest.raises(RunError, match="linear gives scores that are not finite"):
        run(given.model_copy(update={"probe": "linear"}))
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_one_feature_for_many_windows_is_refused() -> None:
    class First(TinyEncoder):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)[:1]

    encoder: nn.Module = First().eval()
    pixels = np.zeros((4, 40, 40, 3), np.uint8)
    assert encode(encoder, pixels[:1]).shape == (1, 16)
    with pytest.raises(RunError, match="1 features for 4 windows"):
        encode(encoder, pixels)


def test_a_probe_that_the_encoder_cannot_take_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"eval encoder=floor:colour benchmark=nucls root={data} out={tmp_path} floors=false"
    assert main([*words.split(), "probe=finetune"]) == 2
    assert "cannot take probe=finetune" in capsys.readouterr().err
    assert main([*words.split(), "probe=knn,finetune"]) == 0
    assert "note: floor:colour@40px0.25 cannot take probe=finetune" in capsys.readouterr().err


def test_val_and_another_plan_exclude_each_other(data: Path, tmp_path: Path) -> None:
    from lemon_muse.synthetic import write_images

    root = tmp_path / "tissue"
    write_images(root, slides=9, side=128, seed=1)
    given = Eval(
        encoder="floor:colour",
        benchmark="folder",
        root=root,
        out=tmp_path / "out",
        split="val",
        probe="knn",
        floors=False,
        workers=0,
        device="cpu",
    )
    with pytest.raises(UserError, match="plan=cross:patient divides otherwise"):
        run(given.model_copy(update={"plan": "cross:patient"}))
    chosen = run(given)[0]["params"]["chosen_on"]
    assert chosen.endswith("folds of train patients")


def test_what_is_typed_beats_the_common_words_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "encoders: ['floor:colour', {encoder: 'floor:majority', seed: 9}]\n"
        "benchmarks: [{benchmark: nucls, root: a}]\n"
        "probe: knn,linear\n"
        "seed: 3\n"
    )
    first, second = plan(path, {"probe": "logistic", "seed": 5})
    assert (first.probe, first.seed) == ("logistic", 5)
    assert (second.probe, second.seed) == ("logistic", 9)


def test_a_defect_in_one_combination_stops_no_other(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.benchmarks.nucls import Nucls

    load = Nucls.load

    def broken(self: Nucls, root: Path, request: object) -> object:
        if "broken" in str(root):
            raise KeyError("x")
        return load(self, root, request)  # type: ignore[arg-type]

    monkeypatch.setattr(Nucls, "load", broken)
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "encoders: ['floor:colour']\n"
        f"benchmarks: [{{benchmark: nucls, root: broken}}, {{benchmark: nucls, root: {data}}}]\n"
        "probe: knn\nfloors: false\nworkers: 0\n"
    )
    with pytest.raises(RunError, match="1 of 2 combinations failed"):
        run(Eval(sweep=path, out=tmp_path / "out"))
    assert (tmp_path / "out" / "results.jsonl").is_file()
