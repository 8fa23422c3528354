"""NuCLS: nuclei of breast cancer in 124 TCGA slides of 18 hospitals (Amgad, GigaScience 2022).

Layouts are described in `eval.benchmarks.nucls.files`, classes in `eval.benchmarks.nucls.classes`.
The pngs of the release lie at 0.2 µm per pixel whatever the slide's own is; the publication says so
(sites.google.com/view/nucls/data-format). Patient and hospital stand in the TCGA barcode.
"""

import logging
from itertools import chain
from pathlib import Path

import numpy as np

from eval import plans
from eval.benchmarks import DEFAULT, Paper, Request, task_of
from eval.benchmarks.nucls.check import differences
from eval.benchmarks.nucls.classes import KNOWN, TASKS
from eval.benchmarks.nucls.files import LEMON_HALF, Files, barcode, read
from eval.benchmarks.nucls.folds import Folds, official, read_folds
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

MPP = 0.2


class Nucls:
    """Classify a nucleus of breast cancer, on one of NuCLS's three levels of classes."""

    name = "nucls"
    version = "1"
    tasks = tuple(TASKS)

    def load(self, root: Path, request: Request = DEFAULT) -> Table:
        """Read the folder; nuclei of other classes, or outside their image, are left out.

        Under protocol=paper nuclei whose square of 74 px (14.8 µm) leaves the image are left out
        too. Groups are `fov`; `hospital` where the barcodes are known; `fold`, '' for a slide that
        no official fold tests, where the official folds are there.

        Raises:
            UserError: what `nucls_files` says; classes that the files lack; no nucleus; images
                whose µm per pixel is not known.
        """
        task = task_of(self, request)
        files = read(Path(root))
        mpp = _mpp(files, Path(root), request)
        table = _table(files, task, mpp)
        inside = np.concatenate([fov.inside() for fov in files.fovs])
        _warn(files, TASKS[task][0], outside=int((~inside).sum()))
        kept = inside & (table.label >= 0)
        if request.protocol == "paper":
            # The square is as wide in µm where the pixels are others than the release's.
            half = LEMON_HALF * (MPP / mpp)
            kept &= np.concatenate([fov.inside(half) for fov in files.fovs])
        if not kept.any():
            raise UserError(f"{root} holds no nucleus of {', '.join(table.classes)}.")
        table = table.take(np.flatnonzero(kept))
        folds = read_folds(Path(root)) if files.form == "release" else Folds()
        if folds.tested:
            number = {slide: str(fold) for slide, fold in folds.tested.items()}
            table.groups["fold"] = np.array([number.get(s, "") for s in table.slide.tolist()])
        elif files.form == "release":
            log.warning("%s lacks %s: no official folds", root, ", ".join(folds.missing))
        return table

    def folds(self, table: Table, request: Request = DEFAULT) -> list[plans.Fold]:
        """The official folds by hospital; folds grouped by hospital where the files of the official
        ones are missing, or CellViT++'s split shares patients; that split where it does not; under
        protocol=paper folds of single nuclei."""
        if request.protocol == "paper":
            return plans.random(table, seed=request.seed)
        if "fold" in table.groups:
            return official(table)
        if (table.split != "all").all() and not table.patients_across():
            return plans.official(table)
        return plans.grouped(table, by="hospital", seed=request.seed)

    def paper(self, task: str) -> Paper | None:
        """LEMON's protocol; none for super4, which LEMON does not measure."""
        if task == "super4":
            return None
        return Paper(
            source="LEMON (arXiv 2603.25802), table 3",
            probes=("logistic",),
            says="single nuclei are divided at random into five folds, so that nuclei of one "
            "patient train and test, since the paper states no grouping; only nuclei whose square "
            "of 74 px lies wholly in the png are kept, a filter inferred from the paper's counts",
        )

    def check(self, root: Path, request: Request = DEFAULT) -> list[str]:
        """What differs from the published data, one sentence each."""
        task_of(self, request)
        return differences(Path(root), request)


def _mpp(files: Files, root: Path, request: Request) -> float:
    if files.form == "detection":
        if request.image_mpp is None:
            raise UserError(
                f"neither label_map.yaml nor readme.txt of {root} states the µm per pixel of the "
                f"images; pass image_mpp=."
            )
        return request.image_mpp
    if request.image_mpp is not None and abs(request.image_mpp / MPP - 1) > 0.01:
        raise UserError(
            f"the pngs of NuCLS are published at {MPP} µm per pixel, not at {request.image_mpp:g}; "
            f"leave image_mpp= out."
        )
    return MPP


def _table(files: Files, task: str, mpp: float) -> Table:
    """All nuclei; label -1 where the task does not have their class."""
    level, classes = TASKS[task]
    if not all(level in fov.names for fov in files.fovs):
        has = sorted(set.intersection(*(set(fov.names) for fov in files.fovs)))
        able = [name for name, (needs, _) in TASKS.items() if needs in has]
        raise UserError(
            f"the labels of this folder have no {level} classes; use task={' or task='.join(able)}."
        )
    counts = [len(fov.points) for fov in files.fovs]
    codes = [barcode(fov.path.stem) for fov in files.fovs]
    # Without a barcode nothing is known of the patient: an image stands for one.
    lone = [f"{fov.split}/{fov.path.stem}" for fov in files.fovs]

    def column(values: list[str]) -> np.ndarray:
        return np.repeat(np.array(values, str), counts)

    number = {name: i for i, name in enumerate(classes)}
    names = list(chain.from_iterable(fov.names[level] for fov in files.fovs))
    points = np.concatenate([fov.points for fov in files.fovs])
    groups = {"fov": column([fov.path.stem for fov in files.fovs])}
    if all(codes):
        groups["hospital"] = column([code[2] for code in codes if code])
    return Table(
        image=column([str(fov.path) for fov in files.fovs]),
        x=points[:, 0],
        y=points[:, 1],
        mpp=np.full(len(points), mpp),
        label=np.array([number.get(name, -1) for name in names], np.int64),
        patient=column([code[1] if code else own for code, own in zip(codes, lone, strict=True)]),
        slide=column([code[0] if code else own for code, own in zip(codes, lone, strict=True)]),
        split=column([fov.split for fov in files.fovs]),
        classes=classes,
        groups=groups,
    )


def _warn(files: Files, level: str, *, outside: int) -> None:
    names = chain.from_iterable(fov.names[level] for fov in files.fovs)
    for found, said in (
        (len(files.no_image), "csvs have no image"),
        (len(files.no_labels), "images have no csv"),
        (sum(name not in KNOWN[level] for name in names), "nuclei have a class unknown to NuCLS"),
        (outside, "nuclei lie outside their image"),
    ):
        if found:
            log.warning("%d %s and are left out", found, said)
