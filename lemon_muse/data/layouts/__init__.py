"""Folders of images with nuclei, read into a `Table`: one file a layout, one line here."""

from collections.abc import Callable
from pathlib import Path

from lemon_muse.data.layouts import brcam2c, folder
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

# layout: (its reader, the file that tells it)
LAYOUTS: dict[str, tuple[Callable[[Path], Table], str]] = {
    "brcam2c": (brcam2c.read, "brca_ds_train.txt"),
    "folder": (folder.read, "slides.csv"),
}


def read_layout(root: Path, name: str = "auto") -> tuple[Table, str]:
    """The nuclei of a folder, and the name of its layout.

    Raises:
        UserError: no such folder, no known layout, or what its reader says.
    """
    name = detect(root) if name == "auto" else name
    return LAYOUTS[name][0](root), name


def detect(root: Path) -> str:
    """The layout of a folder, by the file that each has."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give data= the folder of images and nuclei.")
    for name, (_, mark) in LAYOUTS.items():
        if (root / mark).is_file():
            return name
    for place in [root.parent, *sorted(p for p in root.iterdir() if p.is_dir())]:
        if any((place / mark).is_file() for _, mark in LAYOUTS.values()):
            raise UserError(f"{root} is the wrong folder level; give {place} instead.")
    marks = ", ".join(f"{mark} ({name})" for name, (_, mark) in LAYOUTS.items())
    raise UserError(f"{root} has no known layout: none of {marks} is there; see docs/formats.md.")
