"""What tasks and the scheduler say, put together: reasons, states and the table of `status`."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch import resubmit, states, status
from launch.cli import main
from launch.cluster import GONE, Seen, look_up
from launch.states import State
from launch.task import _device_of
from lemon_muse.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("train", "demo.yaml", "data=crops", "out=run")


def submission(folder: Path, *found: State, executor: str = "slurm") -> Path:
    """A submission that was made in `folder`'s parent."""
    tasks = [{"number": s.number, "words": s.words, "stage": 0, "job": s.job} for s in found]
    settings = {"executor": executor, "job": list(WORDS)}
    record = {"settings": settings, "cwd": str(folder.parent), "tasks": tasks}
    folder.mkdir()
    (folder / states.SUBMISSION).write_text(json.dumps(record))
    for state in found:
        states.write(folder, state)
    return folder


@pytest.mark.parametrize(
    ("shown", "local_rank", "device"),
    [
        ("0,1,2,3,4,5,6,7", 5, 5),  # a whole node: each rank sees all
        ("2,3", 1, 1),  # two GPUs of a shared node, indices begin at 0
        ("6", 3, 0),  # --gpus-per-task=1: each rank sees its own
        ("4,5", 3, 1),  # --gpus-per-task=2
        ("GPU-8f1c,GPU-77aa", 1, 1),
        ("", 1, 1),  # not set, or no GPU at all
    ],
)
def test_the_gpu_of_a_rank_is_among_those_it_sees(
    shown: str, local_rank: int, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert _device_of(local_rank) == device
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


def test_the_cause_is_named_and_not_who_lost_it(tmp_path: Path) -> None:
    lost = RunError(f"{states.LOST}: it was killed")
    states.note_failure(tmp_path, 0, "12-0", 0, lost)
    states.note_failure(tmp_path, 0, "12-0", 3, ValueError("bad\nC++ frame 1\nframe 2"))
    states.note_failure(tmp_path, 0, "12-0", 1, lost)
    said = states.first_failure(tmp_path, 0, "12-0")
    assert said.startswith("rank 3 on ") and said.endswith(": ValueError: bad")
    # Another start, another job and another task have failures of their own.
    assert states.first_failure(tmp_path, 0, "12-1") == ""
    assert states.first_failure(tmp_path, 0, "12-*") == said
    assert states.first_failure(tmp_path, 1, "12-0") == ""
    states.note_failure(tmp_path, 0, "13-0", 2, UserError("no file"))
    assert states.first_failure(tmp_path, 0, "13-*").endswith(": no file")


RUNNING, FAILED = State(0, WORDS, "running", "12"), State(0, WORDS, "failed", "12", reason="why")


@pytest.mark.parametrize(
    ("state", "seen", "word", "reason"),
    [
        (RUNNING, None, "running", ""),
        (RUNNING, Seen("RUNNING", "None"), "running", ""),
        (replace(RUNNING, state="submitted"), Seen("PENDING", "Priority"), "pending", "Priority"),
        (RUNNING, Seen("NODE_FAIL", "None"), "lost: node_fail", ""),
        (RUNNING, Seen("CANCELLED by 0", "0:0"), "lost: cancelled by 0", ""),
        (RUNNING, Seen("FAILED", "NonZeroExitCode"), "failed", "before the job began"),
        (RUNNING, GONE, "lost: unknown to slurm", ""),
        (FAILED, None, "failed", "why"),
        (FAILED, Seen("COMPLETING", "None"), "completing", "why"),
        (FAILED, Seen("FAILED", "NonZeroExitCode"), "failed", "why"),
        # SLURM puts a job back whose task SIGTERM has ended.
        (FAILED, Seen("PENDING", "BeginTime"), "pending", "why"),
        (replace(RUNNING, state="done"), Seen("COMPLETED", "None"), "done", ""),
        (replace(RUNNING, state="done"), GONE, "done", ""),
    ],
)
def test_state_and_reason(
    state: State, seen: Seen | None, word: str, reason: str, tmp_path: Path
) -> None:
    said, why = status.stands(tmp_path, state, seen)
    assert said == word and (reason in why if reason else why == "")


def test_a_rank_that_failed_before_rank_0_began_is_the_reason(tmp_path: Path) -> None:
    states.note_failure(tmp_path, 0, "12-0", 1, UserError("there is no folder"))
    word, why = status.stands(tmp_path, RUNNING, Seen("FAILED", "NonZeroExitCode"))
    assert word == "failed" and why.startswith("rank 1 on") and "there is no folder" in why


def test_status_finds_a_relative_run_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = submission(tmp_path / "sub", replace(RUNNING, job="", starts=2, host="n1"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 100\nbatch: 8\n")
    rows = [{"step": s, "loss": 3 - s / 100, "crops_per_s": 80.0} for s in range(1, 41)]
    old = ["x" * 99 for _ in range(100_000)]  # 10 MB, of which the end is read
    lines = [*old, *map(json.dumps, rows), '{"step": 41, "los']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir("/")
    (line,) = status.look((folder,))
    assert (line.step, line.steps, line.rate, line.left) == (40, 100, 10.0, 6.0)
    assert (
        line.loss == 2.6 and line.where == "n1 (start 2)" and line.task.endswith("train demo.yaml")
    )
    # The run is told about once, by its submission.
    assert len(status.look((tmp_path,))) == 1


def test_status_takes_a_folder_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "lr=1e-3,seed=0"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    assert main(["status", str(run)]) == 0
    assert "lr=1e-3,seed=0" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def squeue_that(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Commands squeue and sacct of a SLURM in a certain condition, which none can be put into."""
    for name in ("squeue", "sacct"):
        path = folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_nothing_is_submitted_again_while_slurm_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = submission(tmp_path / "sub", RUNNING)
    squeue_that(tmp_path, monkeypatch, "echo 'Unable to contact slurm controller' >&2", "exit 1")
    assert look_up(["12"]) == {}
    with pytest.raises(UserError, match="does not answer"):
        resubmit.resubmit(folder)


def test_a_job_that_slurm_has_forgotten_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue_that(tmp_path, monkeypatch, "echo 'error: Invalid job id specified' >&2", "exit 1")
    assert look_up(["12", "13_4", ""]) == {"12": GONE, "13_4": GONE}
    folder = submission(tmp_path / "sub", RUNNING)
    assert [state.number for state in resubmit.failed(folder)] == [0]


def test_an_array_is_looked_up_by_its_id_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue_that(tmp_path, monkeypatch, "echo '7_0|RUNNING|None'", "echo '7_1|PENDING|Resources'")
    assert set(look_up(["7"])) == {"7_0", "7_1"}
    assert set(look_up(["7_1"])) == {"7_1"}


def test_the_module_of_a_snapshot_wins_over_the_working_folder(tmp_path: Path) -> None:
    """What the script sets: a submission from a checkout must not run the checkout."""
    from launch.executors import setup_lines
    from launch.slurm import Submit
    from launch.snapshot import take

    code = take(tmp_path / "a b" / "code")
    script = "\n".join(
        [*setup_lines(Submit(), code), f"{sys.executable} -m launch.task", "env | grep RENDEZVOUS"]
    )
    (code / "launch" / "task.py").write_text("print(__file__)")
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == str(code / "launch" / "task.py")
    assert "LEMON_MUSE_RENDEZVOUS_S=600" in done.stdout
