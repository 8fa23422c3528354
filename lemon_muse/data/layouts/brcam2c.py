"""Dataset-BRCA-M2C: breast cancer nuclei as points in three classes (Abousamra, ICCV 2021).

Layout as published at github.com/TopoXLab/Dataset-BRCA-M2C::

    images/<name>.png                        RGB, about 490 px a side
    labels/<name>_gt_class_coords.txt        one nucleus a line: "Y X class", integers, no header
    brca_ds_train.txt  brca_ds_val.txt  brca_ds_test.txt      one "<name>.png" a line

`<name>` is `<slide>_<x>_<y>_<w>_<h>_<f>`: a field of w x h pixels of a TCGA slide, shrunk by f / 2.

The pixel size of every png is 0.5 µm. That is a property of the published data and no guess: f is
the slide's mpp / 0.25, and the side of each png is w * f / 2, which `check` recomputes.

Labels are pixel indices in (row, column) order, so a nucleus lies at x = X + 0.5, y = Y + 0.5.
"""

import logging
import re
from pathlib import Path

import numpy as np

from lemon_muse.data.table import SPLITS, Table, image_size
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

MPP = 0.5
CLASSES = ("lymphocyte", "tumour", "stromal")
LABEL_SUFFIX = "_gt_class_coords.txt"
SLIDE = re.compile(r"TCGA-\w\w-\w{4}-\w+-\w+-\w+")


def read(root: Path) -> Table:
    """Read the folder; images that the lists name and the folder lacks are left out.

    Raises:
        UserError: a folder, list or label file is missing, a label line is malformed, a point
            lies outside its image, an image does not decode, an image stands in two splits.
    """
    root = Path(root)
    _check_layout(root)
    columns: dict[str, list[np.ndarray]] = {"image": [], "points": [], "split": []}
    lists = read_lists(root)
    missing = [n for names in lists.values() for n in names if not image_path(root, n).is_file()]
    if missing:
        total = sum(map(len, lists.values()))
        if len(missing) == total:
            raise UserError(
                f"none of the {total} images that the split lists name is in "
                f"{root / 'images'}; the first is {missing[0]}.png: put the images there."
            )
        log.warning(
            "%d of %d listed images are not in %s and are left out, the first is %s.png",
            len(missing),
            total,
            root / "images",
            missing[0],
        )
    absent = set(missing)
    for split, names in lists.items():
        for name in names:
            if name in absent:
                continue
            points = _read_labels(root, name)
            columns["image"].append(np.full(len(points), str(image_path(root, name))))
            columns["points"].append(points)
            columns["split"].append(np.full(len(points), split))
    return _table(columns)


def _table(columns: dict[str, list[np.ndarray]]) -> Table:
    image = np.concatenate(columns["image"]).astype(str)
    points = np.concatenate(columns["points"])
    slides = {path: _slide(Path(path)) for path in set(image.tolist())}
    slide = np.array([slides[path] for path in image.tolist()], str)
    table = Table(
        image=image,
        x=points[:, 1] + 0.5,
        y=points[:, 0] + 0.5,
        mpp=np.full(len(points), MPP),
        label=points[:, 2].astype(np.int64) - 1,
        # The first three fields of a TCGA barcode name the patient.
        patient=np.array(["-".join(name.split("-")[:3]) for name in slide.tolist()], str),
        slide=slide,
        split=np.concatenate(columns["split"]).astype(str),
        classes=CLASSES,
    )
    if not len(table):
        raise UserError("the data set holds no nucleus: every label file is empty.")
    for sentence in table.split_leaks():
        log.warning("%s", sentence)
    return table


def _check_layout(root: Path) -> None:
    needed = ["images", "labels"]
    if all((root / name).is_dir() for name in needed):
        return
    shape = "images/, labels/ and brca_ds_train.txt, brca_ds_val.txt, brca_ds_test.txt"
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give the folder that holds {shape}.")
    nearby = [root.parent, *sorted(p for p in root.iterdir() if p.is_dir())]
    for place in nearby:
        if all((place / name).is_dir() for name in needed):
            raise UserError(f"{root} is the wrong folder level; give {place} instead.")
    lacking = next(name for name in needed if not (root / name).is_dir())
    raise UserError(f"{root} has no folder '{lacking}'; give the folder that holds {shape}.")


def read_lists(root: Path) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for split in SPLITS:
        path = root / f"brca_ds_{split}.txt"
        if not path.is_file():
            raise UserError(
                f"the split list {path} is missing; it holds one image name a line, "
                f"as in the published data set."
            )
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        lists[split] = [line.strip().removesuffix(".png") for line in lines if line.strip()]
        for name in lists[split]:
            if name in seen:
                raise UserError(
                    f"the image {name}.png is listed twice (brca_ds_{seen[name]}.txt and "
                    f"{path.name}); keep it in one list."
                )
            seen[name] = split
    return lists


def _read_labels(root: Path, name: str) -> np.ndarray:
    """int64 [n, 3]: row, column, class 1..3, every point inside the image."""
    path = root / "labels" / f"{name}{LABEL_SUFFIX}"
    if not path.is_file():
        raise UserError(
            f"the label file {path} is missing; fetch it or take {name}.png off the list."
        )
    width, height = image_size(image_path(root, name))
    points = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 3 or not all(word.lstrip("+-").isdecimal() for word in words):
            raise UserError(f"{path}, line {number}, is '{line.strip()}'; it must be 'Y X class'.")
        row, column, kind = map(int, words)
        if not 1 <= kind <= len(CLASSES):
            raise UserError(f"{path}, line {number}, has class {kind}; the classes are 1, 2 and 3.")
        if not (0 <= row < height and 0 <= column < width):
            raise UserError(
                f"{path}, line {number}, lies outside its image of {width} x {height} px: "
                f"Y {row}, X {column}; the order of a line is 'Y X class'."
            )
        points.append((row, column, kind))
    if not points:
        log.warning("%s is empty: %s.png has no nucleus", path, name)
    return np.array(points, np.int64).reshape(-1, 3)


def image_path(root: Path, name: str) -> Path:
    return root / "images" / f"{name}.png"


def _slide(path: Path) -> str:
    slide = path.stem.rsplit("_", 5)[0]
    if not SLIDE.fullmatch(slide):
        raise UserError(
            f"the image name {path.name} does not start with a TCGA slide barcode such as "
            f"TCGA-A7-A0D9-01Z-00-DX2, so its patient is unknown; keep the published names."
        )
    return slide
