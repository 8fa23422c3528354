"""`submit` without a cluster: the script it writes, how words become tasks, and wrong words."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import executors, snapshot, stages, states
from launch.cli import main
from launch.slurm import Submit
from lemon_muse.config import validate
from lemon_muse.errors import UserError
from tests.slurm.drill import TINY

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
EXPORT = ["export", "run=r", "out=o"]
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
    assert stages.settings_of(tasks[3]).model_dump()["optim"]["lr"] == 3e-4


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
        (["executor=debug", "ranks=2", "--", *JOB], "has one rank"),
        (["gpus=1", "ranks=2", "--", *JOB], "a GPU for each rank"),
        (["sweep.seed=0,1,0", "--", *JOB], "a value twice"),
        (["extra.signal=USR1", "--", *JOB], "extra.signal cannot be set"),
        (["extra.cpus-per-task=3", "--", *JOB], "extra.cpus_per_task cannot be set"),
        (["--", "after=12", *JOB], "after= holds for all stages"),
        (["--", "dry_run=true", *JOB], "dry_run= holds for all stages"),
        (["nodes=2", *JOB], "write -- before the job"),
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


def test_a_local_failure_has_its_reason_and_can_be_mended(
    crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nothing"
    words = ["prep", "check", f"data={missing}", f"out={tmp_path / 'check'}"]
    out = said(capsys, f"out={tmp_path / 's'}", "executor=local", "--", *words, code=2)
    assert "failed" in out and str(missing) in out
    (folder,) = (tmp_path / "s").iterdir()
    assert main(["status", str(folder), "json_lines=true"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["state"] == "failed" and str(missing) in row["reason"]
    missing.symlink_to(crop_shards)
    assert "ran 1 task(s)" in said(capsys, f"resubmit={folder}")
    state = states.read(folder, 0)
    assert state is not None and state.state == "done" and state.starts == 2
    assert "nothing to submit again" in said(capsys, f"resubmit={folder}")


def living(group: int) -> list[str]:
    """Command lines of a process group, without zombies that a lazy init has not collected."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            line = (folder / "cmdline").read_text()
        except OSError:
            continue
        if int(owner) == group and state != "Z":
            found.append(line.replace("\0", " "))
    return found


def test_a_local_run_that_is_interrupted_leaves_no_process_and_says_so(
    crop_shards: Path, tmp_path: Path
) -> None:
    words = ["executor=local", f"out={tmp_path / 's'}", "snapshot=false", "--", "train"]
    words += [f"data={crop_shards}", f"out={tmp_path / 'run'}", *TINY, "steps=100000"]
    began = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "submit", *words],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background ignores Ctrl-C for all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 240
        while not (tmp_path / "run" / "metrics.jsonl").is_file():
            assert began.poll() is None, began.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.2)
        os.killpg(began.pid, signal.SIGINT)
        assert "interrupted" in began.communicate(timeout=120)[1] and began.returncode == 1
        end = time.monotonic() + 60
        while living(began.pid):
            assert time.monotonic() < end, living(began.pid)
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(began.pid, signal.SIGKILL)
    (folder,) = (tmp_path / "s").iterdir()
    (state,) = states.read_all(folder)
    assert state.state == "failed" and state.reason


def test_options_of_sbatch_are_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    extra = ["extra.nice=10", "extra.exclusive=true", "extra.requeue=false", "mem_gb=1.5"]
    out = said(capsys, *extra, "after=7:8", "--dry-run", "--", *JOB, "--", *EXPORT)
    first, second = out.split("# export")
    for line in ("--nice=10", "--exclusive", "--mem=1536MB", "--dependency=afterok:7:8"):
        assert f"#SBATCH {line}\n" in first
    assert "requeue" not in first and "--dependency=afterok:JOB_BEFORE" in second


def test_a_submission_keeps_the_recipe_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.yaml"
    mine.write_text("steps: 7\n")
    words = snapshot.keep_files(["train", "mine.yaml", "data=d", "out=o"], tmp_path / "kept")
    mine.write_text("steps: 8\n")
    assert stages.settings_of(words).model_dump()["steps"] == 7
    # A recipe that ships is in the copy of the code.
    shipped = ("train", "demo.yaml", "data=d")
    assert snapshot.keep_files(shipped, tmp_path / "kept") == shipped


def test_a_job_that_submits_does_not_hand_on_its_own_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outer = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "SUBMITIT_EXECUTOR": "slurm"}
    for name, value in {**outer, "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "mine"}.items():
        monkeypatch.setenv(name, value)
    with executors.outside_of_jobs():
        assert not outer.keys() & os.environ.keys()
        assert os.environ["SLURM_CONF"] == "/c" and os.environ["SBATCH_ACCOUNT"] == "mine"
    assert {name: os.environ[name] for name in outer} == outer
    # Outside of a job they are the user's own.
    monkeypatch.delenv("SLURM_JOB_ID")
    with executors.outside_of_jobs():
        assert os.environ["SLURM_ARRAY_TASK_ID"] == "2"


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
    assert stages.with_workers(["train", "demo.yaml", "data=d"], 12)[-1] == "workers=11"
    given = ["train", "demo.yaml", "data=d", "workers=3"]
    assert stages.with_workers(given, 12) == given
    assert stages.with_workers(["export", "run=r"], 12) == ["export", "run=r"]


def test_every_setting_is_taken_back_from_its_record() -> None:
    first = Submit(
        job=("train", "demo.yaml", "data=d"), setup=("a", "b"), extra={"mail-type": "END"}
    )
    assert validate(Submit, json.loads(first.model_dump_json())) == first
    with pytest.raises(UserError, match="is no submission"):
        states.submission(Path("/"))
