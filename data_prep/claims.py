"""Processes started with the same words share the work: each piece is done by who claims it first.

A claim is a lock of the operating system on a small file: it ends with its process, however that
ends. Where a file system has no locks every claim is granted; work is then done twice, to the same
bytes, since every piece is a pure function of the words and is written under a name of its own.
"""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
TRIES = 20


@contextmanager
def claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold `<path>.lock`; yields False where another process holds it (never, with `wait`)."""
    handle = _open(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            log.warning("%s is on a file system without locks; work may be done twice", path)
            yield True
            return
        for leftover in path.parent.glob(f"{path.name}.*.tmp"):  # of a killed holder
            leftover.unlink(missing_ok=True)
        yield True
    finally:
        os.close(handle)


def is_held(path: Path) -> bool:
    """Whether another process holds the claim at the moment."""
    with claim(path) as mine:
        return not mine


def _open(path: Path) -> int:
    for _ in range(TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # another process has just finished and cleared the folder
            continue
    raise FileNotFoundError(errno.ENOENT, "the folder vanishes again and again", str(path.parent))


def own_name(path: Path, what: str) -> Path:
    """A temporary name for `<path>.<what>` that no other process has."""
    return path.with_name(f"{path.name}.{what}.{socket.gethostname()}-{os.getpid()}.tmp")
