"""`submit resubmit=FOLDER`: submit again what has failed of a submission, and nothing else."""

import contextlib
import time
from pathlib import Path

from launch import cluster, executors, slurm, states
from lemon_muse.config import validate

# Seconds that a failed job is given to leave the queue.
SETTLE_S = 30


def resubmit(folder: Path) -> Path:
    """Submit again the tasks that failed or were lost, and what waits for them; no others."""
    folder = folder.resolve()
    record = states.submission(folder)
    cfg = validate(slurm.Submit, record["settings"])
    numbers = {state.number for state in failed(folder, sure=cfg.executor == "slurm")}
    if not numbers:
        print(f"{folder}: nothing to submit again; see lemon-muse status {folder}")
        return folder
    if cfg.executor == "slurm":
        executors.check_slurm()
    code = folder / "code" if cfg.snapshot else None
    sent: list[int] = []
    # Relative paths among the words are meant from where it was submitted.
    with contextlib.chdir(record["cwd"]):
        after = ":".join(_alive(cfg.after.split(":")))
        for stage, (own, job, _) in enumerate(slurm.sections(cfg)):
            mine = [t for t in record["tasks"] if t["stage"] == stage]
            left = [t for t in mine if not _is_done(folder, t["number"])]
            # Behind a stage that starts anew a job waits for one that will never succeed.
            some = left if sent else [t for t in left if t["number"] in numbers]
            held = _alive([t["job"] for t in some])
            if held:
                cluster.cancel(held)
            ids = [t["job"] for t in left if t not in some]
            if some:
                sent += [t["number"] for t in some]
                ids.append(slurm.start(own, job, some, folder, code=code, after=after))
                slurm.write(folder, record)
            after = ":".join(i for i in ids if i) or after
    slurm.say(folder, record, sent)
    return folder


def _alive(ids: list[str]) -> list[str]:
    """Those that wait or run."""
    seen = cluster.look_up(ids)
    live = [name for name, one in seen.items() if one.is_live]
    return [i for i in ids if i in live or i in {name.split("_")[0] for name in live}]


def failed(folder: Path, *, sure: bool = False) -> list[states.State]:
    """Tasks that are neither done nor waiting or running.

    A job stays in the queue for some seconds after its task has failed, and SLURM may also put it
    back by itself (a preemption without warning): such ones are looked at until it is clear.

    Args:
        sure: as for `cluster.look_up`.
    """
    end = time.monotonic() + SETTLE_S
    while True:
        standing = [state for state in states.read_all(folder) if state.state != "done"]
        seen = cluster.look_up([state.job for state in standing], sure=sure)
        live = [s for s in standing if s.job in seen and seen[s.job].is_live]
        leaving = [s for s in live if s.state == "failed" and not seen[s.job].is_waiting]
        if not leaving or time.monotonic() > end:
            return [state for state in standing if state not in live]
        time.sleep(1)


def _is_done(folder: Path, number: int) -> bool:
    state = states.read(folder, number)
    return state is not None and state.state == "done"
