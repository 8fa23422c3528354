"""HoVer-Net: <slide>.json, {"mag": 40, "nuc": {"<id>": {"centroid": [x, y], "contour", ...}}}.

As written by vqdang/hover_net (infer/base.py, infer/wsi.py). Coordinates are pixel indices at the
magnification `mag`, not level 0, and absolute; `bbox` is (row, column), all else (x, y). Tile mode
writes mag null and pixels of the tile. Ids have gaps and are kept.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.nuclei_formats.record import PIXEL_CENTRE, Nuclei, SlideFacts, nuclei, rings
from data_prep.nuclei_formats.text import misread, read_json
from lemon_muse.errors import UserError

POWERS = (5.0, 10.0, 20.0, 40.0, 80.0)
MM_PER_POWER = 10.0  # an objective of power p gives about 10 / p µm a pixel


def read(path: Path, *, slide: SlideFacts) -> Nuclei:
    """Nuclei of one file, brought to level 0 by magnification of level 0 / mag.

    Raises:
        UserError: the file is damaged or not HoVer-Net's, or the slide's magnification is unknown.
    """
    tree = read_json(path)
    try:
        found: dict[str, dict[str, Any]] = tree["nuc"]
        scale = 1.0 if tree["mag"] is None else _magnification(slide) / float(tree["mag"])
        xy = np.array([nucleus["centroid"] for nucleus in found.values()], np.float64)
        outlines = [nucleus["contour"] for nucleus in found.values()]
        _, area = rings(outlines)
        kinds = [_text(nucleus.get("type")) for nucleus in found.values()]
        score = [nucleus.get("type_prob") for nucleus in found.values()]
        ids = _ids(list(found))
        return nuclei(
            (xy.reshape(-1, 2) + PIXEL_CENTRE) * scale,
            kind=kinds,
            score=score,
            area=area * (scale * slide.mpp) ** 2,
            ids=ids,
        )
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from None
        raise misread(path, "HoVer-Net", error) from None


def _text(kind: Any) -> str:
    return "" if kind is None else str(kind)


def _ids(names: list[str]) -> np.ndarray:
    whole = all(name.isdecimal() for name in names)
    return np.array(names, str).astype(np.int64) if whole and names else np.array(names, str)


def _magnification(slide: SlideFacts) -> float:
    """Objective power of level 0: stated, or the standard one that the mpp belongs to."""
    if slide.magnification:
        return slide.magnification
    power = min(POWERS, key=lambda p: abs(np.log(p * slide.mpp / MM_PER_POWER)))
    if not 0.8 < power * slide.mpp / MM_PER_POWER < 1.25:
        raise UserError(
            f"its coordinates are at a magnification, and none belongs to {slide.mpp:g} µm/px; "
            f"give the slide's objective power in a column 'magnification' of the manifest."
        )
    return power
