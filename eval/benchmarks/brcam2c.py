"""BRCAM2C: nuclei of breast tissue in three classes (Dataset-BRCA-M2C, Abousamra, ICCV 2021).

The layout, its traps and its mpp are described in `lemon_muse.data.layouts.brcam2c`.
"""

from pathlib import Path

import numpy as np

from lemon_muse.data.layouts.brcam2c import CLASSES, MPP, image_path, read, read_lists
from lemon_muse.data.table import Table, image_size

# Images and nuclei per class of the published data set, counted on its files.
PUBLISHED = {
    "train": (80, (3541, 9956, 5150)),
    "val": (10, (1358, 733, 1042)),
    "test": (30, (960, 6109, 1789)),
}


class BrcaM2C:
    """Classify a nucleus of breast tissue as lymphocyte, tumour / epithelial or stromal."""

    name = "brcam2c"
    task = "class"
    version = "1"
    classes = CLASSES

    def load(self, root: Path) -> Table:
        """Read the folder; UserError says what is wrong with it."""
        return read(root)

    def check(self, root: Path) -> list[str]:
        """What differs from the published data set, one sentence each; empty when nothing does."""
        root = Path(root)
        table = self.load(root)
        lists = read_lists(root)
        said = []
        for split, (images, nuclei) in PUBLISHED.items():
            here = [name for name in lists[split] if image_path(root, name).is_file()]
            label = table.label[table.split == split]
            found = tuple(np.bincount(label, minlength=len(self.classes)).tolist())
            if len(here) != images or found != nuclei:
                said.append(
                    f"{split} has {len(here)} images with {_listed(self.classes, found)}; "
                    f"published are {images} images with {_listed(self.classes, nuclei)}."
                )
        named = {name for names in lists.values() for name in names}
        lacking = sorted(name for name in named if not image_path(root, name).is_file())
        if lacking:
            said.append(f"{len(lacking)} listed images are missing, the first is {lacking[0]}.png.")
        spare = sorted(p.stem for p in (root / "images").glob("*.png") if p.stem not in named)
        if spare:
            said.append(f"{len(spare)} images stand in no split list, the first is {spare[0]}.png.")
        wrong = [name for name in sorted(named - set(lacking)) if not _is_half_micron(root, name)]
        if wrong:
            said.append(
                f"{len(wrong)} images do not have the size that their names give at {MPP} mpp, "
                f"the first is {wrong[0]}.png."
            )
        shared = table.patients_across()
        if shared:
            said.append(f"{len(shared)} patients are in more than one split: {', '.join(shared)}.")
        return said


def _is_half_micron(root: Path, name: str) -> bool:
    """Whether the png is as large as its name says it is at 0.5 mpp (fields are cut +- 1 px)."""
    fields = name.rsplit("_", 5)
    try:
        width, height, factor = float(fields[3]), float(fields[4]), float(fields[5])
    except (IndexError, ValueError):
        return False
    size = image_size(image_path(root, name))
    expected = (width * factor / 2, height * factor / 2)
    return all(abs(a - b) <= 2 for a, b in zip(size, expected, strict=True))


def _listed(classes: tuple[str, ...], counts: tuple[int, ...]) -> str:
    return ", ".join(f"{n} {name}" for name, n in zip(classes, counts, strict=True))
