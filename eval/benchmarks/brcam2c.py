"""BRCAM2C: nuclei of breast tissue in three classes (Dataset-BRCA-M2C, Abousamra, ICCV 2021).

The layout, its traps and its mpp are described in `lemon_muse.data.layouts.brcam2c`. With slides=
every field is cut again from its TCGA slide, with the tissue around it and at the slide's own
resolution, as MUSE's evaluation does; the names of the images say where each lies.
"""

import logging
from pathlib import Path

import numpy as np

from eval import plans
from eval.benchmarks import DEFAULT, MUSE, Paper, Request, task_of
from eval.benchmarks.fields import Field, field_folder, find_slides, lacking, recut
from lemon_muse.data.layouts.brcam2c import CLASSES, MPP, image_path, read, read_lists
from lemon_muse.data.table import Table, image_size
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

# Images and nuclei per class of the published data set, counted on its files.
PUBLISHED = {
    "train": (80, (3541, 9956, 5150)),
    "val": (10, (1358, 733, 1042)),
    "test": (30, (960, 6109, 1789)),
}


class BrcaM2C:
    """Classify a nucleus of breast tissue as lymphocyte, tumour / epithelial or stromal."""

    name = "brcam2c"
    version = "1"
    tasks = ("class",)
    classes = CLASSES

    def load(self, root: Path, request: Request = DEFAULT) -> Table:
        """Read the folder; with `request.slides`, fields without a slide are left out.

        Raises:
            UserError: what is wrong with the folder or the slides, or an mpp that is not the
                published one.
        """
        task_of(self, request)
        if request.image_mpp not in (None, MPP):
            raise UserError(
                f"image_mpp={request.image_mpp:g}: the images of BRCA-M2C have {MPP} µm per pixel "
                f"by their publication; leave image_mpp out."
            )
        table = read(root)
        if request.slides is None:
            return table
        folder = field_folder(request, self.name)
        fields = _fields(table, request.slides)
        if said := lacking(fields, table):
            log.warning("%s", said)
        return recut(table, fields, folder)

    def folds(self, table: Table, request: Request = DEFAULT) -> list[plans.Fold]:
        """The published split; test shares no patient with train or val."""
        return plans.from_word("official", table, seed=request.seed)

    def paper(self, task: str) -> Paper | None:
        """MUSE's evaluation."""
        del task
        return MUSE

    def check(self, root: Path, request: Request = DEFAULT) -> list[str]:
        """What differs from the published data set, one sentence each; empty when nothing does."""
        root = Path(root)
        table = read(root)
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
        absent = sorted(name for name in named if not image_path(root, name).is_file())
        if absent:
            said.append(f"{len(absent)} listed images are missing, the first is {absent[0]}.png.")
        spare = sorted(p.stem for p in (root / "images").glob("*.png") if p.stem not in named)
        if spare:
            said.append(f"{len(spare)} images stand in no split list, the first is {spare[0]}.png.")
        wrong = [name for name in sorted(named - set(absent)) if not _is_half_micron(root, name)]
        if wrong:
            said.append(
                f"{len(wrong)} images do not have the size that their names give at {MPP} mpp, "
                f"the first is {wrong[0]}.png."
            )
        said += table.split_leaks()
        if request.slides is not None and (lack := lacking(_fields(table, request.slides), table)):
            said.append(lack)
        return said


def _fields(table: Table, slides: Path) -> dict[str, Field]:
    """Where each image that has a slide lies in it."""
    found = find_slides(slides, table.slide.tolist())
    fields = {}
    for image, slide in set(zip(table.image.tolist(), table.slide.tolist(), strict=True)):
        place = _place(Path(image).stem)
        if place is None:
            raise UserError(
                f"the name {Path(image).name} does not end with _x_y_w_h_factor, so its place in "
                f"the slide is unknown; keep the published names."
            )
        x, y, width, height, factor = place
        if slide in found:
            # The factor is the slide's µm per pixel / 0.25.
            fields[image] = Field(found[slide], x, y, width, height, 0.25 * factor)
    return fields


def _place(name: str) -> tuple[float, float, float, float, float] | None:
    """x, y, w, h in level-0 px of the slide, and the factor, that an image's name states."""
    try:
        x, y, width, height, factor = map(float, name.rsplit("_", 5)[1:])
    except ValueError:
        return None
    return (x, y, width, height, factor) if min(width, height, factor) > 0 else None


def _is_half_micron(root: Path, name: str) -> bool:
    """Whether the png is as large as its name says it is at 0.5 mpp (fields are cut +- 1 px)."""
    place = _place(name)
    if place is None:
        return False
    size = image_size(image_path(root, name))
    expected = (place[2] * place[4] / 2, place[3] * place[4] / 2)
    return all(abs(a - b) <= 2 for a, b in zip(size, expected, strict=True))


def _listed(classes: tuple[str, ...], counts: tuple[int, ...]) -> str:
    return ", ".join(f"{n} {name}" for name, n in zip(classes, counts, strict=True))
