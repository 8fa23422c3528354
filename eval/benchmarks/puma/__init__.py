"""PUMA: ten kinds of nuclei in melanoma, and two groupings of them in three (Schuiveling 2025).

The layout is described in `eval.benchmarks.puma.files`. Tasks: `muse` (tumour, lymphocyte, other;
plasma cells are other), `track1` (the challenge's tumour, TIL, other; plasma cells are TILs) and
`all10`. The set has no labelled test part: the division is MUSE's, 42 ROIs to choose on and 42 to
test on. Patients are not published, so every ROI counts as a patient of its own.

The pixel size is not guessed: the tags of the files say 300 dpi, which is none; a copy of the data
on Hugging Face (csmp-hub/puma) lists 0.2263 to 0.2269 µm for every ROI, and MUSE assumes 0.25.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from eval import plans
from eval.benchmarks import DEFAULT, MUSE, Paper, Request, task_of
from eval.benchmarks.fields import Field, field_folder, lacking, recut
from eval.benchmarks.puma.files import CONTEXTS, NAMES, Roi, images_in, read_nuclei, read_rois
from eval.benchmarks.puma.split import SPLIT_OF
from lemon_muse.data.table import Table, image_size, read_image
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

MUSE_MPP = 0.25
LISTED_MPP = "0.2263 to 0.2269"
SIDE, CONTEXT_SIDE = 1024, 5120
ALL = tuple(name.removeprefix("nuclei_").replace("tumor", "tumour") for name in NAMES)
# Classes, and the class of each of NAMES.
TASKS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "muse": (("tumour", "lymphocyte", "other"), (0, 1, 2, 2, 2, 2, 2, 2, 2, 2)),
    "track1": (("tumour", "til", "other"), (0, 1, 1, 2, 2, 2, 2, 2, 2, 2)),
    "all10": (ALL, tuple(range(10))),
}
# Percent of all nuclei per class, in the order of NAMES, and their number (the data set's paper).
PUBLISHED = (97429, (58.93, 22.21, 0.53, 7.36, 0.71, 0.38, 3.96, 1.75, 2.27, 1.90))
# Points in MUSE's split files.
MUSE_POINTS = {"val": 20819, "test": 19943}
PUBLISHED_ROIS = (205, 206)


class Puma:
    """Classify a nucleus of melanoma tissue."""

    name = "puma"
    version = "1"
    tasks = tuple(TASKS)

    def load(self, root: Path, request: Request = DEFAULT) -> Table:
        """Read the folder; ROIs without image or nuclei are left out, with a warning.

        `request.image_mpp` is needed unless protocol=paper, which takes MUSE's 0.25. `slides` is
        the folder of the context images: nuclei then get their true surroundings. Groups: tissue.

        Raises:
            UserError: no mpp, or what is wrong with the folder or a file.
        """
        task = task_of(self, request)
        mpp = _mpp(request)
        rois = read_rois(Path(root))
        table, outside = _table(rois, task, mpp, every_ring=request.protocol == "paper")
        for sentence in [*_absent(rois), *_outside(outside)]:
            log.warning("%s", sentence)
        if request.slides is None:
            return table
        folder = field_folder(request, self.name)
        fields = _fields(table, request.slides, mpp)
        if said := lacking(fields, table):
            log.warning("%s", said)
        return recut(table, fields, folder)

    def folds(self, table: Table, request: Request = DEFAULT) -> list[plans.Fold]:
        """MUSE's division, by ROI."""
        return plans.from_word("official", table, seed=request.seed)

    def paper(self, task: str) -> Paper | None:
        """MUSE's evaluation of the first task; nothing else is published for given nuclei."""
        if task != "muse":
            return None
        says = (
            f"every ring of an outline is a nucleus, holes too, the ROIs are taken to have "
            f"{MUSE_MPP} µm per pixel, plasma cells are 'other', {MUSE.says}"
        )
        return replace(MUSE, says=says)

    def check(self, root: Path, request: Request = DEFAULT) -> list[str]:
        """What differs from the published data, and what nobody states: mpp and patients."""
        rois = read_rois(Path(root))
        # Any mpp will do: nothing that is compared depends on it.
        table, outside = _table(rois, "all10", request.image_mpp or MUSE_MPP, every_ring=False)
        said = [*_rois(rois), *_absent(rois), *_outside(outside), *_counts(rois, table)]
        odd = sorted({p for p in table.image.tolist() if image_size(Path(p)) != (SIDE, SIDE)})
        if odd:
            said.append(f"{len(odd)} ROIs are not {SIDE} x {SIDE} px, the first is {odd[0]}.")
        if request.slides is not None:
            said += _contexts(table, request.slides)
        if request.image_mpp is None:
            said.append(f"no file states its µm per pixel: {_CHOICE}.")
        said.append(
            "patients are not published: two ROIs of one may stand on both sides of a split."
        )
        return said


_CHOICE = (
    f"a copy on Hugging Face (csmp-hub/puma) lists {LISTED_MPP} per ROI, MUSE assumes {MUSE_MPP}"
)


def _mpp(request: Request) -> float:
    if request.image_mpp is not None:
        return request.image_mpp
    if request.protocol == "paper":
        return MUSE_MPP
    raise UserError(
        f"the files of PUMA do not state their µm per pixel: {_CHOICE}; give image_mpp=, for "
        f"example image_mpp=0.2266."
    )


def _table(
    rois: list[Roi], task: str, mpp: float, *, every_ring: bool
) -> tuple[Table, dict[str, int]]:
    """The nuclei of all ROIs that have both files, and {ROI: nuclei outside its image}."""
    whole = [roi for roi in rois if roi.image and roi.nuclei]
    points, kinds, outside = [], [], {}
    for roi in whole:
        assert roi.image and roi.nuclei
        found, kind = read_nuclei(roi.nuclei, every_ring=every_ring)
        inside = ((found >= 0) & (found < image_size(roi.image))).all(1)
        if not inside.all():
            outside[roi.name] = int((~inside).sum())
        points.append(found[inside])
        kinds.append(kind[inside])
    counts = [len(part) for part in points]
    every = np.concatenate(points)
    if not len(every):
        raise UserError("the data set holds no nucleus: every geojson file is empty.")

    def column(values: list[str]) -> np.ndarray:
        return np.repeat(np.array(values, str), counts)

    classes, class_of = TASKS[task]
    table = Table(
        image=column([str(roi.image) for roi in whole]),
        x=every[:, 0],
        y=every[:, 1],
        mpp=np.full(len(every), mpp),
        label=np.array(class_of, np.int64)[np.concatenate(kinds)],
        patient=column([roi.name for roi in whole]),
        slide=column([roi.name for roi in whole]),
        split=column([SPLIT_OF.get(roi.name, "train") for roi in whole]),
        classes=classes,
        groups={"tissue": column([roi.tissue for roi in whole])},
    )
    return table, outside


def _fields(table: Table, folder: Path, mpp: float) -> dict[str, Field]:
    """Where each ROI that has a context image lies in it: in its middle."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give slides= the folder {CONTEXTS}.")
    inner = folder / CONTEXTS
    found = images_in(inner if inner.is_dir() else folder, "_context")
    corner = (CONTEXT_SIDE - SIDE) / 2
    fields = {}
    for image in dict.fromkeys(table.image.tolist()):
        source = found.get(Path(image).stem)
        if source is None:
            continue
        sizes = (image_size(source), image_size(Path(image)))
        if sizes != ((CONTEXT_SIDE, CONTEXT_SIDE), (SIDE, SIDE)):
            raise UserError(
                f"{source} and {image} must have {CONTEXT_SIDE} x {CONTEXT_SIDE} and {SIDE} x "
                f"{SIDE} px, or the place of the one in the other is unknown; fetch them again."
            )
        fields[image] = Field(source, corner, corner, SIDE, SIDE, mpp, is_slide=False)
    if not fields:
        raise UserError(
            f"{folder} has no context image of any ROI, such as "
            f"training_set_primary_roi_001_context.tif; give slides= the folder {CONTEXTS}."
        )
    return fields


def _absent(rois: list[Roi]) -> list[str]:
    said = []
    for what, names in (
        ("image", [roi.name for roi in rois if roi.image is None]),
        ("geojson file of nuclei", [roi.name for roi in rois if roi.nuclei is None]),
    ):
        if names:
            said.append(
                f"{len(names)} of {len(rois)} ROIs have no {what} and are left out, the first is "
                f"{names[0]}."
            )
    return said


def _outside(outside: dict[str, int]) -> list[str]:
    if not outside:
        return []
    return [
        f"{sum(outside.values())} nuclei of {len(outside)} ROIs have their centre outside the "
        f"image and are left out, the first ROI is {next(iter(outside))}."
    ]


def _rois(rois: list[Roi]) -> list[str]:
    """Which ROIs are missing."""
    said = []
    whole = {roi.name for roi in rois if roi.image and roi.nuclei}
    if len(whole) not in PUBLISHED_ROIS:
        low, high = PUBLISHED_ROIS
        said.append(f"{len(whole)} ROIs are here; published are {low} or {high}, by the version.")
    for split in ("val", "test"):
        names = sorted(name for name, which in SPLIT_OF.items() if which == split)
        lack = [name for name in names if name not in whole]
        if lack:
            said.append(
                f"{len(lack)} of MUSE's {len(names)} {split} ROIs are missing, the first is "
                f"{lack[0]}."
            )
    return said


def _counts(rois: list[Roi], table: Table) -> list[str]:
    """What differs in numbers of nuclei, where the ROIs are complete."""
    said = []
    whole = [roi.name for roi in rois if roi.image and roi.nuclei]
    if len(whole) in PUBLISHED_ROIS:
        total, shares = PUBLISHED
        found = np.bincount(table.label, minlength=len(NAMES)) / len(table) * 100
        if len(table) != total:
            said.append(f"{len(table)} nuclei are here; the paper counts {total}.")
        for name, share, wanted in zip(ALL, found, shares, strict=True):
            if abs(share - wanted) > 0.1:
                said.append(f"{share:.2f} % of the nuclei are {name}; the paper has {wanted} %.")
    for split, wanted in MUSE_POINTS.items():
        if {name for name, which in SPLIT_OF.items() if which == split} <= set(whole):
            count = len(table.rows(split))
            if count != wanted:
                said.append(f"{split} has {count} nuclei; MUSE's split file has {wanted} points.")
    return said


def _contexts(table: Table, folder: Path) -> list[str]:
    """What is missing of the context images, and whether the ROI lies in the middle of one."""
    fields = _fields(table, folder, MUSE_MPP)
    said = [lack] if (lack := lacking(fields, table)) else []
    image, field = next(iter(fields.items()))
    x, y = int(field.x), int(field.y)
    middle = read_image(field.source)[y : y + SIDE, x : x + SIDE].astype(int)
    if np.abs(middle - read_image(Path(image))).mean() > 10:
        said.append(f"the middle of {field.source} is not {image}.")
    return said
