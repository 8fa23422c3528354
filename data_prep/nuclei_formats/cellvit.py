"""CellViT, CellViT-Inference and CellViT++: JSON of cells, GeoJSON of classes, raw snappy of both.

Layout as written by TIO-IKIM/CellViT (cell_segmentation/inference/cell_detection.py) and
TIO-IKIM/CellViT-Inference (cellvit/inference)::

    cells.json             {"wsi_metadata", "type_map", "cells": [{"centroid": [x, y],
                           "contour": [[x, y], ...], "bbox": [[row, column], ...], "type", ...}]}
    cell_detection.json    the same with bbox, centroid and type only
    *.geojson              a bare list with ONE Feature for each class: MultiPoint or MultiPolygon

Coordinates are level-0 pixel indices relative to the bounds corner, because the tiling runs with
limited bounds. The first CellViT ("processed_patches" in the file) added offsets and cells of two
scales where the slide was downsampled: such a file cannot be mended and is refused.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.nuclei_formats.record import PIXEL_CENTRE, Nuclei, SlideFacts, nuclei, rings
from data_prep.nuclei_formats.text import misread, read_json
from lemon_muse.errors import UserError


def read(path: Path, *, slide: SlideFacts) -> Nuclei:
    """Nuclei of one file; ids are their running numbers in it.

    Raises:
        UserError: the file is damaged, not CellViT's, or of the first CellViT at another scale.
    """
    tree = read_json(path)
    shift = np.asarray(slide.bounds) + PIXEL_CENTRE
    try:
        return (
            _classes(tree, shift, slide) if isinstance(tree, list) else _cells(tree, shift, slide)
        )
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from None
        raise misread(path, "CellViT", error) from None


def _cells(tree: dict[str, Any], shift: np.ndarray, slide: SlideFacts) -> Nuclei:
    downsampling = float((tree.get("wsi_metadata") or {}).get("downsampling", 1))
    if "processed_patches" in tree and downsampling != 1:
        raise UserError(
            f"it comes from the first CellViT at downsampling {downsampling:g}, whose coordinates "
            f"mix two scales; run the detection again with CellViT-Inference."
        )
    cells = tree["cells"]
    names = {str(k): str(v) for k, v in (tree.get("type_map") or {}).items()}
    xy = np.array([cell["centroid"] for cell in cells], np.float64).reshape(-1, 2)
    kinds = [names.get(str(cell["type"]), str(cell["type"])) for cell in cells]
    area = np.full(len(cells), np.nan)
    outlined = [i for i, cell in enumerate(cells) if cell.get("contour")]
    if outlined:
        area[outlined] = rings([cells[i]["contour"] for i in outlined])[1] * slide.mpp**2
    score = [cell.get("type_prob") for cell in cells]
    return nuclei(xy + shift, kind=kinds, score=score, area=area)


def _classes(tree: list[dict[str, Any]], shift: np.ndarray, slide: SlideFacts) -> Nuclei:
    points, areas, kinds = [np.zeros((0, 2))], [np.zeros(0)], []
    for feature in tree:
        geometry = feature["geometry"]
        name = str(((feature.get("properties") or {}).get("classification") or {}).get("name", ""))
        if geometry["type"] == "MultiPoint":
            xy = np.array(geometry["coordinates"], np.float64).reshape(-1, 2)
            area = np.full(len(xy), np.nan)
        elif geometry["type"] == "MultiPolygon":
            xy, area = rings([polygon[0] for polygon in geometry["coordinates"]])
            area = area * slide.mpp**2
        else:
            raise ValueError(f"geometry {geometry['type']} instead of MultiPoint or MultiPolygon")
        points.append(xy)
        areas.append(area)
        kinds += [name] * len(xy)
    return nuclei(np.concatenate(points) + shift, kind=kinds, area=np.concatenate(areas))
