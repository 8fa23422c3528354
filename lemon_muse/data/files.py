"""Files that appear whole or not at all."""

import errno
import os
from pathlib import Path

from lemon_muse.errors import RunError


def disk_is_full(error: OSError) -> bool:
    """Whether an error says that there is no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, payload: bytes) -> None:
    """Write under a temporary name, sync, rename: a killed job leaves the old file or the new."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and disk_is_full(error):
            raise RunError(
                f"{path} cannot be written, the disk is full; make room and run the same words "
                f"again."
            ) from error
        raise
    # The rename itself lives in the folder: without this a power cut could undo it.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
