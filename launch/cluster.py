"""What the scheduler says about jobs: squeue for those it holds, sacct for those that ended."""

import shutil
import subprocess
from dataclasses import dataclass

from lemon_muse.errors import UserError

LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING")
SECONDS = 30


@dataclass(frozen=True)
class Seen:
    """State of a job in SLURM's words, and why."""

    state: str
    reason: str

    @property
    def is_live(self) -> bool:
        return self.state.split()[0] in LIVE

    @property
    def is_waiting(self) -> bool:
        return self.state.split()[0] in ("PENDING", "REQUEUED", "CONFIGURING")


def look_up(ids: list[str]) -> dict[str, Seen]:
    """What SLURM knows about jobs ('12' or '12_3'); {} where there is no SLURM.

    Jobs that neither squeue nor sacct knows are left out.
    """
    plain = sorted({i.split("_")[0] for i in ids if i and i.split("_")[0].isdigit()})
    if not plain or shutil.which("squeue") is None:
        return {}
    found = _ask(["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j", ",".join(plain)])
    ended = _ask(["sacct", "-n", "-X", "-P", "-o", "JobID,State,ExitCode", "-j", ",".join(plain)])
    # squeue forgets ended jobs after some minutes; while it holds one it knows best.
    return {name: seen for name, seen in {**ended, **found}.items() if name in ids}


def cancel(ids: list[str]) -> None:
    """Cancel jobs.

    Raises:
        UserError: SLURM refuses.
    """
    done = subprocess.run(["scancel", *ids], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise UserError(f"scancel: {done.stderr.strip()}")


def _ask(command: list[str]) -> dict[str, Seen]:
    """Lines 'id|state|reason' of a command; {} where it cannot answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    return {name.strip(): Seen(state.strip(), reason.strip()) for name, state, reason in rows}
