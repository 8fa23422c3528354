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


# Without accounting SLURM forgets a job some minutes after its end.
GONE = Seen("UNKNOWN to SLURM", "")


def look_up(ids: list[str], *, sure: bool = False) -> dict[str, Seen]:
    """What SLURM knows about jobs ('12', '12_3', '12' for any of 12_0, 12_1 …); {} without SLURM.

    A job that squeue and sacct do not know is `GONE`.

    Args:
        sure: an answer is needed: no SLURM, or one that does not answer, is an error.

    Raises:
        UserError: with `sure`, squeue does not answer.
    """
    plain = sorted({i.split("_")[0] for i in ids if i and i.split("_")[0].isdigit()})
    if not plain or (shutil.which("squeue") is None and not sure):
        return {}
    found = _ask(["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j", ",".join(plain)])
    if found is None and sure:
        raise UserError("SLURM does not answer (squeue failed); try again in a minute.")
    ended = _ask(["sacct", "-n", "-X", "-P", "-o", "JobID,State,ExitCode", "-j", ",".join(plain)])
    # squeue forgets ended jobs after some minutes; while it holds one it knows best.
    known = {**(ended or {}), **(found or {})}
    if found is not None:
        arrays = {name.split("_")[0] for name in known}
        known |= {i: GONE for i in ids if i and i not in known and i not in arrays}
    return {k: seen for k, seen in known.items() if k in ids or k.split("_")[0] in ids}


def cancel(ids: list[str]) -> None:
    """Cancel jobs.

    Raises:
        UserError: SLURM refuses.
    """
    done = subprocess.run(["scancel", *ids], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise UserError(f"scancel: {done.stderr.strip()}")


def _ask(command: list[str]) -> dict[str, Seen] | None:
    """Lines 'id|state|reason' of a command; None where it does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # squeue fails as well where it has forgotten the only job that it is asked about.
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    return {name.strip(): Seen(state.strip(), reason.strip()) for name, state, reason in rows}
