"""How the ranks of a job find each other.

Under torchrun by MASTER_ADDR and MASTER_PORT. Under the SLURM launcher at a file: rank 0 opens a
store on a port that the system gives it and writes host and port to a file of this start in the
shared folder of the job. A port drawn in advance can be taken by another job of the node, and
after a requeue on other nodes a remembered address is wrong; this one is neither.
"""

import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from lemon_muse.data.files import write_atomic
from lemon_muse.errors import RunError

FILE = "LEMON_MUSE_RENDEZVOUS"  # path of the file; set by the launcher
HOST = "LEMON_MUSE_HOST"  # name under which the others reach rank 0
WAIT = "LEMON_MUSE_RENDEZVOUS_S"  # seconds to wait for the others
POLL = 0.2
TRY_S = 10.0  # seconds of one attempt to connect
CAUSES = (
    "a rank failed before it came (see its log), or the nodes cannot reach each other: set "
    "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface between them."
)


def join(backend: str, *, timeout: timedelta) -> None:
    """Start the process group.

    Args:
        backend: 'gloo' or 'nccl'.
        timeout: of every later collective.

    Raises:
        RunError: the others did not come in time.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    file = os.environ.get(FILE)
    limit = timedelta(seconds=float(os.environ.get(WAIT, "600"))) if file else timeout
    try:
        if file is None:
            dist.init_process_group(backend, timeout=timeout)
            return
        store = _meet(Path(file), rank, world, limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except RunError:
        raise
    except RuntimeError as error:  # DistStoreError, DistNetworkError, and gloo's own
        first = str(error).strip().split("\n")[0]
        late = isinstance(error, dist.DistStoreError | dist.DistNetworkError)
        within = f" within {limit.total_seconds():.0f} s" if late else ""
        raise RunError(
            f"rank {rank} of {world} on {socket.gethostname()} did not meet the others{within} "
            f"({first}); {CAUSES}"
        ) from None


def _meet(file: Path, rank: int, world: int, limit: timedelta) -> dist.Store:
    """The store of rank 0, once all ranks are there."""
    end = time.monotonic() + limit.total_seconds()
    store: dist.TCPStore
    if rank == 0:
        # Port 0: the system gives a free one, and the store holds it from that moment on.
        store = dist.TCPStore("0.0.0.0", 0, world, True, limit, wait_for_workers=False)
        host = os.environ.get(HOST) or socket.gethostname()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"host": host, "port": store.port}).encode())
    else:
        store = _connect(file, rank, world, end, limit)
    store.set(f"here/{rank}", socket.gethostname())
    left = timedelta(seconds=max(1.0, end - time.monotonic()))
    try:
        store.wait([f"here/{r}" for r in range(world)], left)
    except dist.DistStoreError:
        absent = [str(r) for r in range(world) if not store.check([f"here/{r}"])]
        if not absent:
            return store
        raise RunError(
            f"rank {rank} on {socket.gethostname()} waited {limit.total_seconds():.0f} s for "
            f"rank(s) {', '.join(absent)} of {world}; {CAUSES}"
        ) from None
    return store


def _connect(file: Path, rank: int, world: int, end: float, limit: timedelta) -> dist.TCPStore:
    """The store of rank 0; the file is read again where nobody answers: it may be an old one."""
    while True:
        host, port = _address(file, rank, end, limit)
        left = max(1.0, min(TRY_S, end - time.monotonic()))
        try:
            tried = timedelta(seconds=left)
            return dist.TCPStore(host, port, world, False, tried, wait_for_workers=False)
        except (dist.DistStoreError, dist.DistNetworkError):
            if time.monotonic() > end:
                raise


def _address(file: Path, rank: int, end: float, limit: timedelta) -> tuple[str, int]:
    """What rank 0 has written, waited for until `end` (of time.monotonic)."""
    while True:
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            return str(said["host"]), int(said["port"])
        except (OSError, ValueError, KeyError):
            if time.monotonic() > end:
                raise RunError(
                    f"rank {rank} on {socket.gethostname()} waited {limit.total_seconds():.0f} s "
                    f"for {file}, which rank 0 writes: it failed before (see its log), or the "
                    f"folder is not on a disk that all nodes share."
                ) from None
            time.sleep(POLL)
