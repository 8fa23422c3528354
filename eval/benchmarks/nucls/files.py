"""Files of NuCLS (Amgad, GigaScience 2022), in its release's layout and in CellViT++'s form.

The release of corrected single-rater annotations (sites.google.com/view/nucls, "data format")::

    rgb/<fov>.png                    rgbs/ in early drops; RGB or RGBA, 0.2 µm per pixel
    csv/<fov>.csv                    one nucleus a row: classes, box and outline in px of the png
    csv/ALL_FOV_LOCATIONS.csv        the rectangles that were annotated; not read
    mask/  visualization/            not read
    train_test_splits/               see `nucls_folds`

`<fov>` is `<slide>_id-<id>_left-<x>_top-<y>_bottom-<y>_right-<x>`; left … right are pixels of the
slide at its own resolution, so they say nothing about the pixels of the png. A nucleus lies at the
centre of its box: corners are edges between pixels, so no half pixel is added.

The detection form of CellViT++ (github.com/TIO-IKIM/CellViT-plus-plus, README)::

    label_map.yaml                   number: name of a class
    <train|test>/images/<name>.png   crops of fields; their µm per pixel stands nowhere
    <train|test>/labels/<name>.csv   "x,y,label" without a header, x and y are indices of pixels;
                                     or with a header x,y and the release's columns of classes
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.benchmarks import right_level
from eval.benchmarks.nucls.classes import COLUMNS, KNOWN, LabelMap, cleaned, coarser, label_names
from lemon_muse.data.table import image_size
from lemon_muse.errors import UserError

# Half the side, px of the release, of the square that LEMON's counts say is whole in the image.
LEMON_HALF = 37
CORNERS = ("xmin", "ymin", "xmax", "ymax")
IMAGES = (".png", ".jpg", ".jpeg")
BARCODE = re.compile(r"TCGA-(\w\w)-(\w{4})(?:-\w+-\w+)?-(DX[0-9A-Za-z]+)")
SHAPE = (
    "rgb/ (rgbs/ in early drops) and csv/ as the release unpacks, or the train/ and test/ of "
    "CellViT++'s form, each with images/ and labels/"
)


@dataclass(frozen=True)
class Fov:
    """One image and its nuclei: n points and, of every level that is known, n names.

    `names` are as in the files but for `correction_` and `other`; levels that the files lack follow
    from finer ones. `stated` says which levels the files have. `size` is (width, height) in px;
    `points` float64 [n, 2] (x, y), px, some of them outside the image; `split` 'all', 'train' or
    'test'.
    """

    path: Path
    split: str
    size: tuple[int, int]
    points: np.ndarray
    names: dict[str, list[str]]
    stated: tuple[str, ...]

    def inside(self, half: float = 0) -> np.ndarray:
        """Whether the square of that half side, px, around a nucleus lies in the image; bool [n].

        Of a nucleus itself (0) the right edge is outside: no pixel begins there.
        """
        end, size = self.points + half, np.array(self.size)
        beyond = end > size if half else end >= size
        return np.asarray(((self.points >= half) & ~beyond).all(1))


@dataclass(frozen=True)
class Files:
    """All images that have labels; `form` is 'release' or 'detection'; what lacks its half."""

    form: str
    fovs: list[Fov]
    no_image: list[str]
    no_labels: list[str]


def read(root: Path) -> Files:
    """Read either form; images and csvs without their other half are left out and named.

    Raises:
        UserError: a wrong folder, no image with labels, a malformed csv or label map, an image that
            does not decode.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give root= the folder that holds {SHAPE}.")
    above = [root, root.parent, root.parent.parent]
    near = [place for place in above if (place / "train/labels").is_dir()]
    if not (root / "csv").is_dir() and (near or any(root.glob("*/train/labels"))):
        halves = [f"{split}/{half}" for split in ("train", "test") for half in ("images", "labels")]
        right_level(root, tuple(halves), shape=SHAPE)
        # A csv with the release's columns does without.
        names = label_names(root) if (root / "label_map.yaml").is_file() else None
        files = _pairs([(s, root / s / "images", root / s / "labels") for s in ("train", "test")])
        found = [_detection(*pair, names) for pair in files[0]]
        return Files("detection", found, files[1], files[2])
    right_level(root, ("rgb*", "csv"), shape=SHAPE)
    images = [root / name for name in ("rgb", "rgbs") if (root / name).is_dir()]
    if not images:
        raise UserError(
            f"{root} has no rgb/ and no rgbs/: other folders hold images whose colours were "
            f"changed; put the original pngs into {root / 'rgb'}."
        )
    files = _pairs([("all", images[0], root / "csv")])
    return Files("release", [_release(*pair) for pair in files[0]], files[1], files[2])


def barcode(name: str) -> tuple[str, str, str] | None:
    """(slide, patient, hospital) of a name with a TCGA barcode; None where it has none.

    The slide is `TCGA-A1-A0SP-DX1`, as the release writes it, also of a name with a full barcode;
    the patient its first three fields; the hospital its second, the tissue source site.
    """
    found = BARCODE.search(name)
    if found is None:
        return None
    patient = f"TCGA-{found[1]}-{found[2]}"
    return f"{patient}-{found[3]}", patient, found[1]


def _pairs(
    folders: list[tuple[str, Path, Path]],
) -> tuple[list[tuple[str, Path, Path]], list[str], list[str]]:
    """(split, image, csv) of every pair; names of csvs without image, of images without csv."""
    pairs, no_image, no_labels = [], [], []
    for split, images, labels in folders:
        # Unpacking on a Mac leaves ._ files; the table of fields is written in either case.
        seen = {p.stem: p for p in images.iterdir() if p.suffix.lower() in IMAGES}
        told = {p.stem: p for p in labels.iterdir() if p.suffix.lower() == ".csv"}
        seen = {stem: p for stem, p in seen.items() if not stem.startswith(".")}
        told = {
            stem: p
            for stem, p in told.items()
            if not stem.startswith(".") and stem.lower() != "all_fov_locations"
        }
        pairs += [(split, seen[stem], told[stem]) for stem in sorted(seen.keys() & told.keys())]
        no_image += [told[stem].name for stem in sorted(told.keys() - seen.keys())]
        no_labels += [seen[stem].name for stem in sorted(seen.keys() - told.keys())]
    if not pairs:
        where = " and ".join(f"{images} and {labels}" for _, images, labels in folders)
        raise UserError(
            f"no image has a csv of the same name in {where} ({len(no_labels)} images, "
            f"{len(no_image)} csvs); fetch both of the same release."
        )
    return pairs, no_image, no_labels


def _release(split: str, image: Path, labels: Path) -> Fov:
    if barcode(image.stem) is None:
        raise UserError(
            f"the image name {image.name} has no TCGA slide barcode such as TCGA-A1-A0SP-DX1, so "
            f"its patient is unknown; keep the published names."
        )
    size = image_size(image)
    lines = read_lines(labels)
    if not lines:
        return _empty(image, split, size)
    header, rows = [cell.strip() for cell in lines[0][1]], lines[1:]
    lacking = [name for name in CORNERS if name not in header]
    if lacking:
        raise UserError(
            f"{labels} has no column {', '.join(lacking)}; the release has {', '.join(CORNERS)}, "
            f"this file {', '.join(header)}."
        )
    # Rows that draw the annotated rectangle stand in early drops; they are no nuclei.
    names = _named(labels, header, rows)
    kept = [i for i, name in enumerate(next(iter(names.values()))) if not name.startswith("fov")]
    rows = [rows[i] for i in kept]
    boxes = _numbers(labels, rows, [header.index(name) for name in CORNERS])
    told = {level: [column[i] for i in kept] for level, column in names.items()}
    return Fov(image, split, size, (boxes[:, :2] + boxes[:, 2:]) / 2, coarser(told), tuple(told))


def _empty(image: Path, split: str, size: tuple[int, int]) -> Fov:
    return Fov(image, split, size, np.empty((0, 2)), {level: [] for level in KNOWN}, ())


def _detection(split: str, image: Path, labels: Path, known: LabelMap | None) -> Fov:
    size = image_size(image)
    lines = read_lines(labels)
    header = [cell.strip() for cell in lines[0][1]] if lines else []
    if "x" in header and "y" in header:
        lines = lines[1:]
    else:
        header = []
    if not lines:
        return _empty(image, split, size)
    places = [header.index("x"), header.index("y")] if header else [0, 1]
    # CellViT++ reads whole pixels; a pixel's centre is half a pixel further.
    points = np.floor(_numbers(labels, lines, places)) + 0.5
    if header and "label" not in header:
        told = _named(labels, header, lines)
        return Fov(image, split, size, points, coarser(told), tuple(told))
    level, names = known or label_names(labels.parents[2])
    numbers = _numbers(labels, lines, [header.index("label") if header else 2])[:, 0]
    for (line, _), number in zip(lines, numbers.tolist(), strict=True):
        if number not in names:
            raise UserError(
                f"{labels}, line {line}, has class {number:g}, which label_map.yaml lacks."
            )
    told = {level: [names[int(number)] for number in numbers.tolist()]}
    return Fov(image, split, size, points, coarser(told), tuple(told))


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not blank."""
    try:
        # Strict: an outline that was cut off within its quotes would read as a row.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            return [(reader.line_num, row) for row in reader if any(row)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no whole csv ({error}); fetch it again.") from None


def _named(
    path: Path, header: list[str], rows: list[tuple[int, list[str]]]
) -> dict[str, list[str]]:
    """Names of the levels that the file has, cleaned."""
    places = {level: header.index(name) for level, name in COLUMNS.items() if name in header}
    if not places and "group" in header:
        places = {"raw": header.index("group")}
    if not places:
        raise UserError(
            f"{path} has no class: none of the columns {', '.join(COLUMNS.values())}, group; "
            f"it has {', '.join(header)}."
        )
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {line}, has {len(row)} columns instead of {len(header)}; "
                f"fetch the file again."
            )
    return {level: [cleaned(row[i]) for _, row in rows] for level, i in places.items()}


def _numbers(path: Path, rows: list[tuple[int, list[str]]], places: list[int]) -> np.ndarray:
    """float64 [n, len(places)], finite."""
    out = np.empty((len(rows), len(places)))
    for i, (line, row) in enumerate(rows):
        try:
            out[i] = [float(row[place]) for place in places]
        except (ValueError, IndexError):
            out[i] = np.nan
        if not np.isfinite(out[i]).all():
            raise UserError(f"{path}, line {line}, lacks a number: '{','.join(row)[:80]}'.")
    return out
