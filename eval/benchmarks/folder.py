"""A benchmark out of the user's own images (or generated ones): the layout `folder`, with classes.

The split stands in slides.csv; the classes are the names that occur in the nuclei files.
"""

from pathlib import Path

import numpy as np

from eval import plans
from eval.benchmarks import DEFAULT, MUSE, Paper, Request
from lemon_muse.data.layouts import folder
from lemon_muse.data.table import SPLITS, Table
from lemon_muse.errors import UserError


class Folder:
    """Tell apart the kinds of nuclei that a folder of images names."""

    name = "folder"
    version = "1"
    tasks = ("class",)

    def load(self, root: Path, request: Request = DEFAULT) -> Table:
        """Read the folder; nuclei without a class are left out.

        Raises:
            UserError: what the layout's reader says, or fewer than two classes occur.
        """
        del request
        table = folder.read(root)
        if len(table.classes) < 2:
            raise UserError(
                f"the nuclei of {root} have {len(table.classes)} class(es), but a probe needs two "
                f"or more; write them as properties.classification.name in the nuclei files."
            )
        return table.take(np.flatnonzero(table.label >= 0))

    def folds(self, table: Table, request: Request = DEFAULT) -> list[plans.Fold]:
        """The split of slides.csv."""
        del request
        return plans.official(table)

    def paper(self, task: str) -> Paper | None:
        """MUSE's evaluation, on the user's own data."""
        del task
        return MUSE

    def check(self, root: Path, request: Request = DEFAULT) -> list[str]:
        """Classes and splits without nuclei, patients in two splits; nothing is published."""
        table = self.load(Path(root), request)
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
        return said + table.split_leaks()
