"""Nuclei of generated tissue, as `lemon_muse.synthetic.write_images` writes it.

slides.csv               slide,patient,image,nuclei,mpp,split; paths relative to the folder
images/<slide>.png       RGB
nuclei/<slide>.geojson   FeatureCollection of points in px, properties.classification.name
"""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from eval.table import SPLITS, Table, image_size
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

COLUMNS = ("slide", "patient", "image", "nuclei", "mpp", "split")


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
        """Read the folder.

        Raises:
            UserError: slides.csv, an image or a nuclei file is missing or malformed, a class is
                unknown, a point lies outside its image.
        """
        root = Path(root)
        slides = _read_slides(root)
        classes = self.classes
        found = [_read_nuclei(root, slide, classes) for slide in slides]
        counts = [len(label) for _, label in found]
        points = np.concatenate([xy for xy, _ in found])

        def column(values: list[str]) -> np.ndarray:
            return np.repeat(np.array(values, str), counts)

        table = Table(
            image=column([str(root / slide["image"]) for slide in slides]),
            x=points[:, 0],
            y=points[:, 1],
            mpp=np.repeat(np.array([float(slide["mpp"]) for slide in slides]), counts),
            label=np.concatenate([label for _, label in found]),
            patient=column([slide["patient"] for slide in slides]),
            slide=column([slide["slide"] for slide in slides]),
            split=column([slide["split"] for slide in slides]),
            classes=classes,
        )
        if not len(table):
            raise UserError(f"{root} holds no nucleus; generate larger images.")
        shared = table.patients_across()
        if shared:
            log.warning(
                "%d patients are in more than one split: %s", len(shared), ", ".join(shared)
            )
        return table

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


def _read_slides(root: Path) -> list[dict[str, str]]:
    path = root / "slides.csv"
    if not path.is_file():
        nearby = [root.parent, *sorted(p for p in root.glob("*") if p.is_dir())]
        right = next((place for place in nearby if (place / "slides.csv").is_file()), None)
        if right is not None:
            raise UserError(f"{root} is the wrong folder level; give root={right} instead.")
        raise UserError(
            f"there is no {path}; give root= a folder written by the generator "
            f"(images/, nuclei/, slides.csv)."
        )
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not reader.fieldnames or not set(COLUMNS) <= set(reader.fieldnames):
            raise UserError(f"{path} must have the columns {', '.join(COLUMNS)}.")
        slides = list(reader)
    if not slides:
        raise UserError(f"{path} names no slide; generate the folder again.")
    for number, slide in enumerate(slides, start=2):
        if slide["split"] not in SPLITS:
            raise UserError(
                f"{path}, line {number}, has split '{slide['split']}'; it must be one of "
                f"{', '.join(SPLITS)}."
            )
        try:
            good = 0 < float(slide["mpp"]) < 100
        except (TypeError, ValueError):
            good = False
        if not good:
            raise UserError(
                f"{path}, line {number}, has mpp '{slide['mpp']}'; write the image's µm per pixel."
            )
    return slides


def _read_nuclei(
    root: Path, slide: dict[str, str], classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Points float64 [n, 2] (x, y in px) and labels int64 [n] of one slide."""
    path, image = root / slide["nuclei"], root / slide["image"]
    for needed in (path, image):
        if not needed.is_file():
            raise UserError(f"{needed} is missing, slides.csv names it; generate the folder again.")
    width, height = image_size(image)
    try:
        features = json.loads(path.read_text(encoding="utf-8"))["features"]
        points = [_point(feature) for feature in features]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a GeoJSON FeatureCollection of classified points "
            f"({type(error).__name__}: {error})."
        ) from None
    for x, y, name in points:
        if name not in classes:
            raise UserError(f"{path} has class '{name}'; the classes are {', '.join(classes)}.")
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"{path} has a point at x {x:g}, y {y:g}, outside its image of "
                f"{width} x {height} px; coordinates are pixels of the image."
            )
    if not points:
        log.warning("%s is empty: %s has no nucleus", path, slide["image"])
    xy = np.array([(x, y) for x, y, _ in points], np.float64).reshape(-1, 2)
    return xy, np.array([classes.index(name) for _, _, name in points], np.int64)


def _point(feature: dict[str, Any]) -> tuple[float, float, str]:
    geometry = feature["geometry"]
    if geometry["type"] != "Point":
        raise ValueError(f"geometry {geometry['type']} instead of Point")
    x, y = geometry["coordinates"][:2]
    return float(x), float(y), str(feature["properties"]["classification"]["name"])
