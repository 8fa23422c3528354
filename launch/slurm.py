"""`lemon-muse submit`: any job, an array or a chain of jobs on SLURM, through submitit."""

import contextlib
import json
import shlex
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from launch import cluster, executors, snapshot, stages, states
from launch.task import Task
from lemon_muse.config import Config, read, validate
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

# Seconds that processes of this machine are given to end after Ctrl-C.
PATIENCE_S = 5
# Settings of a submission as a whole.
SHARED = ("out", "executor", "after", "snapshot", "resubmit", "dry_run", "job")

Facts = dict[str, Any]  # of a task: number, words, stage, job
Record = dict[str, Any]  # of a submission; see states.submission


class Submit(Config):
    """Submit jobs to a cluster: `submit [SLURM.yaml] [key=value …] -- [key=value …] JOB …`.

    Several `-- JOB …` make a chain: each starts when the one before has succeeded. Words between
    `--` and the name of a job are settings of that stage alone.
    """

    out: Path = Field(
        Path("runs/submit"),
        description="folder on a disk that all nodes share; each submission gets one below",
    )
    executor: Literal["slurm", "local", "debug"] = Field(
        "slurm", description="slurm; local: processes of this machine; debug: this process"
    )
    nodes: int = Field(1, gt=0, description="nodes of a train job")
    gpus: int = Field(0, ge=0, description="GPUs a node; train runs one rank on each")
    ranks: int | None = Field(
        None, gt=0, description="ranks a node of a train job; none = one a GPU, or 1"
    )
    tasks: int = Field(1, gt=0, description="prep: processes that share the work, as an array")
    cpus: int | None = Field(
        None, gt=0, description="CPUs a rank; none = 8 beside a GPU, else 4; sets workers= as well"
    )
    mem_gb: float | None = Field(None, gt=0, description="GB of memory a node; none = cluster's")
    hours: float = Field(24.0, gt=0, description="time limit of one start; a job is put back at it")
    partition: str | None = Field(None, description="partition; none = cluster's default")
    account: str | None = Field(None, description="account that pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="feature that nodes must have, as 'h100'")
    exclude: str | None = Field(None, description="nodes to keep off")
    nodelist: str | None = Field(None, description="nodes to run on")
    comment: str | None = Field(None, description="comment that the scheduler keeps")
    name: str | None = Field(None, description="name of the job; none = the job's")
    extra: dict[str, Any] = Field(
        {},
        description="further sbatch options by their long names, as extra.mail-type=END, "
        "extra.exclusive=true; false leaves one out",
    )
    srun: tuple[str, ...] = Field((), description="further options of srun")
    setup: tuple[str, ...] = Field(
        (), description="shell lines before the job: module load, source venv, export NCCL_…"
    )
    python: str | None = Field(
        None,
        description="command that starts Python on the node, for containers, as 'apptainer exec "
        "--nv image.sif python'; none = this one",
    )
    signal_s: int = Field(
        120, ge=30, description="seconds before the end at which ranks save and the job is put back"
    )
    requeues: int = Field(20, ge=0, description="time limits after which a job is not put back")
    parallel: int = Field(16, gt=0, description="tasks of an array that run at once")
    meet_s: int = Field(600, gt=0, description="seconds that ranks wait for each other")
    sweep: dict[str, Any] = Field(
        {}, description="sweep.KEY=a,b: one task for every combination of values of a job's keys"
    )
    after: str = Field("", description="ids of jobs that must have succeeded before, as 12:13")
    snapshot: bool = Field(True, description="run copies of code and YAML files as they are now")
    resubmit: Path | None = Field(
        None, description="folder of a submission: submit again what has failed of it, no more"
    )
    dry_run: bool = Field(False, description="print the sbatch scripts and submit nothing")
    job: tuple[str, ...] = Field((), description="the words after --; not given as a key")


def run(cfg: Submit) -> Path:
    """Submit, and say where things stand.

    Returns:
        The folder of the submission.

    Raises:
        UserError: wrong words of `submit` or of a job (before anything is submitted), no SLURM,
            the scheduler refuses (what was submitted is cancelled).
    """
    if cfg.resubmit is not None:
        from launch.resubmit import resubmit

        return resubmit(cfg.resubmit)
    if not cfg.job:
        raise UserError("submit needs a job after --, as in: submit slurm.yaml -- train demo.yaml")
    chain = plan(cfg)
    if cfg.dry_run:
        _print_scripts(cfg, chain)
        return cfg.out
    if cfg.executor == "slurm":
        executors.check_slurm()
    folder = _new_folder(cfg, chain[0][1].job)
    code = snapshot.take(folder / "code") if cfg.snapshot else None
    record: Record = {
        "settings": json.loads(cfg.model_dump_json()),
        "cwd": str(Path.cwd()),
        "tasks": [],
    }
    for number, (_, stage) in enumerate(chain):
        for words in stage.tasks:
            if cfg.snapshot:
                words = snapshot.keep_files(words, folder / "recipes" / str(number))
            task = {"number": len(record["tasks"]), "words": words, "stage": number, "job": ""}
            record["tasks"].append(task)
    write(folder, record)
    after = cfg.after
    for number, (own, stage) in enumerate(chain):
        tasks = [task for task in record["tasks"] if task["stage"] == number]
        try:
            after = start(own, stage.job, tasks, folder, code=code, after=after)
        except (UserError, KeyboardInterrupt) as error:
            _give_up(folder, record, str(error) or "interrupted")
            raise
        write(folder, record)
    say(folder, record, list(range(len(record["tasks"]))))
    return folder


def plan(cfg: Submit) -> list[tuple[Submit, stages.Stage]]:
    """The stages with their settings; every word of every job is checked here."""
    chain = []
    for own, name, words in sections(cfg):
        executors.check(own, name)
        words = stages.with_workers(words, executors.cpus(own))
        tasks = stages.expand(words, sweep=own.sweep, copies=own.tasks)
        for task in tasks:
            stages.settings_of(task)
        chain.append((own, stages.Stage(name, tasks)))
    return chain


def sections(cfg: Submit) -> list[tuple[Submit, str, list[str]]]:
    """The settings, the job's name and the job's words of every stage."""
    found = []
    for section in stages.split(cfg.job):
        own, words = stages.own_words(section)
        found.append((_stage_settings(cfg, own), stages.job_name(words), words))
    return found


def _stage_settings(cfg: Submit, words: list[str]) -> Submit:
    """The settings of a stage: those of all, and its own; tasks= and sweep. hold for one stage."""
    shared = json.loads(cfg.model_dump_json())
    if len(stages.split(cfg.job)) > 1:
        shared |= {"tasks": 1, "sweep": {}}
        if cfg.tasks > 1 or cfg.sweep:
            raise UserError(
                "in a chain, tasks= and sweep. belong to one stage: write them after its --."
            )
    tree = read(Submit, words)
    wrong = [key for key in tree if key in SHARED]
    if wrong:
        raise UserError(f"{wrong[0]}= holds for all stages: write it before the first --.")
    extra = {**shared["extra"], **tree.pop("extra", {})}
    return validate(Submit, {**shared, **tree, "extra": extra})


def _print_scripts(cfg: Submit, chain: list[tuple[Submit, stages.Stage]]) -> None:
    folder, after = cfg.out / "NAME", cfg.after
    code = folder / "code" if cfg.snapshot else None
    for own, stage in chain:
        count = len(stage.tasks)
        print(f"# {stage.job}: {count} task(s), each as: {' '.join(stage.tasks[0])}")
        logs = folder / "logs"
        print(executors.script(own, stage.job, folder=logs, count=count, code=code, after=after))
        after = "JOB_BEFORE"


def start(
    own: Submit, job: str, tasks: list[Facts], folder: Path, *, code: Path | None, after: str
) -> str:
    """Submit the tasks of a stage; their ids are written into `tasks`. Returns what to wait for."""
    import submitit

    made = executors.executor(own, job, folder=folder / "logs", code=code, after=after)
    things = [Task(task["words"], folder, task["number"]) for task in tasks]
    for task in tasks:
        # Before the task can write its own; its id stands in the record of the submission.
        old = states.read(folder, task["number"])
        new = states.State(task["number"], tuple(task["words"]), "submitted")
        states.write(folder, replace(new, starts=old.starts) if old else new)
    if own.executor != "slurm":
        return _run_here(made, things)
    try:
        with executors.outside_of_jobs():
            if len(things) == 1:
                jobs = [made.submit(things[0])]
            else:
                with made.batch():
                    jobs = [made.submit(thing) for thing in things]
    except submitit.core.utils.FailedJobError as error:
        said = str(error).strip().split("\n")[-1].removeprefix("sbatch: error: ")
        raise UserError(f"sbatch refuses the job: {said}") from None
    for task, made_job in zip(tasks, jobs, strict=True):
        task["job"] = str(made_job.job_id)
    return str(jobs[0].job_id).split("_")[0]


def _run_here(made: Any, things: list[Task]) -> str:
    """Run on this machine, one after another, and wait; one that fails does not end the others."""
    broken = []
    for thing in things:
        job = made.submit(thing)
        try:
            job.wait()
        except KeyboardInterrupt:
            job.cancel()
            end = time.monotonic() + PATIENCE_S
            while job.state == "RUNNING" and time.monotonic() < end:
                time.sleep(0.1)
            raise
        except SystemExit:  # of a task in this process, which has written its reason
            pass
        state = states.read(thing.folder, thing.number)
        if state is None or state.state != "done":
            why = state.reason if state and state.reason else "it was killed, or did not start"
            broken.append(
                f"task {thing.number} ({' '.join(thing.words)}) failed: {why.rstrip('.')}"
            )
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{more}; logs are in {things[0].folder / 'logs'}.")
    return ""


def _give_up(folder: Path, record: Record, why: str) -> None:
    """Cancel what has been submitted, and leave no task as if it could still run."""
    ids = {task["job"].split("_")[0] for task in record["tasks"]} - {""}
    if ids:
        with contextlib.suppress(UserError):  # they may have ended
            cluster.cancel(sorted(ids))
    elif record["settings"]["executor"] == "slurm":
        shutil.rmtree(folder)
        return
    write(folder, record)
    for state in states.read_all(folder):
        if state.state not in states.ENDED:
            states.write(folder, replace(state, state="failed", reason=f"given up: {why}"))


def _new_folder(cfg: Submit, job: str) -> Path:
    """A folder of its own below out=, named by job and time."""
    stem = f"{cfg.name or job.replace(' ', '-')}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = cfg.out.resolve() / f"{stem}{suffix}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"out={cfg.out} cannot be made ({error.strerror}).") from None
    raise UserError(f"out={cfg.out} holds a hundred submissions of this second; give another out=.")


def write(folder: Path, record: Record) -> None:
    write_atomic(folder / states.SUBMISSION, json.dumps(record, indent=1).encode())


def say(folder: Path, record: Record, numbers: list[int]) -> None:
    """What has been submitted, and what to do next."""
    ids = dict.fromkeys(record["tasks"][number]["job"].split("_")[0] for number in numbers)
    if any(ids):
        print(f"submitted {len(numbers)} task(s) as job(s) {', '.join(ids)}")
    else:
        print(f"ran {len(numbers)} task(s) on this machine")
    quoted = shlex.quote(str(folder))
    print(f"folder: {folder}\nstatus: lemon-muse status {quoted}")
    print(f"again:  lemon-muse submit resubmit={quoted}   (what has failed)")
