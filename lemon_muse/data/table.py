"""A table of nuclei in images, and the crops around them: what layouts read and benchmarks load."""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from lemon_muse.data import geometry
from lemon_muse.data.ahead import map_ahead
from lemon_muse.errors import UserError

SPLITS = ("train", "val", "test")
COLUMNS = ("image", "x", "y", "mpp", "label", "patient", "slide", "split")
# Bytes of an image that enter the table's hash: enough to notice an exchanged file, and cheap.
HASHED_BYTES = 65536
# Read as a whole whatever their size; all else is looked at first.
PLAIN = (".png", ".jpg", ".jpeg", ".bmp")
LARGE = 2**24
# Bytes of crops of a large image that are cut at once.
HELD = 2**27


@dataclass(frozen=True)
class Table:
    """Labelled nuclei as columns of equal length n; row i is one nucleus.

    Attributes:
        image: str [n], path of the image that the nucleus lies in.
        x, y: float64 [n], centre in pixels of that image, pixel centres at +0.5.
        mpp: float64 [n], µm per pixel of that image.
        label: int64 [n], index into `classes`; -1 where the kind is not known.
        patient, slide: str [n].
        split: str [n], 'train', 'val' or 'test'; 'all' where the data set is divided by folds.
        classes: names of the classes.
        groups: further columns, str [n], that nuclei can be divided by: hospital, scanner, domain.
        targets: float32 [n, G] of a regression; None for a classification, whose labels stand in
            `label`.
        target_names: names of the G targets.
    """

    image: np.ndarray
    x: np.ndarray
    y: np.ndarray
    mpp: np.ndarray
    label: np.ndarray
    patient: np.ndarray
    slide: np.ndarray
    split: np.ndarray
    classes: tuple[str, ...] = field(default=())
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    targets: np.ndarray | None = None
    target_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in COLUMNS}
        lengths |= {name: len(column) for name, column in self.groups.items()}
        lengths |= {} if self.targets is None else {"targets": len(self.targets)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a table must be equally long, not {lengths}")

    def __len__(self) -> int:
        return len(self.label)

    def rows(self, split: str) -> np.ndarray:
        """int64 indices of the rows of one split."""
        return np.flatnonzero(self.split == split)

    def take(self, rows: np.ndarray) -> "Table":
        """The table of these rows, int [m], with the same classes."""
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in COLUMNS},
            groups={name: column[rows] for name, column in self.groups.items()},
            targets=None if self.targets is None else self.targets[rows],
        )

    def patients_across(self) -> list[str]:
        """Patients that occur in more than one split, sorted: their nuclei leak between splits."""
        found: dict[str, set[str]] = {}
        for patient, split in set(zip(self.patient.tolist(), self.split.tolist(), strict=True)):
            found.setdefault(patient, set()).add(split)
        return sorted(patient for patient, splits in found.items() if len(splits) > 1)

    def split_leaks(self) -> list[str]:
        """One sentence where patients are in more than one split, else none."""
        shared = self.patients_across()
        if not shared:
            return []
        return [f"{len(shared)} patients are in more than one split: {', '.join(shared)}."]

    @cached_property
    def image_code(self) -> np.ndarray:
        """int64 [n], the same number for nuclei of the same image."""
        return np.unique(self.image, return_inverse=True)[1]

    @cached_property
    def content_hash(self) -> str:
        """sha256 over all rows and over size and first bytes of every image.

        Folders do not enter: a data set that was moved keeps its hash.
        """
        digest = hashlib.sha256()
        for path in dict.fromkeys(self.image.tolist()):
            file = Path(path)
            digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(HASHED_BYTES))
        names = [Path(path).name for path in self.image.tolist()]
        for column in (names, self.patient.tolist(), self.slide.tolist(), self.split.tolist()):
            digest.update("\n".join(column).encode() + b"\0")
        for numbers in (self.x, self.y, self.mpp):
            digest.update(np.ascontiguousarray(numbers, np.float64).tobytes())
        digest.update(np.ascontiguousarray(self.label, np.int64).tobytes())
        digest.update("\n".join(self.classes).encode())
        for name, column in sorted(self.groups.items()):
            digest.update("\n".join([name, *column.tolist()]).encode())
        if self.targets is not None:
            digest.update("\n".join(self.target_names).encode())
            digest.update(np.ascontiguousarray(self.targets, np.float32).tobytes())
        return digest.hexdigest()

    def crops(
        self, size: int, mpp: float, rows: np.ndarray | None = None, edge: str = "reflect"
    ) -> np.ndarray:
        """Windows around nuclei, uint8 [n, size, size, 3], in the order of `rows`.

        Args:
            size: side of the window, px at `mpp`.
            mpp: µm per pixel of the window; images are resampled to it once.
            rows: which rows, int [n]; all when None.
            edge: as in `geometry.crop`; with 'drop', nuclei whose window leaves the image are
                left out and the result is shorter than `rows`.
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        out = np.empty((len(rows), size, size, 3), np.uint8)
        kept = np.zeros(len(rows), bool)
        for positions, pixels in self.stream(size, mpp, rows=rows, edge=edge):
            out[positions] = pixels
            kept[positions] = True
        return out if kept.all() else out[kept]

    def stream(
        self,
        size: int,
        mpp: float,
        *,
        rows: np.ndarray | None = None,
        edge: str = "reflect",
        workers: int = 0,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions int64 [m] in `rows`, pixels uint8 [m, size, size, 3]), image by image.

        Each image is read once; with `workers` > 0 the next ones are read ahead in threads.
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        if not len(rows):
            return
        names, group = np.unique(self.image[rows], return_inverse=True)
        order = np.argsort(group, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(group, minlength=len(names)))[:-1])

        def read(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return self._image_crops(rows, part, size=size, mpp=mpp, edge=edge)

        small = [part for part in parts if not is_large(Path(self.image[rows[part[0]]]))]
        yield from map_ahead(read, small, workers=workers)
        for part in parts:
            if is_large(Path(self.image[rows[part[0]]])):
                yield from self._slide_crops(rows, part, size=size, mpp=mpp, edge=edge)

    def _slide_crops(
        self, rows: np.ndarray, part: np.ndarray, *, size: int, mpp: float, edge: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `_image_crops`, of an image that is not held in memory as a whole."""
        from lemon_muse.data.slides import open_slide

        first = rows[part[0]]
        # From top to bottom, so that a run of nuclei needs few tiles twice.
        part = part[np.argsort(self.y[rows[part]], kind="stable")]
        centres = np.stack([self.x[rows[part]], self.y[rows[part]]], 1)
        step = max(1, HELD // (3 * size * size))
        with open_slide(Path(self.image[first]), mpp=float(self.mpp[first])) as slide:
            for start in range(0, len(part), step):
                piece = part[start : start + step]
                for found, pixels in slide.bands(
                    centres[start : start + step], size, mpp=mpp, edge=edge
                ):
                    yield piece[found], pixels

    def _image_crops(
        self, rows: np.ndarray, part: np.ndarray, *, size: int, mpp: float, edge: str
    ) -> tuple[np.ndarray, np.ndarray]:
        first = rows[part[0]]
        image = read_image(Path(self.image[first]))
        image, scale = geometry.resample(image, source_mpp=float(self.mpp[first]), mpp=mpp)
        centres = np.stack([self.x[rows[part]], self.y[rows[part]]], 1) * scale
        pixels, kept = geometry.crop(image, centres, size=size, edge=edge)
        return part[kept], pixels


@cache
def is_large(path: Path) -> bool:
    """Whether an image is read part by part: a slide, or one of more than 16 million pixels."""
    if path.suffix.lower() in PLAIN:
        return False
    width, height = image_size(path)
    return width * height > LARGE


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3]; alpha is dropped.

    Raises:
        UserError: the file is missing or does not decode.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"the image {path} is missing; fetch the data set again.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"the image {path} does not decode ({error}); fetch it again or leave it out."
        ) from None


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in px from the header alone; errors as in `read_image`."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if path.is_file() and path.suffix.lower() not in PLAIN:
            from lemon_muse.data.slides import read_facts

            width, height = read_facts(path).sizes[0]
            return width, height
        raise UserError(
            f"the image {path} does not decode ({error}); fetch it again or leave it out."
        ) from None
