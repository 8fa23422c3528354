"""GeoJSON of QuPath, and of StarDist run in QuPath: one Feature for each nucleus.

As written by qupath/qupath (QuPathTypeAdapters.java): a FeatureCollection or a bare list. A `cell`
has its nucleus in `nucleusGeometry`; `geometry` is then the cell. Version 0.2 puts the kind of the
object into `id` or `properties.object_type`. Coordinates are continuous level-0 px relative to the
bounds corner (QuPath crops to bounds unless told otherwise). Outlines of regions (annotations)
are left out where the file has detections.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.nuclei_formats.record import Nuclei, SlideFacts, nuclei, rings
from data_prep.nuclei_formats.text import misread, read_json

# Where StarDist's and QuPath's own scripts keep the probability of a detection.
SCORES = ("Detection probability", "probability", "Probability")
NUCLEI = ("detection", "cell", "tile", "")


def read(path: Path, *, slide: SlideFacts) -> Nuclei:
    """Nuclei of one file; a nucleus is the area centroid of its outline. Ids are the file's.

    Raises:
        UserError: the file is damaged or not GeoJSON.
    """
    tree = read_json(path)
    try:
        features = tree["features"] if isinstance(tree, dict) else tree
        features = [tree] if isinstance(tree, dict) and tree["type"] == "Feature" else features
        kinds = [_object(feature) for feature in features]
        if any(kind in NUCLEI for kind in kinds):
            pairs = zip(features, kinds, strict=True)
            features = [feature for feature, kind in pairs if kind in NUCLEI]
        return _nuclei(features, slide)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise misread(path, "QuPath", error) from None


def _object(feature: dict[str, Any]) -> str:
    """'detection', 'cell', 'annotation', ... or '' where the file does not say."""
    properties = feature.get("properties") or {}
    old = str(feature.get("id", ""))
    old = old if old.startswith("Path") else ""
    word = str(properties.get("objectType") or properties.get("object_type") or old)
    return word.removeprefix("Path").removesuffix("Object").lower()


def _nuclei(features: list[dict[str, Any]], slide: SlideFacts) -> Nuclei:
    points: list[Any] = []
    outlines: list[Any] = []
    place: list[tuple[bool, int]] = []  # is it an outline, and which
    kinds, scores, ids = [], [], []
    for number, feature in enumerate(features):
        properties = feature.get("properties") or {}
        name = str((properties.get("classification") or {}).get("name", ""))
        score = _score(properties)
        geometry = feature.get("nucleusGeometry") or feature["geometry"]
        whole = _object(feature) != "annotation"
        label = str(feature.get("id") or "")
        for part, (outlined, value) in enumerate(_parts(geometry, whole)):
            target = outlines if outlined else points
            place.append((outlined, len(target)))
            target.append(value)
            kinds.append(name)
            scores.append(score)
            label_here = label if label and not label.startswith("Path") else str(number)
            ids.append(f"{label_here}:{part}" if part else label_here)
    middle, area = rings(outlines)
    dots = np.array(points, np.float64).reshape(-1, 2)
    xy = np.array([middle[i] if o else dots[i] for o, i in place], np.float64).reshape(-1, 2)
    size = np.array([area[i] if o else np.nan for o, i in place], np.float64) * slide.mpp**2
    return nuclei(xy + np.asarray(slide.bounds), kind=kinds, score=scores, area=size, ids=ids)


def _score(properties: dict[str, Any]) -> float | None:
    measured = properties.get("measurements") or {}
    if isinstance(measured, list):  # version 0.2: [{"name", "value"}]
        measured = {m["name"]: m["value"] for m in measured}
    return next((float(measured[name]) for name in SCORES if name in measured), None)


def _parts(geometry: dict[str, Any], whole: bool) -> Iterator[tuple[bool, Any]]:
    """The nuclei of a geometry: (True, ring) or (False, point).

    A MultiPolygon of a detection is one nucleus in pieces, of which the largest counts; that of an
    annotation is many.
    """
    kind, where = geometry["type"], geometry["coordinates"]
    if kind == "Point":
        yield False, where[:2]
    elif kind == "MultiPoint":
        yield from ((False, point[:2]) for point in where)
    elif kind == "Polygon":
        yield True, where[0]
    elif kind == "MultiPolygon":
        outer = [polygon[0] for polygon in where]
        if whole:
            outer = [outer[int(np.argmax(rings(outer)[1]))]]
        yield from ((True, ring) for ring in outer)
    else:
        raise ValueError(f"geometry {kind} instead of points or polygons")
