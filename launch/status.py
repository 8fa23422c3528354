"""`lemon-muse status FOLDER…`: how submissions and runs stand."""

import json
import math
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from launch import cluster, states
from lemon_muse.config import Config
from lemon_muse.errors import UserError

COLUMNS = ("task", "job", "state", "step", "rate", "left", "loss", "probe", "where", "reason")
TAIL = 2**16  # bytes at the end of a metrics file that are read
FOLLOW_S = 2.0


class Status(Config):
    """A table of submissions and runs: `status FOLDER…` (submissions of submit, runs of train)."""

    runs: tuple[Path, ...] = Field(
        (Path("runs"),), description="folders; others are searched for submissions and runs"
    )
    json_lines: bool = Field(False, description="one JSON object a task instead of the table")
    follow: bool = Field(False, description="print new lines of the logs until all have ended")


@dataclass(frozen=True)
class Line:
    """One task or run; numbers are NaN where not known.

    `rate` is steps a second, `left` seconds to the last step.
    """

    task: str
    job: str
    state: str
    step: float = math.nan
    steps: float = math.nan
    rate: float = math.nan
    left: float = math.nan
    loss: float = math.nan
    probe: float = math.nan
    where: str = ""
    reason: str = ""

    def cells(self) -> list[str]:
        """The columns of the table."""
        step = "" if math.isnan(self.step) else f"{self.step:.0f}"
        step += "" if math.isnan(self.steps) else f"/{self.steps:.0f}"
        numbers = [
            "" if math.isnan(value) else form.format(value)
            for value, form in (
                (self.rate, "{:.3g}/s"),
                (self.loss, "{:.4g}"),
                (self.probe, "{:.3f}"),
            )
        ]
        left = "" if math.isnan(self.left) else clock(self.left)
        rate, loss, probe = numbers
        return [
            self.task,
            self.job,
            self.state,
            step,
            rate,
            left,
            loss,
            probe,
            self.where,
            self.reason,
        ]


def run(cfg: Status) -> list[Line]:
    """Print the table (or JSON lines), and follow the logs if asked.

    Raises:
        UserError: a folder is missing, or holds nothing that can be told about.
    """
    lines = look(cfg.runs)
    if cfg.json_lines:
        for line in lines:
            known = {k: v for k, v in vars(line).items() if v == v}
            print(json.dumps(known))
    else:
        print(table(lines))
    if cfg.follow:
        _follow(cfg.runs)
    return lines


def look(folders: tuple[Path, ...]) -> list[Line]:
    """A line a task of every submission and a line a run of every run folder."""
    submissions, runs = find(folders)
    standing = {folder: states.read_all(folder) for folder in submissions}
    ids = [state.job for some in standing.values() for state in some]
    seen = cluster.look_up([i for i in ids if i])
    lines: list[Line] = []
    told = set()
    for folder, some in standing.items():
        cwd = Path(states.submission(folder)["cwd"])
        for state in some:
            out = out_of(state.words, cwd)
            told.add(out.resolve() if out else None)
            lines.append(_of_task(folder, state, seen.get(state.job), out))
    lines += [of_run(run_folder) for run_folder in runs if run_folder.resolve() not in told]
    return lines


def find(folders: tuple[Path, ...]) -> tuple[list[Path], list[Path]]:
    """Submissions and run folders among these folders, or below them.

    Raises:
        UserError: a folder is missing or holds neither.
    """
    submissions: list[Path] = []
    runs: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give folders of submit or of train.")
        mine = sorted(p.parent for p in folder.rglob(states.SUBMISSION))
        trained = sorted(p.parent for p in folder.rglob("metrics.jsonl"))
        if not mine and not trained:
            raise UserError(
                f"{folder} holds no submission ({states.SUBMISSION}) and no run (metrics.jsonl)."
            )
        submissions += mine
        runs += trained
    return list(dict.fromkeys(submissions)), list(dict.fromkeys(runs))


def _of_task(
    folder: Path, state: states.State, seen: cluster.Seen | None, out: Path | None
) -> Line:
    name = f"{folder.name}:{state.number} {job_of(state.words)}"
    word, reason = stands(folder, state, seen)
    facts: dict[str, Any] = facts_of(out) if out and state.words[0] == "train" else {}
    where = state.host + (f" (start {state.starts})" if state.starts > 1 else "")
    if word != "running":
        facts.pop("left", None)
    return Line(name, state.job, word, where=where, reason=reason, **facts)


def stands(folder: Path, state: states.State, seen: cluster.Seen | None) -> tuple[str, str]:
    """State and reason, from the task's own word and the scheduler's.

    A task cannot write its own end when its node died or it was cancelled, and not that SLURM has
    put it back after it failed.
    """
    if state.state == "done" or seen is None:
        return state.state, state.reason
    if seen.is_live:
        return seen.state.split()[0].lower(), state.reason or _said(seen)
    if state.state == "failed":
        return state.state, state.reason
    # A rank other than 0 may have failed before rank 0 had begun.
    first = states.first_failure(folder, state.number, f"{state.job}-*")
    if first or seen.state == "FAILED":
        logs = folder / "logs" / f"{state.job}_0_log.err"
        return "failed", first or f"it ended before the job began or was killed; see {logs}"
    return f"lost: {seen.state.lower()}", _said(seen) or state.reason


def _said(seen: cluster.Seen) -> str:
    return "" if seen.reason in ("None", "0:0") else seen.reason


def of_run(folder: Path) -> Line:
    """A run folder that no submission tells about."""
    facts: dict[str, Any] = facts_of(folder)
    ended = facts.get("step", 0) >= facts.get("steps", math.inf)
    idle = time.time() - (folder / "metrics.jsonl").stat().st_mtime
    state = "done" if ended and (folder / "encoder").is_dir() else "run"
    reason = "" if ended or idle < 600 else f"no new line for {clock(idle)}"
    if ended or reason:
        facts.pop("left", None)
    return Line(str(folder), "", state, reason=reason, **facts)


def facts_of(out: Path) -> dict[str, float]:
    """step, steps, rate, left, loss and probe of a run folder, as far as they are known."""
    try:
        steps = float(yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["steps"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        steps = math.nan
    rows = last_rows(out / "metrics.jsonl")
    if not rows:
        return {} if math.isnan(steps) else {"steps": steps}
    facts = {"step": float(rows[-1]["step"]), "steps": steps}
    facts["loss"] = _last(rows, "loss")
    facts["probe"] = _last(rows, "probe/knn_balanced_accuracy")
    batch = _batch(out)
    per_step = [_last(rows, key) for key in ("crops_per_s", "rois_per_s")]
    rate = next((value / batch for value in per_step if value == value and batch), math.nan)
    if rate == rate and rate > 0:
        facts |= {"rate": rate, "left": (steps - facts["step"]) / rate}
    return facts


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a metrics file; [] where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the first may be cut, the last half written
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _last(rows: list[dict[str, Any]], key: str) -> float:
    return next((float(row[key]) for row in reversed(rows) if row.get(key) is not None), math.nan)


def _batch(out: Path) -> float:
    try:
        return float(yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["batch"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return 0.0


def out_of(words: tuple[str, ...], cwd: Path) -> Path | None:
    """The folder that a job writes to, which it may have been given relative to `cwd`."""
    from launch.stages import settings_of

    try:
        found = getattr(settings_of(words), "out", None)
    except UserError:
        found = None
    return cwd / found if found else None


def job_of(words: tuple[str, ...]) -> str:
    """The job and the recipe of words, short."""
    return " ".join(Path(word).name for word in words if "=" not in word or word.endswith(".yaml"))


def table(lines: list[Line]) -> str:
    """The columns that any line fills, aligned; the reason comes last and may be long."""
    rows = [line.cells() for line in lines]
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    shown = [[COLUMNS[i] for i in used], *([row[i] for i in used] for row in rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(used))]
    padded = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in shown)
    return "\n".join(row.rstrip() for row in padded)


def clock(seconds: float) -> str:
    """'2 d 03:04', '1:02:03' or '4:05'."""
    whole = int(max(0, seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def _follow(folders: tuple[Path, ...]) -> None:
    """Print what is added to the logs of submissions until every task has ended."""
    submissions, _ = find(folders)
    places: dict[Path, int] = {}
    while True:
        for folder in submissions:
            for path in sorted((folder / "logs").glob("*_log.*")):
                start = places.setdefault(path, max(0, path.stat().st_size - 2000))
                with path.open("rb") as file:
                    file.seek(start)
                    new = file.read()
                places[path] = start + len(new)
                for line in new.decode("utf-8", "replace").splitlines():
                    print(f"{path.name}: {line}")
        sys.stdout.flush()
        lines = look(tuple(submissions))
        if all(line.state in states.ENDED or line.state.startswith("lost") for line in lines):
            print(f"all ended at {datetime.now(UTC):%H:%M:%S} UTC")
            return
        time.sleep(FOLLOW_S)
