"""The lists of MIDOG++ and its relatives: nuclei, slides; and which folder is the right one.

Formats: github.com/DeepMicroscopy/MIDOGpp (json, datasets_xvalidation.csv) and
github.com/DeepMicroscopy/FoundationModelComparison (csv).
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

LISTS = (
    "MIDOG++.json",
    "MIDOGpp.json",  # its name on figshare
    "MIDOG2022_training_png.json",
    "MIDOG2022_training.json",
    "MIDOGpp.csv",
    "MIDOG2022_training_tiff.csv",
    "MIDOG2022_training_png.csv",
)
SLIDES = "datasets_xvalidation.csv"
PLACES = ("", "databases", "images")
IMPOSTERS = ("not mitotic figure", "non-mitotic figure", "hard negative")
# Spellings in the published files, without spaces and case.
SPELLINGS = {
    "hamammatsuxr": "Hamamatsu XR",
    "hamamatsuxr": "Hamamatsu XR",
    "hamammatsus360": "Hamamatsu S360",
    "hamamatsus360": "Hamamatsu S360",
    "aperiocs2": "Aperio CS2",
    "3dhistech": "3DHistech",
}


@dataclass(frozen=True)
class NucleusList:
    """A list of nuclei as published.

    Attributes:
        path: the file.
        image: str [n], file name of the image as it is listed.
        x, y: float64 [n], centre of the box, px of that image; the box covers [x1, x2).
        label: int64 [n], 1 mitotic figure, 0 imposter.
        domain: tumour type of each listed image, '' where the list has none.
        sizes: width and height of each listed image, px, where the list has them.
    """

    path: Path
    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    label: np.ndarray
    domain: dict[str, str]
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A table, and what was noticed while it was read.

    `notes` are sentences for log and check (something is missing or odd), `facts` for check alone.
    """

    table: Table
    notes: list[str]
    facts: list[str]


def right_place(root: Path, fits: Callable[[Path], Any], *, shape: str) -> None:
    """Refuse a folder in which `fits` finds nothing, and name the one around where it does."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give root= the folder that holds {shape}.")
    if fits(root):
        return
    below = sorted(p for p in root.iterdir() if p.is_dir())
    deeper = (p for b in below for p in sorted(b.iterdir()) if p.is_dir())
    for place in [root.parent, *below, *deeper]:
        if fits(place):
            raise UserError(f"{root} is the wrong folder level; give root={place} instead.")
    raise UserError(f"{root} does not hold {shape}; give root= the folder that does.")


def find_list(root: Path) -> Path | None:
    """The list of nuclei, in root, databases/ or images/; the first of LISTS that is there."""
    paths = (root / place / name for name in LISTS for place in PLACES)
    return next((path for path in paths if path.is_file()), None)


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a csv with ',' or ';', as text without spaces around it.

    Raises:
        UserError: no text, a column of `columns` is missing, a line is cut short.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no csv in UTF-8; fetch it again.") from None
    delimiter = ";" if lines and ";" in lines[0] else ","
    reader = csv.DictReader(lines, delimiter=delimiter)
    found = [name or "" for name in reader.fieldnames or ()]
    lacking = [name for name in columns if name not in found]
    if lacking:
        raise UserError(f"{path} has no column {', '.join(lacking)}; it has: {', '.join(found)}.")
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise UserError(
                f"{path}, line {reader.line_num}, has not the {len(found)} columns of its header; "
                f"the file is cut short or edited: fetch it again."
            )
        rows.append({name: text.strip() for name, text in row.items()})
    return rows


def read_list(path: Path) -> NucleusList:
    """Read a list of nuclei, json or csv.

    Raises:
        UserError: damaged, a key is missing, a box is not x1,y1,x2,y2, an unknown class, no nuclei.
    """
    listed = _read_json(path) if path.suffix == ".json" else _read_database(path)
    if not len(listed.label):
        raise UserError(f"{path} lists no nucleus; fetch it again.")
    if not (np.isfinite(listed.x) & np.isfinite(listed.y)).all():
        raise UserError(f"{path} has coordinates that are no finite numbers; fetch it again.")
    return listed


def _read_json(path: Path) -> NucleusList:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        images = {entry["id"]: entry for entry in found["images"]}
        kinds = {entry["id"]: entry["name"] for entry in found["categories"]}
        notes = found["annotations"]
        boxes = np.array([note["bbox"] for note in notes], np.float64).reshape(-1, 4)
        names = [images[note["image_id"]]["file_name"] for note in notes]
        kind = [kinds[note["category_id"]] for note in notes]
        sizes = {e["file_name"]: (e["width"], e["height"]) for e in images.values() if "width" in e}
        domain = {e["file_name"]: tumour(e.get("tumor_type", "")) for e in images.values()}
    except KeyError as error:
        raise UserError(
            f"{path} is not the published list: it lacks {error}, as a key or as the id of an "
            f"image or category; fetch it again."
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again.") from None
    unknown = sorted({name for name in kind if name not in ("mitotic figure", *IMPOSTERS)})
    if unknown:
        raise UserError(
            f"{path} has nuclei of the category '{unknown[0]}'; known are 'mitotic figure' and "
            f"{', '.join(map(repr, IMPOSTERS))}."
        )
    wrong = np.flatnonzero((boxes[:, 2:] <= boxes[:, :2]).any(1))
    if len(wrong):
        raise UserError(
            f"{path} has {len(wrong)} boxes that are not x1,y1,x2,y2, the first is "
            f"{boxes[wrong[0]].tolist()}; use the published file, unconverted."
        )
    label = np.array([name == "mitotic figure" for name in kind], np.int64)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    image = np.array(names, str)
    return NucleusList(path, image, centre[:, 0], centre[:, 1], label, domain, sizes)


def _read_database(path: Path) -> NucleusList:
    rows = read_csv(path, ("x", "y", "label", "filename"))
    domain = {row["filename"]: tumour(row.get("tumortype", "")) for row in rows}
    try:
        x, y = (np.array([float(row[name]) for row in rows]) for name in ("x", "y"))
        label = np.array([int(float(row["label"])) for row in rows], np.int64)
    except ValueError as error:
        raise UserError(f"{path} has something else than numbers ({error}).") from None
    found = set(label.tolist())
    # 2 stands for an imposter in MIDOGpp.csv, 0 in the lists of MIDOG 2022.
    if not (found <= {1, 2} or found <= {0, 1}):
        raise UserError(f"{path} has labels {sorted(found)}; they must be 1 and 2, or 1 and 0.")
    image = np.array([row["filename"] for row in rows], str)
    return NucleusList(path, image, x, y, (label == 1).astype(np.int64), domain)


def read_slides(root: Path) -> dict[int, dict[str, str]] | None:
    """Rows of datasets_xvalidation.csv by slide number, scanners and tumours in one spelling."""
    paths = (root / place / SLIDES for place in PLACES)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    rows = read_csv(path, ("Slide", "Dataset", "Tumor", "Scanner"))
    try:
        slides = {int(row["Slide"]): row for row in rows}
    except ValueError as error:
        raise UserError(f"{path} has a slide that is no number ({error}).") from None
    for row in slides.values():
        row["Tumor"], row["Scanner"] = tumour(row["Tumor"]), scanner(row["Scanner"])
        if row["Dataset"] not in ("train", "test"):
            raise UserError(
                f"{path}: slide {row['Slide']} is in '{row['Dataset']}', not in train or test."
            )
    return slides


def tumour(name: str) -> str:
    """A tumour type as MIDOG++.json spells it; MIDOG 2022 says lymphoma."""
    return "canine lymphosarcoma" if name.strip() == "canine lymphoma" else name.strip()


def species(domain: str) -> str:
    """'human' or 'canine', from the tumour type: copies of the tables call some dogs human."""
    return domain.split(" ")[0]


def scanner(name: str) -> str:
    """A scanner's name in one spelling; an unknown one as it is."""
    return SPELLINGS.get(name.replace(" ", "").lower(), name.strip())


def number_of(name: str) -> int | None:
    """The number of a slide: 7 for 007.tiff; None for another name."""
    stem = Path(name).stem
    return int(stem) if stem.isdecimal() else None
