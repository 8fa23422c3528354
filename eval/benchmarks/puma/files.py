"""The files of PUMA, as unpacked.

Layout as published at zenodo.org/records/15050523::

    01_training_dataset_tif_ROIs/<roi>.tif                         RGB or RGBA, 1024 x 1024 px
    01_training_dataset_geojson_nuclei/<roi>_nuclei.geojson        one feature a nucleus
    01_training_dataset_tif_context_ROIs/<roi>_context.tif         5120 x 5120 px; optional

`<roi>` is training_set_{metastatic,primary}_roi_NNN; .tiff occurs as well as .tif. A feature is a
Polygon or a MultiPolygon in px of the ROI, x before y; its class is
properties.classification.name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks import right_level
from lemon_muse.errors import UserError

ROIS = "01_training_dataset_tif_ROIs"
NUCLEI = "01_training_dataset_geojson_nuclei"
CONTEXTS = "01_training_dataset_tif_context_ROIs"
# In the order of MUSE's evaluation (preprocess/05).
NAMES = (
    "nuclei_tumor",
    "nuclei_lymphocyte",
    "nuclei_plasma_cell",
    "nuclei_histiocyte",
    "nuclei_melanophage",
    "nuclei_neutrophil",
    "nuclei_stroma",
    "nuclei_endothelium",
    "nuclei_epithelium",
    "nuclei_apoptosis",
)
ROI = re.compile(r"training_set_(metastatic|primary)_roi_\d+")


@dataclass(frozen=True)
class Roi:
    """One ROI; `image` and `nuclei` are None where the file is not there."""

    name: str
    image: Path | None
    nuclei: Path | None

    @property
    def tissue(self) -> str:
        """'metastatic' or 'primary'."""
        return self.name.split("_")[2]


def read_rois(root: Path) -> list[Roi]:
    """Every ROI that has an image or nuclei, sorted by name.

    Raises:
        UserError: the wrong folder level, or no ROI with both.
    """
    right_level(root, (ROIS, NUCLEI), shape=f"{ROIS}/ and {NUCLEI}/")
    images = images_in(root / ROIS, "")
    nuclei = {
        path.name.removesuffix("_nuclei.geojson"): path
        for path in sorted((root / NUCLEI).glob("*_nuclei.geojson"))
    }
    names = sorted(name for name in {*images, *nuclei} if ROI.fullmatch(name))
    rois = [Roi(name, images.get(name), nuclei.get(name)) for name in names]
    if not any(roi.image and roi.nuclei for roi in rois):
        raise UserError(
            f"{root} has no ROI with both its image and its nuclei, such as "
            f"{ROIS}/training_set_primary_roi_001.tif and "
            f"{NUCLEI}/training_set_primary_roi_001_nuclei.geojson; unpack both archives there."
        )
    return rois


def images_in(folder: Path, ending: str) -> dict[str, Path]:
    """The .tif and .tiff files of a folder whose stems end so, by stem without the ending."""
    return {
        path.stem.removesuffix(ending): path
        for path in sorted(folder.glob("*"))
        if path.suffix.lower() in (".tif", ".tiff") and path.stem.endswith(ending)
    }


def read_nuclei(path: Path, *, every_ring: bool) -> tuple[np.ndarray, np.ndarray]:
    """The nuclei of one geojson file.

    Args:
        every_ring: as MUSE's evaluation: every ring of every feature is a nucleus, holes too, its
            corners cut off to whole px. False: one nucleus a Polygon and one a part of a
            MultiPolygon, by the outer ring.

    Returns:
        Centres of mass, float64 [n, 2], and class, int64 [n], an index into NAMES.

    Raises:
        UserError: the file is damaged, or a feature has no known class or no usable outline.
    """
    import json

    try:
        features = json.loads(path.read_text(encoding="utf-8-sig"))["features"]
        features = list(features)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no GeoJSON with features ({type(error).__name__}: {error}); fetch it again."
        ) from None
    rings, kinds = [], []
    for number, feature in enumerate(features, start=1):
        try:
            kind = NAMES.index(feature["properties"]["classification"]["name"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}, feature {number}, has no class of PUMA in "
                f"properties.classification.name; the classes are {', '.join(NAMES)}."
            ) from None
        try:
            found = list(_rings(feature["geometry"], every_ring=every_ring))
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(
                f"{path}, feature {number}, is no Polygon or MultiPolygon with finite "
                f"coordinates; fetch the file again."
            ) from None
        rings += found
        kinds += [kind] * len(found)
    if every_ring:
        rings = [np.trunc(ring) for ring in rings]
    return centres(rings), np.array(kinds, np.int64)


def _rings(geometry: Any, *, every_ring: bool) -> Iterator[np.ndarray]:
    """Outlines, float64 [m, 2]; an error of some kind where there is none."""
    kind, coordinates = geometry["type"], geometry["coordinates"]
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(kind)
    for part in [coordinates] if kind == "Polygon" else coordinates:
        for ring in part if every_ring else part[:1]:
            points = np.array(ring, np.float64)[:, :2]
            if not len(points) or not np.isfinite(points).all():
                raise ValueError("no points")
            yield points


def centres(rings: list[np.ndarray]) -> np.ndarray:
    """Centres of mass of polygons, float64 [n, 2]; of one without area, the mean of its corners.

    Args:
        rings: float [m, 2] each, m >= 1, closed or not.
    """
    if not rings:
        return np.empty((0, 2))
    counts = np.array([len(ring) for ring in rings])
    first = np.cumsum(counts) - counts
    points = np.concatenate(rings)
    # Relative to the first corner: products of large coordinates would lose digits.
    origin = points[first]
    points = points - np.repeat(origin, counts, 0)
    follow = np.arange(1, len(points) + 1)
    follow[first + counts - 1] = first
    after = points[follow]
    cross = points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]
    area = np.add.reduceat(cross, first)
    moment = np.add.reduceat((points + after) * cross[:, None], first)
    mean = np.add.reduceat(points, first) / counts[:, None]
    # Twice the area in px²; less is a line that rounding has given a width.
    flat = np.abs(area) < 1e-6
    weight = np.where(flat, 1, 3 * area)[:, None]
    return origin + np.where(flat[:, None], mean, moment / weight)
