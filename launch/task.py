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
LOST = ("closed by peer", "reset by peer", "NCCL communicator was aborted", "remote process exited")


class Task:
    """One task of a submission; submitit pickles it, SLURM's nodes call it.

    Args:
        words: of the job, as after `lemon-muse`.
        folder: of the submission, on a disk that all nodes share.
        number: of the task.
    """

    def __init__(self, words: Sequence[str], folder: Path, number: int) -> None:
        self.words, self.folder, self.number = tuple(words), folder.resolve(), number
        self.leaving = False

    def __call__(self) -> None:
        import submitit

        from launch import cli

        self.leaving = False
        env = submitit.JobEnvironment()
        rank, world = env.global_rank, env.num_tasks
        # A local: the handler holds what cannot be pickled.
        requeue: Any = signal.getsignal(signal.SIGUSR2)
        self._ranks(env)
        if rank == 0:
            states.clear_failures(self.folder, self.number)
            self._note("running", started=True)
        try:
            cli.run_job(list(self.words))
        except Stopped as stop:
            self._stopped(stop, requeue, rank)
        except (Exception, SystemExit) as error:
            self._fail(error, rank)
        if rank == 0:
            self._note("done")
        print(f"rank {rank} of {world}: done", flush=True)

    def checkpoint(self) -> Any:
        """Called by submitit before a requeue: the same words, which find what is there."""
        from submitit.helpers import DelayedSubmission

        self.leaving = True
        self._note("requeued", reason="preempted, or at its time limit")
        return DelayedSubmission(self)

    def _ranks(self, env: Any) -> None:
        """Tell `lemon_muse.distributed` who this process is; GPUs stay as SLURM gave them."""
        hosts = env.hostnames
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        meeting = self.folder / "tasks" / f"{self.number}.meet-{states.job_id()}-{restarts}.json"
        os.environ.update(
            RANK=str(env.global_rank),
            WORLD_SIZE=str(env.num_tasks),
            LOCAL_RANK=str(_device_of(env.local_rank)),
            LEMON_MUSE_RENDEZVOUS=str(meeting),
            # On one node no name has to resolve.
            LEMON_MUSE_HOST="127.0.0.1" if env.num_nodes == 1 else hosts[0],
        )
        os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))

    def _note(self, state: str, *, reason: str = "", started: bool = False) -> None:
        old = states.read(self.folder, self.number)
        starts = (old.starts if old else 0) + (1 if started else 0)
        new = states.State(
            self.number,
            self.words,
            state,
            states.job_id(),
            socket.gethostname(),
            starts,
            "",
            reason,
        )
        states.write(self.folder, new)

    def _stopped(self, stop: Stopped, requeue: Any, rank: int) -> None:
        """After a signal: all ranks have saved and stopped at the same step."""
        print(f"rank {rank}: {stop}", file=sys.stderr, flush=True)
        if not stop.again:
            if rank == 0:
                self._note("failed", reason=str(stop))
            raise SystemExit(1)
        if rank == 0 and callable(requeue):
            try:
                requeue(signal.SIGUSR2, None)  # checkpoint(), scontrol requeue, exit
            except Exception as error:  # put back too often
                self._note("failed", reason=str(error))
                raise
        time.sleep(LINGER)
        raise SystemExit(1)

    def _fail(self, error: BaseException, rank: int) -> None:
        """Say which rank failed and why; the whole job ends (srun --kill-on-bad-exit)."""
        if self.leaving:
            raise error
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            error = RunError(
                "lost another rank: it was killed (out of memory?) or its node failed; see the "
                f"logs in {self.folder / 'logs'}, then submit again with resubmit={self.folder}."
            )
        states.note_failure(self.folder, self.number, rank, error)
        first = states.first_failure(self.folder, self.number)
        self._note("failed", reason=first)
        if isinstance(error, UserError | RunError):
            print(f"lemon-muse: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        raise error


def _device_of(local_rank: int) -> int:
    """Index of this rank's GPU among those it sees: SLURM may show each rank its own one only."""
    shown = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return 0 if len(shown) == 1 else local_rank
