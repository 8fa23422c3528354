"""What a submission remembers: its tasks, their words and how each of them stands.

`<folder>/submission.json` is written by submit; `<folder>/tasks/<number>.json` by the task itself
while it runs, so that one command tells how things stand with or without SLURM's accounting.
"""

import json
import os
import socket
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lemon_muse.data.files import write_atomic
from lemon_muse.errors import RunError, UserError

SUBMISSION = "submission.json"
ENDED = ("done", "failed")
LOST = "lost another rank"  # how a failure begins that another rank has caused


@dataclass(frozen=True)
class State:
    """How a task stands.

    Attributes:
        number: of the task in its submission.
        words: of its job.
        state: 'submitted', 'running', 'requeued', 'done' or 'failed'.
        job: id of the scheduler; '' where there is none.
        host: of rank 0.
        starts: how often it was started.
        updated: UTC time, ISO 8601.
        reason: why it failed or was put back.
    """

    number: int
    words: tuple[str, ...]
    state: str
    job: str = ""
    host: str = ""
    starts: int = 0
    updated: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        return " ".join(self.words)


def path_of(folder: Path, number: int) -> Path:
    return folder / "tasks" / f"{number}.json"


def write(folder: Path, state: State) -> State:
    """Store a state, atomically, with the time of now."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    state = replace(state, updated=now)
    path = path_of(folder, state.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(asdict(state), indent=1).encode())
    return state


def read(folder: Path, number: int) -> State | None:
    """The state of a task; None where it was never written."""
    try:
        said = json.loads(path_of(folder, number).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return State(**{**said, "words": tuple(said["words"])})


def read_all(folder: Path) -> list[State]:
    """The states of all tasks of a submission, by number.

    Raises:
        UserError: the folder is no submission.
    """
    found = []
    for task in submission(folder)["tasks"]:
        state = read(folder, task["number"])
        state = state or State(task["number"], tuple(task["words"]), "submitted")
        # A task that has not started does not know its job.
        found.append(state if state.job else replace(state, job=task["job"]))
    return found


def submission(folder: Path) -> dict[str, Any]:
    """What was submitted: {'settings', 'cwd', 'tasks': [{'number', 'words', 'stage', 'job'}]}.

    Raises:
        UserError: the folder is no submission.
    """
    try:
        said = json.loads((folder / SUBMISSION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{folder} is no submission (no {SUBMISSION}); give the folder that 'lemon-muse "
            f"submit' printed."
        ) from None
    return {"cwd": ".", **said}


def note_failure(folder: Path, number: int, start: str, rank: int, error: BaseException) -> None:
    """Keep the traceback of a rank that died: of several ranks only the first is the cause.

    Args:
        start: word for this start of the job; failures of other starts do not count.
    """
    path = folder / "tasks" / f"{number}.{start}.rank{rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(traceback.format_exception(error))
    # Of a message of many lines (torch's have C++ frames) the first says what happened.
    ours = isinstance(error, UserError | RunError)
    short = str(error) if ours else "".join(traceback.format_exception_only(error))
    short = short.strip().split("\n")[0]
    when = datetime.now(UTC).isoformat(timespec="milliseconds")
    write_atomic(path, f"{when} {socket.gethostname()} rank {rank}\n{short}\n{text}".encode())


def first_failure(folder: Path, number: int, start: str) -> str:
    """One line on the rank that failed first: 'rank 1 on node-3: ValueError: …'; '' if none did.

    Args:
        start: word of a start, or a pattern of several, as '12_3-*'.
    """
    notes = []
    for path in (folder / "tasks").glob(f"{number}.{start}.rank*.txt"):
        lines = path.read_text(encoding="utf-8").split("\n")
        when, host, _, rank = lines[0].split()[:4]
        # Clocks of nodes differ, and a rank that only lost the other may be quicker to say so.
        notes.append((LOST in lines[1], when, f"rank {rank} on {host}: {lines[1]}"))
    return min(notes)[2] if notes else ""


def job_id() -> str:
    """The scheduler's id of this job ('123' or '123_4'); '' outside of one."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and index:
        return f"{array}_{index}"
    return os.environ.get("SLURM_JOB_ID", "")
