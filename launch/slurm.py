"""`lemon-muse submit`: any job, an array or a chain of jobs on SLURM, through submitit."""

import json
import sys
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

# Seconds that a failed job is given to leave the queue.
SETTLE_S = 30


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
        {}, description="further sbatch options by their long names, as extra.mail-type=END"
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
    snapshot: bool = Field(True, description="run a copy of the code as it is now")
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
        UserError: wrong words of `submit` or of a job (before anything is submitted), no SLURM.
        RunError: the scheduler refuses.
    """
    if cfg.resubmit is not None:
        return resubmit(cfg.resubmit)
    if not cfg.job:
        raise UserError("submit needs a job after --, as in: submit slurm.yaml -- train demo.yaml")
    chain = plan(cfg)
    if cfg.dry_run:
        for own, stage in chain:
            folder = cfg.out / "NAME"
            code = folder / "code" if cfg.snapshot else None
            count = len(stage.tasks)
            print(f"# {stage.job}: {count} task(s), each as: {' '.join(stage.tasks[0])}")
            print(executors.script(own, stage.job, folder=folder / "logs", count=count, code=code))
        return cfg.out
    folder = _new_folder(cfg, chain[0][1].job)
    code = snapshot.take(folder / "code") if cfg.snapshot else None
    record: dict[str, Any] = {"settings": json.loads(cfg.model_dump_json()), "tasks": []}
    after = cfg.after
    for number, (own, stage) in enumerate(chain):
        first = len(record["tasks"])
        tasks = [
            {"number": first + i, "words": list(words), "stage": number, "job": ""}
            for i, words in enumerate(stage.tasks)
        ]
        record["tasks"] += tasks
        after = _start(own, stage.job, tasks, folder, code=code, after=after)
        _write(folder, record)
    _say(folder, record)
    return folder


def plan(cfg: Submit) -> list[tuple[Submit, stages.Stage]]:
    """The stages with their settings; every word of every job is checked here."""
    chain = []
    sections = stages.split(cfg.job)
    for section in sections:
        own_words, words = stages.own_words(section)
        own = _stage_settings(cfg, own_words)
        name = stages.job_name(words)
        executors.ranks(own, name)
        words = with_workers(words, executors.cpus(own))
        sweep = own.sweep if name == stages.job_name(words) else {}
        tasks = stages.expand(words, sweep=sweep, copies=own.tasks)
        for task in tasks:
            settings_of(task)
        chain.append((own, stages.Stage(name, {}, tasks)))
    return chain


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
    extra = {**shared["extra"], **tree.pop("extra", {})}
    return validate(Submit, {**shared, **tree, "extra": extra})


def settings_of(words: tuple[str, ...] | list[str]) -> Config:
    """The settings of a job, from its words.

    Raises:
        UserError: a wrong word.
    """
    import importlib

    from launch.cli import JOBS, split_name
    from lemon_muse.config import load

    name, rest = split_name(list(words))
    module, model, _ = JOBS[name]
    return load(getattr(importlib.import_module(module), model), rest)


def with_workers(words: list[str], count: int) -> list[str]:
    """The words with workers= for this many CPUs, where the job has that key and no value yet."""
    import importlib

    from launch.cli import JOBS, split_name

    name, rest = split_name(list(words))
    module, model, _ = JOBS[name]
    kind = getattr(importlib.import_module(module), model)
    given = read(kind, rest)
    if "workers" in given or "workers" not in kind.model_fields:
        return words
    # One CPU is left to the process that the readers feed.
    return [*words, f"workers={max(1, count - 1)}"]


def _start(
    own: Submit,
    job: str,
    tasks: list[dict[str, Any]],
    folder: Path,
    *,
    code: Path | None,
    after: str,
) -> str:
    """Submit the tasks of a stage; their ids are written into `tasks`. Returns what to wait for."""
    import submitit

    made = executors.executor(own, job, folder=folder / "logs", code=code, after=after)
    things = [Task(task["words"], folder, task["number"]) for task in tasks]
    for task in tasks:
        words = tuple(task["words"])
        states.write(folder, states.State(task["number"], words, "submitted"))
    if own.executor != "slurm":
        return _run_here(made, things, tasks)
    try:
        if len(things) == 1:
            jobs = [made.submit(things[0])]
        else:
            with made.batch():
                jobs = [made.submit(thing) for thing in things]
    except submitit.core.utils.FailedJobError as error:
        said = str(error).strip().split("\n")[-1]
        raise UserError(f"sbatch refuses the job: {said}") from None
    for task, made_job in zip(tasks, jobs, strict=True):
        task["job"] = made_job.job_id
        state = states.read(folder, task["number"])
        if state is not None and state.state == "submitted":
            states.write(folder, replace(state, job=made_job.job_id))
    return str(jobs[0].job_id).split("_")[0]


def _run_here(made: Any, things: list[Task], tasks: list[dict[str, Any]]) -> str:
    """Run on this machine, one after another, and wait."""
    for thing, task in zip(things, tasks, strict=True):
        job = made.submit(thing)
        task["job"] = str(job.job_id)
        job.wait()
        state = states.read(thing.folder, thing.number)
        if state is None or state.state != "done":
            why = state.reason if state else "it did not start"
            raise UserError(
                f"task {thing.number} ({' '.join(thing.words)}) failed: {why}; its log is in "
                f"{thing.folder / 'logs'}."
            )
    return ""


def resubmit(folder: Path) -> Path:
    """Submit again the tasks that failed or were lost; finished and waiting ones are left alone."""
    record = states.submission(folder)
    cfg = validate(Submit, record["settings"])
    again = failed(folder)
    if not again:
        print(f"{folder}: nothing to submit again; see lemon-muse status {folder}")
        return folder
    numbers = {state.number for state in again}
    after = ""
    code = folder / "code" if cfg.snapshot else None
    for number, (own, stage) in enumerate(plan(cfg)):
        mine = [t for t in record["tasks"] if t["stage"] == number]
        some = [task for task in mine if task["number"] in numbers]
        waiting = [t["job"].split("_")[0] for t in mine if t["number"] not in numbers and t["job"]]
        if some:
            after = _start(own, stage.job, some, folder, code=code, after=after)
        elif any(not _is_done(folder, t["number"]) for t in mine):
            after = waiting[0] if waiting else after
    _write(folder, record)
    _say(folder, record)
    return folder


def failed(folder: Path) -> list[states.State]:
    """Tasks that are neither done nor waiting or running.

    A job stays in the queue for some seconds after its task has failed, and SLURM may also put it
    back by itself (a preemption without warning): such ones are looked at until it is clear.
    """
    end = time.monotonic() + SETTLE_S
    while True:
        standing = [state for state in states.read_all(folder) if state.state != "done"]
        seen = cluster.look_up([state.job for state in standing])
        live = [s for s in standing if s.job in seen and seen[s.job].is_live]
        leaving = [s for s in live if s.state == "failed" and not seen[s.job].is_waiting]
        if not leaving or time.monotonic() > end:
            return [state for state in standing if state not in live]
        time.sleep(1)


def _is_done(folder: Path, number: int) -> bool:
    state = states.read(folder, number)
    return state is not None and state.state == "done"


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


def _write(folder: Path, record: dict[str, Any]) -> None:
    write_atomic(folder / states.SUBMISSION, json.dumps(record, indent=1).encode())


def _say(folder: Path, record: dict[str, Any]) -> None:
    ids = list(dict.fromkeys(task["job"].split("_")[0] for task in record["tasks"]))
    print(f"submitted {len(record['tasks'])} task(s) as job(s) {', '.join(ids)}")
    print(f"folder: {folder}\nstatus: lemon-muse status {folder}")
    print(f"again:  lemon-muse submit resubmit={folder}   (what has failed)", file=sys.stdout)
