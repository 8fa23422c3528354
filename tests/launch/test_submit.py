"""`submit` without a cluster: the script it writes, how words become tasks, and wrong words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm, snapshot, stages, states
from launch.cli import main
from launch.slurm import Submit
from lemon_muse.config import validate
from lemon_muse.errors import UserError

GOLDEN = Path(__file__).with_name("h100_4x8.sbatch")
CLUSTER = [
    "out=/shared/submit",
    "python=/shared/venv/bin/python",
    "nodes=4",
    "gpus=8",
    "cpus=12",
    "mem_gb=480",
    "hours=24",
    "partition=h100",
    "account=pathology",
    "qos=normal",
    "constraint=h100",
    "comment=lemon",
    'setup=["module load cuda/12.8","export NCCL_SOCKET_IFNAME=ib0"]',
    "extra.mail-type=END,FAIL",
]
JOB = ["train", "lemon_vits8.yaml", "data=/shared/crops", "out=/shared/runs/lemon"]


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["submit", *words]) == code
    got = capsys.readouterr()
    return got.out if code == 0 else got.err


def test_the_script_of_four_nodes_is_the_golden_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, *CLUSTER, "--dry-run", "--", *JOB) == GOLDEN.read_text()


def test_a_dry_run_shows_every_stage_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = said(
        capsys,
        f"out={tmp_path / 'sub'}",
        "--dry-run",
        "--",
        *["gpus=0", "tasks=3", "prep", "crops", "data=slides", "out=crops"],
        "--",
        *["nodes=2", "gpus=4", "train", "lemon_vits8.yaml", "data=crops", "out=run"],
        "--",
        *["gpus=1", "eval", "encoder=run", "benchmark=folder", "root=x"],
    )
    first, second, third = out.split("# train")[0], *out.split("# train")[1].split("# eval")
    assert "--array=0-2%3" in first and "--ntasks-per-node=1" in first and "gpus" not in first
    assert "--nodes=2" in second and "--ntasks-per-node=4" in second and "workers=7" in second
    assert "--gpus-per-node=1" in third and "--nodes=1" in third
    assert not (tmp_path / "sub").exists()


def test_a_sweep_is_every_combination_with_a_folder_each() -> None:
    words = ["train", "demo.yaml", "data=d", "out=runs/x"]
    tasks = stages.expand(words, sweep={"optim": {"lr": "1e-3,3e-4"}, "seed": [0, 1]})
    assert [task[len(words) :] for task in tasks] == [
        ("optim.lr=1e-3", "seed=0", "out=runs/x/lr=1e-3,seed=0"),
        ("optim.lr=1e-3", "seed=1", "out=runs/x/lr=1e-3,seed=1"),
        ("optim.lr=3e-4", "seed=0", "out=runs/x/lr=3e-4,seed=0"),
        ("optim.lr=3e-4", "seed=1", "out=runs/x/lr=3e-4,seed=1"),
    ]
    assert slurm.settings_of(tasks[3]).model_dump()["optim"]["lr"] == 3e-4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--", *JOB, "--"], "needs a job after every --"),
        (["--"], "needs a job after --"),
        ([], "needs a job after --"),
        (["--", "gpus=1"], "names no job"),
        (["--", "trian", "x.yaml"], "did you mean 'train'"),
        (["--", "status"], "cannot be submitted"),
        (["--", "submit"], "cannot be submitted"),
        (["--", "train", "demo.yaml", "data=d", "stepz=3"], "did you mean 'steps'"),
        (["nodez=2", "--", "train"], "did you mean 'nodes'"),
        (["nodes=2", "--", "prep", "crops", "data=d"], "runs as one process"),
        (["tasks=2", "--", *JOB], "does not share its work"),
        (["sweep.seed=0,1", "--", "train", "demo.yaml", "data=d"], "a sweep needs out="),
        (["sweep.seed=", "--", *JOB], "has no value"),
        (["hours=0.02", "--", *JOB], "leaves no time before the signal"),
        (["tasks=2", "--", "prep", "crops", "data=d", "--", *JOB], "belong to one stage"),
        (["executor=local", "nodes=2", "--", *JOB], "has one node"),
    ],
)
def test_wrong_words_are_one_sentence_before_anything_is_submitted(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dry = [] if "executor=local" in words else ["--dry-run"]
    out = said(capsys, f"out={tmp_path / 's'}", *dry, *words, code=2)
    assert sentence in out and out.count("\n") == 1
    assert not list((tmp_path / "s").glob("*/logs"))


def test_without_slurm_the_sentence_says_what_to_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = said(capsys, f"out={tmp_path / 's'}", "--", *JOB, code=2)
    assert "there is no SLURM here" in out and "executor=local" in out


def test_local_and_debug_run_the_same_words(
    crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for executor in ("local", "debug"):
        out = tmp_path / executor
        said(
            capsys,
            f"out={tmp_path / 'sub'}",
            f"name={executor}",
            f"executor={executor}",
            "--",
            *["prep", "check", f"data={crop_shards}", f"out={out}"],
        )
        assert any(out.iterdir())
    found = sorted((tmp_path / "sub").iterdir())
    assert len(found) == 2
    for folder in found:
        state = states.read(folder, 0)
        assert state is not None and state.state == "done" and state.starts == 1
    assert main(["status", str(tmp_path / "sub"), "json_lines=true"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["state"] for row in rows] == ["done", "done"]


def test_a_local_failure_has_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prep", "check", f"data={tmp_path / 'nothing'}"]
    out = said(capsys, f"out={tmp_path / 's'}", "executor=local", "--", *words, code=2)
    assert "failed" in out and str(tmp_path / "nothing") in out
    (folder,) = (tmp_path / "s").iterdir()
    state = states.read(folder, 0)
    assert state is not None and state.state == "failed"


def test_the_snapshot_runs_without_the_checkout(tmp_path: Path) -> None:
    code = snapshot.take(tmp_path / "code")
    script = (
        "import lemon_muse, launch.cli, sys; assert lemon_muse.__file__.startswith(sys.argv[1]); "
        "sys.exit(launch.cli.main(['train', 'lemon_vits8.yaml', 'data=x', '--print-config']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(code)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(code), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "steps:" in done.stdout, done.stderr
    (code / "lemon_muse" / "mark").write_text("kept")
    assert snapshot.take(code) == code and (code / "lemon_muse" / "mark").is_file()


def test_workers_follow_the_cpus_unless_they_are_given() -> None:
    assert slurm.with_workers(["train", "demo.yaml", "data=d"], 12)[-1] == "workers=11"
    given = ["train", "demo.yaml", "data=d", "workers=3"]
    assert slurm.with_workers(given, 12) == given
    assert slurm.with_workers(["export", "run=r"], 12) == ["export", "run=r"]


def test_every_setting_is_taken_back_from_its_record() -> None:
    first = Submit(
        job=("train", "demo.yaml", "data=d"), setup=("a", "b"), extra={"mail-type": "END"}
    )
    assert validate(Submit, json.loads(first.model_dump_json())) == first
    with pytest.raises(UserError, match="is no submission"):
        states.submission(Path("/"))
