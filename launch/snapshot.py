"""A copy of the code that is submitted, so that a requeue in a week runs the same."""

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("lemon_muse", "data_prep", "eval", "launch")


def take(folder: Path) -> Path:
    """Copy our packages and recipes into `folder`, whole or not at all; kept where it is there.

    Returns:
        The folder, which goes on PYTHONPATH.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        home = Path(str(importlib.import_module(name).__file__)).parent
        shutil.copytree(home, partial / name, ignore=leave)
        if name == "lemon_muse":
            recipes = [home / "configs", home.parent / "configs"]
            found = next((place for place in recipes if place.is_dir()), None)
            if found is not None and found.parent != home:
                shutil.copytree(found, partial / "configs", ignore=leave)
    partial.rename(folder)
    return folder


def keep_files(words: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Copy the YAML files that words name into `folder`; the words with the copies' paths.

    Recipes that ship with the code are in its snapshot and stay as they are.
    """
    kept = []
    for word in words:
        path = Path(word)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            word = str(shutil.copyfile(path, folder / path.name))
        kept.append(word)
    return tuple(kept)
