"""Fields cut again from the slides they come from, with the tissue around them.

An annotated field is published as a small image, so that windows at its border see it mirrored.
Where the user has the slides, the field is cut again at the slide's own resolution with a margin
and kept as a lossless PNG under the cache folder: made once, read ever after.

The margin begins 112 µm before the field: 224 px at 0.5 and 448 px at 0.25 µm/px. Hence squares of
224 px that `eval.dense` counts from the corner of the PNG are, at both, those that MUSE counts from
the corner of the field (preprocess/02 and 04 of alibaba-damo-academy/MUSE). Behind the field 184 µm
are needed: the last square may lie 223 px beyond the field, and a window of 512 px has 144 px
around its square.
"""

import hashlib
import io
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from eval.benchmarks import Request
from eval.progress import Progress
from lemon_muse.data.ahead import map_ahead
from lemon_muse.data.files import write_atomic
from lemon_muse.data.slides import MppError, Slide, open_slide
from lemon_muse.data.table import Table, image_size
from lemon_muse.errors import UserError

MARGIN_UM = (112.0, 184.0)
SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs")
# A slide whose stated mpp differs by more from the field's is not the one that it was cut from.
MPP_AGREES = 0.01
# Measured on tissue: level 6 takes 2.5 times as long for 5 % fewer bytes.
PNG_LEVEL = 1
LAYOUT = 1  # raised when the same words give other pixels


@dataclass(frozen=True)
class Field:
    """Where a field lies.

    Attributes:
        source: the slide, or an image that holds the field with its surroundings.
        x, y, width, height: the field's rectangle in level-0 px of the source; need not be whole.
        mpp: µm per level-0 px, from the publication.
        is_slide: whether what the source states about its mpp can be held against `mpp`.
    """

    source: Path
    x: float
    y: float
    width: float
    height: float
    mpp: float
    is_slide: bool = True


def field_image(
    folder: Path, name: str, field: Field, *, margin_um: tuple[float, float] = MARGIN_UM
) -> tuple[Path, tuple[float, float]]:
    """Cut a field with its surroundings, unless that was done before.

    Args:
        folder: where the PNG is kept; made where it does not exist.
        name: what its name begins with.
        margin_um: µm to cut left of and above the field, and right of and below it.

    Returns:
        The PNG (pixels of level 0, white beyond the slide), and where the field's corner (x, y)
        lies in it, px: at the margin or, where pixels are not cut, less than one px further.

    Raises:
        UserError: the field does not lie in the slide, the slide has another mpp, or is damaged.
    """
    left, top = (math.floor(v - margin_um[0] / field.mpp + 1e-6) for v in (field.x, field.y))
    right, bottom = (
        math.ceil(v + margin_um[1] / field.mpp - 1e-6)
        for v in (field.x + field.width, field.y + field.height)
    )
    box = (left, top, right - left, bottom - top)
    where = (field.x - left, field.y - top)
    size = field.source.stat().st_size
    words = repr((LAYOUT, field.source.name, size, astuple(field)[1:], box))
    path = folder / f"{name}_{hashlib.sha256(words.encode()).hexdigest()[:12]}.png"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _png(_cut(name, field, box)))
    return path, where


def _cut(name: str, field: Field, box: tuple[int, int, int, int]) -> np.ndarray:
    with _open(name, field) as slide:
        right, bottom = field.x + field.width, field.y + field.height
        # Half a pixel: rectangles are published rounded.
        if min(field.x, field.y) < -0.5 or right > slide.width + 0.5 or bottom > slide.height + 0.5:
            raise UserError(
                f"the field {name} ends at ({right:.0f}, {bottom:.0f}), outside {field.source} "
                f"({slide.width} x {slide.height} px); give the original slide, at full resolution."
            )
        return slide.read(0, *box)


def _open(name: str, field: Field) -> Slide:
    if not field.is_slide:
        return open_slide(field.source, mpp=field.mpp)
    try:
        slide = open_slide(field.source)
    except MppError:
        return open_slide(field.source, mpp=field.mpp)
    if abs(slide.mpp / field.mpp - 1) > MPP_AGREES:
        slide.close()
        raise UserError(
            f"{field.source} states {slide.mpp:.4g} µm per pixel, but the field {name} was cut at "
            f"{field.mpp:.4g}; give the original slide, at full resolution."
        )
    return slide


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=PNG_LEVEL)
    return stream.getvalue()


def recut(table: Table, fields: Mapping[str, Field], folder: Path) -> Table:
    """The table with every field's image exchanged for its cut with surroundings.

    Args:
        fields: image of the table -> where it lies; nuclei of images that are not named are left
            out. The image covers its field exactly, whatever its own size in px.
        folder: where the PNGs are kept.

    Returns:
        Fewer rows in the same order; image, x, y (px of the cut) and mpp are new.

    Raises:
        UserError: as `field_image`.
    """
    table = table.take(np.flatnonzero(np.isin(table.image, list(fields))))
    names, group = np.unique(table.image, return_inverse=True)
    rows = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])

    def make(image: str) -> tuple[Path, tuple[float, float]]:
        return field_image(folder, Path(image).stem, fields[image])

    image, mpp = table.image.astype(object), table.mpp.copy()
    x, y = table.x.copy(), table.y.copy()
    with Progress(len(names), what="fields with surroundings", unit="fields") as progress:
        made = map_ahead(make, names.tolist(), workers=min(4, os.cpu_count() or 1))
        for name, mine, (path, corner) in zip(names.tolist(), rows, made, strict=True):
            field = fields[name]
            width, height = image_size(Path(name))
            x[mine] = corner[0] + x[mine] * (field.width / width)
            y[mine] = corner[1] + y[mine] * (field.height / height)
            image[mine], mpp[mine] = str(path), field.mpp
            progress.update(1)
    return replace(table, image=image.astype(str), x=x, y=y, mpp=mpp)


def field_folder(request: Request, benchmark: str) -> Path:
    """Where the fields of a benchmark are kept.

    Raises:
        UserError: the request has no cache folder.
    """
    if request.cache is None:
        raise UserError("slides= cuts every field once and keeps it: give a cache folder, too.")
    return request.cache / "fields" / benchmark


def find_slides(root: Path, names: Iterable[str]) -> dict[str, Path]:
    """The slide files, at any depth below a folder, whose names begin with those given.

    'TCGA-A7-A0D9-01Z-00-DX1' finds TCGA-A7-A0D9-01Z-00-DX1.<uuid>.svs but not …-DX10….svs; upper
    and lower case are the same. Names without a slide are not in the result.

    Raises:
        UserError: there is no such folder, it has no slide that is asked for, or two of different
            size for one name.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give slides= the folder of the slides.")
    files = [p for p in sorted(root.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    stems = [f"{path.stem.lower()}." for path in files]
    found: dict[str, Path] = {}
    wanted = sorted(set(names))
    for name in wanted:
        start = f"{name.lower()}."
        hits = [path for path, stem in zip(files, stems, strict=True) if stem.startswith(start)]
        if len({path.stat().st_size for path in hits}) > 1:
            raise UserError(
                f"two different slides are called {name}: {hits[0]} and {hits[-1]}; "
                f"leave the right one."
            )
        if hits:
            found[name] = hits[0]
    if wanted and not found:
        raise UserError(
            f"none of the {len(wanted)} slides is below {root}; the first would be "
            f"{wanted[0]}*.svs: give slides= the folder that holds them."
        )
    return found


def lacking(fields: Mapping[str, Field], table: Table) -> str:
    """One sentence on the images that have no slide; '' when all have one."""
    missing = sorted(Path(image).stem for image in set(table.image.tolist()) - set(fields))
    if not missing:
        return ""
    return (
        f"{len(missing)} of {len(missing) + len(fields)} fields have no slide and are left out, "
        f"the first is {missing[0]}."
    )
