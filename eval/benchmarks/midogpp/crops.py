"""Figures that are published as small images with one figure in the middle of each."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.benchmarks import Request
from eval.benchmarks.midogpp.files import Found
from eval.benchmarks.midogpp.images import Image, choose_mpp, describe_mpp
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

CLASSES = ("normal", "atypical")


@dataclass
class Rows:
    """Figures as they are listed, lists of equal length; `groups` are further columns."""

    name: list[str] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    slide: list[str] = field(default_factory=list)
    patient: list[str] = field(default_factory=list)
    scanner: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)

    def take(self, keep: Sequence[int]) -> "Rows":
        """The rows of these numbers."""
        return Rows(
            [self.name[i] for i in keep],
            [self.label[i] for i in keep],
            [self.slide[i] for i in keep],
            [self.patient[i] for i in keep],
            [self.scanner[i] for i in keep],
            {name: [values[i] for i in keep] for name, values in self.groups.items()},
        )


def folder_of(folders: Sequence[Path], names: Sequence[str]) -> dict[str, Path]:
    """Files by name of the first folder that holds any of `names`; {} where none does."""
    for folder in folders:
        there = {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}
        if any(name in there for name in names):
            return there
    return {}


def once(
    keys: Sequence[str], labels: Sequence[int], names: Sequence[str], *, what: str
) -> tuple[list[int], list[str]]:
    """Rows that occur once: of equal keys the first is kept, of contradicting ones none.

    Args:
        keys: what must not occur twice.
        names: for the sentences.

    Returns:
        The kept rows in order, and what was left out, as sentences.
    """
    kinds: dict[str, set[int]] = {}
    for key, label in zip(keys, labels, strict=True):
        kinds.setdefault(key, set()).add(label)
    keep, surplus, torn = [], [], []
    seen: set[str] = set()
    for row, key in enumerate(keys):
        if len(kinds[key]) > 1:
            torn.append(row)
        elif key in seen:
            surplus.append(row)
        else:
            keep.append(row)
        seen.add(key)
    notes = []
    if surplus:
        notes.append(
            f"{len(surplus)} {what} repeat another one of the same class and are left out, the "
            f"first is {names[surplus[0]]}."
        )
    if torn:
        notes.append(
            f"{len(torn)} {what} occur under both classes, so that all of them are left out, the "
            f"first is {names[torn[0]]}."
        )
    return keep, notes


def read_crops(
    rows: Rows, crops: Mapping[str, Path], request: Request, facts: list[str], *, where: str
) -> Found:
    """The table of listed crops, none twice, neither by name nor by content.

    Args:
        crops: file of every name.
        facts: sentences so far.
        where: the place where crops are expected.

    Raises:
        UserError: no crop is there, one is damaged, the mpp is not known.
    """
    keep, notes = once(rows.name, rows.label, rows.name, what="rows of the list")
    rows = rows.take(keep)
    there = [i for i, name in enumerate(rows.name) if name in crops]
    if not there:
        raise UserError(f"none of the {len(rows.name)} listed crops is in {where}: put them there.")
    if len(there) < len(rows.name):
        lacking = next(name for name in rows.name if name not in crops)
        notes.append(
            f"{len(rows.name) - len(there)} of {len(rows.name)} listed crops are missing, the "
            f"first is {lacking}; they are left out."
        )
    listed = set(rows.name)
    spare = [n for n, path in crops.items() if n not in listed and path.suffix == ".png"]
    if spare:
        notes.append(f"{len(spare)} crops are not listed, the first is {spare[0]}.")
    rows = rows.take(there)
    looks = [_look(crops[name]) for name in rows.name]
    digests = [digest for digest, _, _ in looks]
    keep, said = once(digests, rows.label, rows.name, what="crops (by content)")
    rows, looks = rows.take(keep), [looks[i] for i in keep]
    images = _images(rows, crops, looks, request)
    x = np.array([image.width / 2 for image in images])
    y = np.array([image.height / 2 for image in images])
    facts = [*facts, *describe_mpp(images, request.image_mpp)]
    return Found(table_of(rows, images, x, y), [*notes, *said], facts)


def _images(
    rows: Rows,
    crops: Mapping[str, Path],
    looks: Sequence[tuple[str, int, int]],
    request: Request,
) -> list[Image]:
    images, unknown = [], []
    for name, scanner, (_, width, height) in zip(rows.name, rows.scanner, looks, strict=True):
        mpp, source = choose_mpp(None, None, scanner, request.image_mpp)
        if mpp is None:
            unknown.append(crops[name])
        else:
            images.append(Image(crops[name], width, height, mpp, source))
    if unknown:
        raise UserError(
            f"nothing says the resolution of {len(unknown)} of {len(rows.name)} crops, the first "
            f"is {unknown[0]}; pass image_mpp=, the µm per pixel of the crops."
        )
    return images


def _look(path: Path) -> tuple[str, int, int]:
    """Digest of a small image file, its width and height; no pixel is decoded."""
    from PIL import Image as Picture

    data = path.read_bytes()
    try:
        with Picture.open(io.BytesIO(data)) as image:
            width, height = image.size
        if image.format == "PNG" and b"IEND" not in data[-12:]:
            raise ValueError("it is cut short")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"the image {path} does not decode ({error}); fetch it again or leave it out."
        ) from None
    return hashlib.sha256(data).hexdigest(), width, height


def table_of(rows: Rows, images: Sequence[Image], x: np.ndarray, y: np.ndarray) -> Table:
    """The table of figures that lie at x, y of their images."""
    return Table(
        image=np.array([str(image.path) for image in images], str),
        x=x,
        y=y,
        mpp=np.array([image.mpp for image in images]),
        label=np.array(rows.label, np.int64),
        patient=np.array(rows.patient, str),
        slide=np.array(rows.slide, str),
        split=np.full(len(images), "all"),
        classes=CLASSES,
        groups={name: np.array(values, str) for name, values in rows.groups.items()},
    )
