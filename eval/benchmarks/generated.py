"""Nuclei of generated tissue: a folder that `lemon_muse.synthetic.write_images` wrote."""

from pathlib import Path

import numpy as np

from lemon_muse.data.layouts import folder
from lemon_muse.data.table import SPLITS, Table


class Generated:
    """Tell the five kinds of generated nuclei apart."""

    name = "generated"
    task = "class"
    version = "1"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the generator's order."""
        from lemon_muse.synthetic import CLASSES

        return tuple(CLASSES)

    def load(self, root: Path) -> Table:
        """Read the folder; UserError says what is wrong with it."""
        return folder.read(root, classes=self.classes)

    def check(self, root: Path) -> list[str]:
        """Classes and splits without nuclei, patients in two splits; nothing is published."""
        table = self.load(Path(root))
        said = []
        for split in SPLITS:
            label = table.label[table.split == split]
            if not len(label):
                said.append(f"{split} has no nucleus.")
                continue
            counts = np.bincount(label, minlength=len(self.classes))
            lacking = [name for name, n in zip(self.classes, counts, strict=True) if not n]
            if lacking:
                said.append(f"{split} has no {', no '.join(lacking)}.")
        shared = table.patients_across()
        if shared:
            said.append(f"{len(shared)} patients are in more than one split: {', '.join(shared)}.")
        return said
