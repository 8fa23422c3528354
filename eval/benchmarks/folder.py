"""A benchmark out of the user's own images (or generated ones): the layout `folder`, with classes.

The split stands in slides.csv; the classes are the names that occur in the nuclei files.
"""

from pathlib import Path

import numpy as np

from lemon_muse.data.layouts import folder
from lemon_muse.data.table import SPLITS, Table
from lemon_muse.errors import UserError


class Folder:
    """Tell apart the kinds of nuclei that a folder of images names."""

    name = "folder"
    task = "class"
    version = "1"

    def load(self, root: Path) -> Table:
        """Read the folder; nuclei without a class are left out.

        Raises:
            UserError: what the layout's reader says, or fewer than two classes occur.
        """
        table = folder.read(root)
        if len(table.classes) < 2:
            raise UserError(
                f"the nuclei of {root} have {len(table.classes)} class(es), but a probe needs two "
                f"or more; write them as properties.classification.name in the nuclei files."
            )
        return table.take(np.flatnonzero(table.label >= 0))

    def check(self, root: Path) -> list[str]:
        """Classes and splits without nuclei, patients in two splits; nothing is published."""
        table = self.load(Path(root))
        said = []
        for split in SPLITS:
            label = table.label[table.split == split]
            if not len(label):
                said.append(f"{split} has no nucleus.")
                continue
            counts = np.bincount(label, minlength=len(table.classes))
            lacking = [name for name, n in zip(table.classes, counts, strict=True) if not n]
            if lacking:
                said.append(f"{split} has no {', no '.join(lacking)}.")
        shared = table.patients_across()
        if shared:
            said.append(f"{len(shared)} patients are in more than one split: {', '.join(shared)}.")
        return said
