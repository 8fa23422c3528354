"""Any images with their nuclei, named by one csv file; also what `synthetic.write_images` writes.

slides.csv               slide,patient,image,nuclei,mpp,split; paths relative to the folder
images/<slide>.png       RGB
nuclei/<slide>.geojson   FeatureCollection of points or polygons in px of the image; the class,
                         where known, is properties.classification.name (QuPath's place for it)
"""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.data.table import SPLITS, Table, image_size
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

COLUMNS = ("slide", "patient", "image", "nuclei", "mpp", "split")


def read(root: Path, *, classes: tuple[str, ...] | None = None) -> Table:
    """Read the folder.

    Args:
        root: the folder of slides.csv.
        classes: the names that may occur; None: those that occur, sorted, and a nucleus without a
            class has label -1.

    Raises:
        UserError: slides.csv, an image or a nuclei file is missing or malformed, an mpp is missing,
            a class is unknown, a point lies outside its image.
    """
    root = Path(root)
    slides = _read_slides(root)
    found = [_read_nuclei(root, slide, classes) for slide in slides]
    names = classes or tuple(sorted({name for _, kinds in found for name in kinds if name}))
    number = {name: i for i, name in enumerate(names)}
    counts = [len(kinds) for _, kinds in found]
    points = np.concatenate([xy for xy, _ in found])

    def column(values: list[str]) -> np.ndarray:
        return np.repeat(np.array(values, str), counts)

    table = Table(
        image=column([str(root / slide["image"]) for slide in slides]),
        x=points[:, 0],
        y=points[:, 1],
        mpp=np.repeat(np.array([float(slide["mpp"]) for slide in slides]), counts),
        label=np.array([number.get(n, -1) for _, kinds in found for n in kinds], np.int64),
        patient=column([slide["patient"] for slide in slides]),
        slide=column([slide["slide"] for slide in slides]),
        split=column([slide["split"] for slide in slides]),
        classes=names,
    )
    if not len(table):
        raise UserError(f"{root} holds no nucleus: every nuclei file is empty.")
    for sentence in table.split_leaks():
        log.warning("%s", sentence)
    return table


def _read_slides(root: Path) -> list[dict[str, str]]:
    path = root / "slides.csv"
    if not path.is_file():
        nearby = [root.parent, *sorted(p for p in root.glob("*") if p.is_dir())]
        right = next((place for place in nearby if (place / "slides.csv").is_file()), None)
        if right is not None:
            raise UserError(f"{root} is the wrong folder level; give {right} instead.")
        raise UserError(f"there is no {path}; it names the slides of the folder, one a line.")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not reader.fieldnames or not set(COLUMNS) <= set(reader.fieldnames):
            raise UserError(f"{path} must have the columns {', '.join(COLUMNS)}.")
        slides = list(reader)
    if not slides:
        raise UserError(f"{path} names no slide; write one line for each image.")
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
                f"{path}, line {number}, has mpp '{slide['mpp']}'; write the image's µm per pixel "
                f"there, it is never guessed."
            )
    return slides


def _read_nuclei(
    root: Path, slide: dict[str, str], classes: tuple[str, ...] | None
) -> tuple[np.ndarray, list[str]]:
    """Points float64 [n, 2] (x, y in px) and class names [n] ('' where unknown) of one slide."""
    path, image = root / slide["nuclei"], root / slide["image"]
    for needed in (path, image):
        if not needed.is_file():
            raise UserError(f"{needed} is missing, but slides.csv names it; put it there.")
    width, height = image_size(image)
    try:
        features = json.loads(path.read_text(encoding="utf-8"))["features"]
        points = [_point(feature) for feature in features]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not a GeoJSON FeatureCollection of points or polygons "
            f"({type(error).__name__}: {error})."
        ) from None
    for x, y, name in points:
        if classes is not None and name not in classes:
            raise UserError(f"{path} has class '{name}'; the classes are {', '.join(classes)}.")
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"{path} has a point at x {x:g}, y {y:g}, outside its image of "
                f"{width} x {height} px; coordinates are pixels of the image."
            )
    if not points:
        log.warning("%s is empty: %s has no nucleus", path, slide["image"])
    xy = np.array([(x, y) for x, y, _ in points], np.float64).reshape(-1, 2)
    return xy, [name for _, _, name in points]


def _point(feature: dict[str, Any]) -> tuple[float, float, str]:
    geometry = feature["geometry"]
    kind = (feature.get("properties") or {}).get("classification") or {}
    name = str(kind.get("name", ""))
    if geometry["type"] == "Point":
        x, y = geometry["coordinates"][:2]
        return float(x), float(y), name
    if geometry["type"] == "Polygon":
        x, y = _centroid(np.asarray(geometry["coordinates"][0], np.float64)[:, :2])
        return x, y, name
    raise ValueError(f"geometry {geometry['type']} instead of Point or Polygon")


def _centroid(ring: np.ndarray) -> tuple[float, float]:
    """Centre of the area of a ring [n, 2], closed or not; mean of its corners if it has none."""
    after = np.roll(ring, -1, axis=0)
    cross = ring[:, 0] * after[:, 1] - after[:, 0] * ring[:, 1]
    area = cross.sum() / 2
    if abs(area) < 1e-9:
        x, y = ring.mean(0)
    else:
        x, y = ((ring + after) * cross[:, None]).sum(0) / (6 * area)
    return float(x), float(y)
