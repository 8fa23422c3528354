"""What runs on the nodes: one job of `lemon-muse` under submitit, with preemption and requeue.

A signal before the end (time limit, preemption) reaches every rank. `train` itself only notes it:
all ranks agree on it between two steps, save, and stop; then rank 0 alone asks SLURM to put the
job back. submitit's own handler would do so in the middle of a step, while other ranks wait in a
collective. Other jobs are put back at once: what they have finished is on disk.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import states
from lemon_muse.errors import RunError, Stopped, UserError

# Seconds that other ranks wait for the requeue to end them.
LINGER = 120
# What gloo and NCCL say when the other end of a connection is gone.
LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "NCCL communicator was aborted",
    "remote process exited",
)
# Seconds in which the rank that failed first can say so before the others, who only lost it.
YIELD_S = 2


class Task:
    """One task of a submission; submitit pickles it, SLURM's nodes call it.

    Args:
        words: of the job, as after `lemon-muse`.
        folder: of the submission, on a disk that all nodes share.
        number: of the task.
    """

    def __init__(self, words: Sequence[str], folder: Path, number: int) -> None:
        self.words, self.folder, self.number = tuple(words), folder.resolve(), number
        self.start, self.rank, self.leaving = "", 0, False

    def __call__(self) -> None:
        import submitit

        from launch import cli

        self.leaving = False
        env = submitit.JobEnvironment()
        self.rank, world = env.global_rank, env.num_tasks
        # Unlike any other start: not the job's id alone, which a requeue keeps.
        self.start = f"{env.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        # A local: the handler holds what cannot be pickled.
        requeue: Any = signal.getsignal(signal.SIGUSR2)
        self._ranks(env)
        if self.rank == 0:
            self._begin()
        try:
            cli.run_job(list(self.words))
        except Stopped as stop:
            self._stopped(stop, requeue)
        except KeyboardInterrupt:
            self._note("failed", reason="interrupted")
            raise
        except (Exception, SystemExit) as error:
            self._fail(error)
        if self.rank == 0:
            self._note("done")
        print(f"rank {self.rank} of {world}: done", flush=True)

    def checkpoint(self) -> Any:
        """Called by submitit before a requeue: the same words, which find what is there."""
        from submitit.helpers import DelayedSubmission

        self.leaving = True
        # Where there is no count of restarts the next start meets at the same file.
        self._meeting().unlink(missing_ok=True)
        self._note("requeued", reason="preempted, or at its time limit")
        return DelayedSubmission(self)

    def _ranks(self, env: Any) -> None:
        """Tell `lemon_muse.distributed` who this process is; GPUs stay as SLURM gave them."""
        os.environ.update(
            RANK=str(env.global_rank),
            WORLD_SIZE=str(env.num_tasks),
            LOCAL_RANK=str(_device_of(env.local_rank)),
            LEMON_MUSE_RENDEZVOUS=str(self._meeting()),
            # On one node no name has to resolve.
            LEMON_MUSE_HOST="127.0.0.1" if env.num_nodes == 1 else env.hostnames[0],
        )
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))

    def _meeting(self) -> Path:
        """File at which the ranks of this start meet."""
        return self.folder / "tasks" / f"{self.number}.meet-{self.start}.json"

    def _begin(self) -> None:
        """Note the start; another rank may have failed already, and its word stands."""
        self._note("running", started=True)
        first = states.first_failure(self.folder, self.number, self.start)
        if first:
            self._note("failed", reason=first)

    def _note(self, state: str, *, reason: str = "", started: bool = False) -> None:
        old = states.read(self.folder, self.number)
        new = states.State(
            self.number,
            self.words,
            state,
            states.job_id(),
            socket.gethostname() if self.rank == 0 or old is None else old.host,
            (old.starts if old else 0) + (1 if started else 0),
            "",
            reason,
        )
        states.write(self.folder, new)

    def _stopped(self, stop: Stopped, requeue: Any) -> None:
        """After a signal: all ranks have saved and stopped at the same step."""
        print(f"rank {self.rank}: {stop}", file=sys.stderr, flush=True)
        if not stop.again:
            if self.rank == 0:
                self._note("failed", reason=str(stop))
            raise SystemExit(1)
        if self.rank == 0 and callable(requeue):
            try:
                requeue(signal.SIGUSR2, None)  # checkpoint(), scontrol requeue, exit
            except Exception as error:  # put back too often
                self._note("failed", reason=str(error))
                raise
        # The requeue ends this rank at once; submitit ignores SIGTERM, until SIGKILL 30 s later.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LINGER)
        raise SystemExit(1)

    def _fail(self, error: BaseException) -> None:
        """Say which rank failed and why; the whole job ends (srun --kill-on-bad-exit)."""
        if self.leaving:
            if isinstance(error, Exception):  # not the exit after a requeue: it was refused
                self._note("failed", reason=str(error))
            raise error
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            error = RunError(
                f"{states.LOST}: it was killed (out of memory?) or its node failed; see the "
                f"logs in {self.folder / 'logs'}, then submit again with resubmit={self.folder}."
            )
            time.sleep(YIELD_S)
        states.note_failure(self.folder, self.number, self.start, self.rank, error)
        first = states.first_failure(self.folder, self.number, self.start)
        self._note("failed", reason=first)
        if isinstance(error, UserError | RunError):
            print(f"lemon-muse: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        raise error


def _device_of(local_rank: int) -> int:
    """Index of this rank's GPU among those it sees: all of the node, or its own ones only."""
    shown = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return local_rank % len(shown) if shown else local_rank
