"""OCELOT: tumour cells against all others, in six organs (Ryu et al., CVPR 2023; v1.0.1).

The layout is described in `eval.benchmarks.ocelot.files`. Every pair states its own pixel size,
cell.resized_mpp_x and _y, about 0.2 µm. Labels are pixel indices, so a cell lies at x + 0.5,
y + 0.5; label 1 is a background cell, 2 a tumour cell (evaluation/eval.py of lunit-io/ocelot23algo,
line 7; a docstring further down says the opposite).
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from eval import plans
from eval.benchmarks import DEFAULT, MUSE, Paper, Request, task_of
from eval.benchmarks.fields import Field, field_folder, find_slides, lacking, recut
from eval.benchmarks.ocelot.files import AGREES, SIDE, Pair, read_labels, read_pairs
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

CLASSES = ("background", "tumour")
PAIRS = {"train": 400, "val": 137, "test": 126}


class Ocelot:
    """Classify a cell as tumour or background."""

    name = "ocelot"
    version = "1"
    tasks = ("class",)
    classes = CLASSES

    def load(self, root: Path, request: Request = DEFAULT) -> Table:
        """Read the folder; pairs without image or labels are left out, with a warning.

        `request.image_mpp` stands in where a pair states no pixel size. Groups: organ.

        Raises:
            UserError: what is wrong with the folder, a file or the slides.
        """
        task_of(self, request)
        pairs = read_pairs(Path(root))
        table, outside = _table(pairs, request.image_mpp)
        for sentence in [*_absent(pairs), *_outside(outside), *table.split_leaks()]:
            log.warning("%s", sentence)
        if request.slides is None:
            return table
        folder = field_folder(request, self.name)
        fields = _fields(pairs, table, request.slides)
        if said := lacking(fields, table):
            log.warning("%s", said)
        return recut(table, fields, folder)

    def folds(self, table: Table, request: Request = DEFAULT) -> list[plans.Fold]:
        """The published split, which is by slide. By default nothing is fitted or chosen on a
        patient of the test part; protocol=paper takes the split as it is."""
        found = plans.from_word("official", table, seed=request.seed)
        if request.protocol == "paper":
            return found
        return [_by_patient(table, fold) for fold in found]

    def paper(self, task: str) -> Paper | None:
        """MUSE's evaluation."""
        del task
        return replace(MUSE, says=f"the split is by slide and not by patient, {MUSE.says}")

    def check(self, root: Path, request: Request = DEFAULT) -> list[str]:
        """What differs from version 1.0.1 or from what metadata.json says of itself."""
        root = Path(root)
        pairs = read_pairs(root)
        table, outside = _table(pairs, request.image_mpp)
        said = []
        for split, wanted in PAIRS.items():
            count = sum(1 for p in pairs if p.split == split and p.image and p.labels)
            if count != wanted:
                said.append(f"{split} has {count} pairs; published are {wanted}.")
        said += [*_absent(pairs), *_outside(outside), *table.split_leaks(), *_unlisted(root, pairs)]
        if odd := [p.name for p in pairs if not _agrees(p)]:
            said.append(
                f"{len(odd)} pairs have an mpp that does not follow from their rectangle in the "
                f"slide, the first is {odd[0]}."
            )
        if request.slides is not None:
            lack = lacking(_fields(pairs, table, request.slides), table)
            said += [lack] if lack else []
        return said


def _table(pairs: list[Pair], image_mpp: float | None) -> tuple[Table, dict[str, int]]:
    """The nuclei of all pairs that have image and labels, and {pair: labels outside its image}."""
    whole = [pair for pair in pairs if pair.image and pair.labels]
    if not whole:
        first = pairs[0]
        raise UserError(
            f"none of the {len(pairs)} pairs of metadata.json has both its image and its labels; "
            f"the first would be images/{first.split}/cell/{first.name}.jpg and "
            f"annotations/{first.split}/cell/{first.name}.csv."
        )
    if image_mpp is not None and all(pair.mpp for pair in pairs):
        raise UserError("metadata.json states the µm per pixel of every pair; leave image_mpp out.")
    points, outside = [], {}
    for pair in whole:
        found = read_labels(pair)
        inside = ((found[:, :2] >= 0) & (found[:, :2] < SIDE)).all(1)
        if not inside.all():
            outside[pair.name] = int((~inside).sum())
        points.append(found[inside])
    counts = [len(part) for part in points]
    every = np.concatenate(points)
    if not len(every):
        raise UserError("the data set holds no cell: every label file is empty.")

    def column(values: list[str]) -> np.ndarray:
        return np.repeat(np.array(values, str), counts)

    table = Table(
        image=column([str(pair.image) for pair in whole]),
        x=every[:, 0] + 0.5,
        y=every[:, 1] + 0.5,
        mpp=np.repeat([_mpp(pair, image_mpp) for pair in whole], counts),
        label=every[:, 2] - 1,
        patient=column([_patient(pair.slide) for pair in whole]),
        slide=column([pair.slide for pair in whole]),
        split=column([pair.split for pair in whole]),
        classes=CLASSES,
        groups={"organ": column([pair.organ for pair in whole])},
    )
    return table, outside


def _patient(slide: str) -> str:
    """The first three fields of a TCGA barcode; the whole name of another slide."""
    return "-".join(slide.split("-")[:3]) if slide.startswith("TCGA-") else slide


def _mpp(pair: Pair, image_mpp: float | None) -> float:
    mpp = pair.mpp or image_mpp
    if mpp is None:
        raise UserError(
            f"metadata.json states no cell.resized_mpp_x and _y for the pair {pair.name}; fetch it "
            f"again, or give image_mpp=, the µm per pixel of the patches that lack it."
        )
    return mpp


def _by_patient(table: Table, fold: plans.Fold) -> plans.Fold:
    """The fold without the rows of train and val whose patient is tested."""
    tested = np.unique(table.patient[fold.test])
    train, val = (rows[~np.isin(table.patient[rows], tested)] for rows in (fold.train, fold.val))
    return plans.Fold(fold.name, train, val, fold.test)


def _fields(pairs: list[Pair], table: Table, slides: Path) -> dict[str, Field]:
    """Where each image that has a slide lies in it."""
    found = find_slides(slides, table.slide.tolist())
    images = set(table.image.tolist())
    fields = {}
    for pair in pairs:
        if str(pair.image) not in images or pair.slide not in found:
            continue
        if pair.box is None or pair.slide_mpp is None:
            raise UserError(
                f"metadata.json states no mpp_x or no cell.x_start, y_start, x_end, y_end for the "
                f"pair {pair.name}, so its place in the slide is unknown; fetch it again."
            )
        fields[str(pair.image)] = Field(found[pair.slide], *pair.box, mpp=pair.slide_mpp)
    return fields


def _agrees(pair: Pair) -> bool:
    """Whether the mpp of the patch is that of the slide times the factor of the rectangle."""
    if pair.mpp is None or pair.slide_mpp is None or pair.box is None:
        return True
    return all(abs(side * pair.slide_mpp / SIDE / pair.mpp - 1) <= AGREES for side in pair.box[2:])


def _absent(pairs: list[Pair]) -> list[str]:
    said = []
    for what, files in (
        ("image", [p.image for p in pairs]),
        ("label file", [p.labels for p in pairs]),
    ):
        names = [pair.name for pair, file in zip(pairs, files, strict=True) if file is None]
        if names:
            said.append(
                f"{len(names)} of {len(pairs)} pairs have no {what} and are left out, the first is "
                f"{names[0]}."
            )
    return said


def _outside(outside: dict[str, int]) -> list[str]:
    if not outside:
        return []
    return [
        f"{sum(outside.values())} labels of {len(outside)} pairs lie outside their image and are "
        f"left out, the first pair is {next(iter(outside))}."
    ]


def _unlisted(root: Path, pairs: list[Pair]) -> list[str]:
    listed = {pair.image for pair in pairs}
    spare = sorted(
        path.relative_to(root).as_posix()
        for path in [*root.glob("images/**/cell/*.jpg"), *root.glob("images/**/cell_patches/*.tif")]
        if path not in listed
    )
    if not spare:
        return []
    return [f"{len(spare)} images do not stand in metadata.json, the first is {spare[0]}."]
