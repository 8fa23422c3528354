"""One atomic checkpoint file; the newest good one is found again.

The file's name carries the step and the first digits of its BLAKE2 digest: a file that was cut off
or altered is recognised without a second file, is reported, and the one before it is used.
"""

import hashlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import torch

from lemon_muse.data.files import write_atomic

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint and delete all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    path = folder / f"step-{step:09d}-{_digest(payload)}.pt"
    write_atomic(path, payload)  # type: ignore[arg-type]
    for old in list_newest_first(folder)[keep:]:
        old.unlink(missing_ok=True)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    return path


def load_newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint whose bytes are what was written; None if none is."""
    for path in list_newest_first(folder):
        payload = path.read_bytes()
        match = NAME.fullmatch(path.name)
        assert match is not None
        if _digest(payload) != match[2]:
            log.warning("checkpoint %s is damaged; the one before it is used", path)
            continue
        # weights_only: a checkpoint holds tensors, numbers and strings, never code.
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return int(match[1]), state
    return None


def list_newest_first(folder: Path) -> list[Path]:
    """Checkpoint files by step, the newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name)), reverse=True)


def _digest(payload: bytes | memoryview) -> str:
    return hashlib.blake2b(payload, digest_size=8).hexdigest()
