"""A run explains itself: resolved settings, git state, versions, command, machine."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from lemon_muse import __version__
from lemon_muse.config import Config, dump
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "webdataset", "scikit-learn", "faiss-cpu")


def open_run(folder: Path, config: Config, *, free: tuple[str, ...]) -> None:
    """Make or re-enter a run folder.

    Args:
        folder: of the run.
        config: resolved settings, written as `config.yaml` before anything else.
        free: dotted keys (or groups) that may differ when a run is continued.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"out={folder} cannot be made ({error.strerror}); give another folder."
        ) from None
    path = folder / "config.yaml"
    if path.is_file():
        before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        now = _flat(config.model_dump(mode="json"))
        changed = [
            f"{k}: {before.get(k)} -> {now.get(k)}"
            for k in sorted(before.keys() | now.keys())
            if before.get(k) != now.get(k)
            and not any(k == f or k.startswith(f + ".") for f in free)
        ]
        if changed:
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(changed[:4])}); "
                f"give the settings it was started with, or another out=."
            )
    write_atomic(path, dump(config).encode())
    starts = []
    if (folder / "run.json").is_file():
        starts = json.loads((folder / "run.json").read_text(encoding="utf-8"))["starts"]
    write_atomic(
        folder / "run.json", json.dumps({"starts": [*starts, describe()]}, indent=1).encode()
    )


def describe() -> dict[str, Any]:
    """Now, the command, versions, git state, machine."""
    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            libraries[name] = "absent"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "version": __version__,
        "git": git_state(),
        "python": platform.python_version(),
        "libraries": libraries,
        "host": platform.node(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def git_state() -> str:
    """Commit of the checkout this code runs from, '+changes' when edited, 'none' outside of git."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+changes", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out
