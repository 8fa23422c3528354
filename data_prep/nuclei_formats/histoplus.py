"""HistoPLUS: cell_masks.json, cells in the pixels of DeepZoom tiles.

As written by owkin/histoplus (helpers/data, helpers/border_effects/project.py)::

    {"model_name", "inference_mpp", "cell_masks": [{"level", "x", "y", "width", "height",
     "masks": [{"cell_id", "cell_type", "confidence", "coordinates", "centroid": [x, y]}]}]}

x and y are column and row of the tile at the DeepZoom level; centroids are local to the tile:
level-0 = (x * tile side + centroid) * 2^(finest level - level), absolute. A DeepZoom pyramid of a
slide has ceil(log2(longer side)) + 1 levels.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.nuclei_formats.record import PIXEL_CENTRE, Nuclei, SlideFacts, nuclei, rings
from data_prep.nuclei_formats.text import misread, read_json


def read(path: Path, *, slide: SlideFacts) -> Nuclei:
    """Nuclei of one file, with their running numbers as ids: cell_id starts anew in each tile.

    Raises:
        UserError: the file is damaged or not HistoPLUS's.
    """
    tree = read_json(path)
    try:
        return _nuclei(tree["cell_masks"], slide)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise misread(path, "HistoPLUS", error) from None


def _nuclei(tiles: list[dict[str, Any]], slide: SlideFacts) -> Nuclei:
    finest = math.ceil(math.log2(max(slide.width, slide.height)))
    sides: dict[int, float] = {}  # tiles at the right and lower border may be stated smaller
    for tile in tiles:
        level = int(tile["level"])
        if not 0 <= level <= finest:
            raise ValueError(f"level {level}, but the slide has DeepZoom levels 0 to {finest}")
        sides[level] = max(sides.get(level, 0), float(tile["width"]), float(tile["height"]))
    cells, corner, scale = [], [], []
    for tile in tiles:
        level = int(tile["level"])
        place = (float(tile["x"]) * sides[level], float(tile["y"]) * sides[level])
        cells += tile["masks"]
        corner += [place] * len(tile["masks"])
        scale += [2.0 ** (finest - level)] * len(tile["masks"])
    factor = np.array(scale, np.float64)
    local = np.array([cell["centroid"] for cell in cells], np.float64).reshape(-1, 2)
    area = np.full(len(cells), np.nan)
    outlined = [i for i, cell in enumerate(cells) if cell.get("coordinates")]
    if outlined:
        area[outlined] = rings([cells[i]["coordinates"] for i in outlined])[1]
    xy = (np.array(corner, np.float64).reshape(-1, 2) + local + PIXEL_CENTRE) * factor[:, None]
    return nuclei(
        xy,
        kind=[str(cell["cell_type"]) for cell in cells],
        score=[cell.get("confidence") for cell in cells],
        area=area * (factor * slide.mpp) ** 2,
    )
