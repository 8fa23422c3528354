"""The files of OCELOT (v1.0.1), as unpacked.

Layout as published at zenodo.org/records/8417503::

    metadata.json                              {"sample_pairs": {"001": {...}, ...}}
    images/{train,val,test}/cell/NNN.jpg       RGB, 1024 x 1024 px
    annotations/{train,val,test}/cell/NNN.csv  one cell a line: "x,y,label", no header, may be empty

The Grand-Challenge form is read as well: metadata.json is a list, whose items are numbered from
000, and images are images/cell_patches/NNN.tif. `tissue` folders are not read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks import right_level
from lemon_muse.data.table import SPLITS, image_size
from lemon_muse.errors import UserError

SIDE = 1024
SHAPE = "metadata.json, images/ and annotations/"
# So well do x and y, and the rectangle in the slide, agree in the published file.
AGREES = 0.005


@dataclass(frozen=True)
class Pair:
    """One cell patch, as metadata.json describes it.

    `image` and `labels` are None where the file is not there; `box` is x, y, width, height in
    level-0 px of the slide, `slide_mpp` µm per level-0 px; None where not stated.
    """

    name: str
    slide: str
    organ: str
    split: str
    mpp: float | None
    slide_mpp: float | None
    box: tuple[float, float, float, float] | None
    image: Path | None
    labels: Path | None


def read_pairs(root: Path) -> list[Pair]:
    """All pairs of metadata.json, in its order.

    Raises:
        UserError: the wrong folder, or metadata.json is missing, damaged or lacks a field.
    """
    import json

    right_level(root, ("metadata.json", "images", "annotations"), shape=SHAPE)
    path = root / "metadata.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); fetch it again.") from None
    if isinstance(found, dict):
        found = found.get("sample_pairs")
    if isinstance(found, list):
        found = {f"{number:03d}": item for number, item in enumerate(found)}
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} holds no sample_pairs; fetch the metadata.json of OCELOT again.")
    return [_pair(root, str(name), item) for name, item in found.items()]


def _pair(root: Path, name: str, item: Any) -> Pair:
    try:
        slide, organ, split = (str(item[key]) for key in ("slide_name", "organ", "subset"))
        cell = dict(item["cell"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{root / 'metadata.json'}: the pair {name} lacks slide_name, organ, subset or cell; "
            f"fetch the file again."
        ) from None
    if split not in SPLITS:
        raise UserError(
            f"{root / 'metadata.json'}: the pair {name} has subset '{split}'; it is one of "
            f"{', '.join(SPLITS)}."
        )
    mpp = [_positive(cell.get(key)) for key in ("resized_mpp_x", "resized_mpp_y")]
    if mpp[0] and mpp[1] and abs(mpp[0] / mpp[1] - 1) > AGREES:
        raise UserError(
            f"{root / 'metadata.json'}: the pair {name} has pixels of {mpp[0]:.5g} x {mpp[1]:.5g} "
            f"µm, which are not square; fetch the file again."
        )
    return Pair(
        name=name,
        slide=slide.removesuffix(".svs"),
        organ=organ,
        split=split,
        mpp=mpp[0] if mpp[1] else None,
        slide_mpp=_positive(item.get("mpp_x")),
        box=_box(cell),
        image=_first(
            root / "images",
            (
                f"{split}/cell/{name}.jpg",
                f"{split}/cell_patches/{name}.tif",
                f"cell/{name}.jpg",
                f"cell_patches/{name}.tif",
            ),
        ),
        labels=_first(root / "annotations", (f"{split}/cell/{name}.csv", f"cell/{name}.csv")),
    )


def _box(cell: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """x, y, width, height of the patch in the slide; None where it is not stated."""
    try:
        x, y, right, bottom = (float(cell[k]) for k in ("x_start", "y_start", "x_end", "y_end"))
    except (KeyError, TypeError, ValueError):
        return None
    return (x, y, right - x, bottom - y) if right > x and bottom > y else None


def _positive(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < float("inf") else None


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_labels(pair: Pair) -> np.ndarray:
    """int64 [n, 3]: x, y, label 1 or 2; nothing is said yet of points outside the image."""
    assert pair.image and pair.labels
    if image_size(pair.image) != (SIDE, SIDE):
        raise UserError(
            f"{pair.image} has {' x '.join(map(str, image_size(pair.image)))} px; a cell patch has "
            f"{SIDE} x {SIDE}, which its mpp is stated for (stacked patches must be cut apart)."
        )
    rows = []
    for number, line in enumerate(
        pair.labels.read_text(encoding="utf-8-sig").splitlines(), start=1
    ):
        words = [word.strip() for word in line.split(",")]
        if words == [""]:
            continue
        if len(words) != 3 or not all(word.lstrip("+-").isdecimal() for word in words):
            raise UserError(f"{pair.labels}, line {number}, is '{line}'; it must be 'x,y,label'.")
        if words[2] not in ("1", "2"):
            raise UserError(
                f"{pair.labels}, line {number}, has label {words[2]}; labels are 1 and 2."
            )
        rows.append([int(word) for word in words])
    return np.array(rows, np.int64).reshape(-1, 3)
