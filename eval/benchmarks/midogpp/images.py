"""The images of MIDOG++: where they lie, how large they are, and µm per pixel with its source."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.midogpp.files import SLIDES, number_of
from lemon_muse.data.table import image_size
from lemon_muse.errors import UserError

SUFFIXES = (".tiff", ".tif", ".png")
# µm per pixel, published per scanner. The axes of the 3DHistech differ (0.2482, 0.2491): their
# geometric mean; slides of the Hamamatsu XR have 0.2263 to 0.2274: the middle.
SCANNER_MPP = {
    "Hamamatsu XR": 0.2268,
    "Hamamatsu S360": 0.2299,
    "Aperio CS2": 0.2533,
    "3DHistech": 0.2487,
}
BREAST = "human breast cancer"
# Every tumour type but breast was scanned with one scanner.
TUMOUR_SCANNER = {
    "canine lung cancer": "3DHistech",
    "canine lymphosarcoma": "3DHistech",
    "canine soft tissue sarcoma": "3DHistech",
    "canine cutaneous mast cell tumor": "Aperio CS2",
    "human neuroendocrine tumor": "Hamamatsu XR",
    "human melanoma": "Hamamatsu XR",
}
# A resolution tag outside of this is a screen's (96 dpi) or a default, not the scanner's.
TAG_RANGE = (0.2, 0.3)
UNIT_UM = {2: 25400.0, 3: 10000.0}  # TIFF ResolutionUnit: inch, centimetre


# Where an mpp is from, best first.
SOURCES = {
    "tag": "the resolution tags of the file",
    "table": f"the columns mm_x and mm_y of {SLIDES}",
    "scanner": "the published figure of the scanner",
    "given": "image_mpp=",
}
AREA_UM2 = 2e6  # every region of the data set was chosen to cover 2 mm²
HALF_BOX = 25.0  # px: the centre of a box that touches its image lies no further outside


@dataclass(frozen=True)
class Image:
    """An image file: width and height in px, µm per px and where that is from (of SOURCES)."""

    path: Path
    width: int
    height: int
    mpp: float
    source: str


def scanner_of(number: int | None, domain: str) -> str:
    """The scanner by the publication, '' where it does not follow: breast by number of the slide.

    Breast slides 1 to 50, 51 to 100 and 101 to 150 (MIDOG 2021) were scanned with three scanners.
    """
    if domain != BREAST:
        return TUMOUR_SCANNER.get(domain, "")
    order = ("Hamamatsu XR", "Hamamatsu S360", "Aperio CS2")
    return order[(number - 1) // 50] if number and 1 <= number <= 150 else ""


def find_images(places: Iterable[Path], names: Iterable[str]) -> dict[str, Path]:
    """Where listed images lie: by name, or by the same name with another suffix of SUFFIXES."""
    there: dict[str, Path] = {}
    for place in dict.fromkeys(places):
        if place.is_dir():
            for path in sorted(place.iterdir()):
                if path.suffix.lower() in SUFFIXES:
                    there.setdefault(path.name, path)
    found = {}
    for name in names:
        same = (name, *(Path(name).stem + suffix for suffix in SUFFIXES))
        hits = [there[other] for other in same if other in there]
        if hits:
            found[name] = hits[0]
    return found


def measure(
    files: Mapping[str, Path],
    *,
    slides: Mapping[int, dict[str, str]] | None,
    scanners: Mapping[str, str],
    given: float | None,
) -> dict[str, Image]:
    """Size and mpp of every image from its header; no pixel is decoded.

    Args:
        files: listed name: file.
        slides: rows of the table of slides by number.
        scanners: listed name: scanner, '' where it is not known.
        given: µm per pixel where nothing else says it.

    Raises:
        UserError: a file is damaged or cut short, or its mpp is not known.
    """
    found, unknown = {}, []
    for name, path in files.items():
        width, height, tag = read_header(path)
        number = number_of(name)
        row = slides.get(number) if slides and number is not None else None
        mpp, source = choose_mpp(tag, row, scanners.get(name, ""), given)
        if mpp is None:
            unknown.append(path)
        else:
            found[name] = Image(path, width, height, mpp, source)
    if unknown:
        raise UserError(
            f"{len(unknown)} of {len(files)} images state no resolution and their scanner is not "
            f"known, the first is {unknown[0]}; put {SLIDES} of the published repository beside "
            f"the list, or pass image_mpp=, the µm per pixel of the images."
        )
    return found


def choose_mpp(
    tag: float | None, row: Mapping[str, str] | None, scanner: str, given: float | None
) -> tuple[float | None, str]:
    """The best known mpp and its source; (None, '') where there is none."""
    known = (tag, listed_mpp(row), SCANNER_MPP.get(scanner), given)
    pairs = zip(known, SOURCES, strict=True)
    return next(((mpp, source) for mpp, source in pairs if mpp is not None), (None, ""))


def compare_sizes(
    images: Mapping[str, Image], sizes: Mapping[str, tuple[int, int]], path: Path
) -> list[str]:
    """What differs from the listed sizes, as sentences.

    Raises:
        UserError: an image was resized, so that the coordinates of the list do not hold.
    """
    other = [n for n, i in images.items() if n in sizes and sizes[n] != (i.width, i.height)]
    for name in other:
        image, (width, height) = images[name], sizes[name]
        if max(abs(image.width / width - 1), abs(image.height / height - 1)) > 0.02:
            raise UserError(
                f"{image.path} has {image.width} x {image.height} px, but {path.name} lists it "
                f"with {width} x {height}, so the coordinates do not hold; use the published "
                f"images of the same data set as the list, in their own size."
            )
    if not other:
        return []
    return [f"{len(other)} images have another size than in {path.name}, the first is {other[0]}."]


def clamp(
    x: np.ndarray, y: np.ndarray, images: Sequence[Image]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Move nuclei whose centre lies outside of their image onto its border, and count them.

    Raises:
        UserError: further outside than a box that touches the image.
    """
    width = np.array([image.width for image in images], np.float64)
    height = np.array([image.height for image in images], np.float64)
    to_x, to_y = np.clip(x, 0, width), np.clip(y, 0, height)
    away = np.maximum(abs(to_x - x), abs(to_y - y))
    far = np.flatnonzero(away > HALF_BOX)
    if len(far):
        image = images[far[0]]
        raise UserError(
            f"{len(far)} nuclei lie outside of their images, the first at ({x[far[0]]:g}, "
            f"{y[far[0]]:g}) of {image.path} with {image.width} x {image.height} px; list and "
            f"images are of different data sets."
        )
    return to_x, to_y, int((away > 0).sum())


def describe_mpp(images: Iterable[Image], given: float | None) -> list[str]:
    """Where the mpp of the images is from, as sentences."""
    counts = Counter(image.source for image in images)
    said = [f"µm per pixel of {counts[s]} images: {SOURCES[s]}." for s in SOURCES if counts[s]]
    if given is not None and not counts["given"]:
        said.append(f"image_mpp={given:g} is not used: files or publication say the resolution.")
    return said


def describe_area(images: Iterable[Image]) -> list[str]:
    """Regions that are not as large as published, at the mpp that is used for them."""
    areas = {i.path.name: i.mpp**2 * i.width * i.height for i in images}
    odd = [name for name, area in areas.items() if abs(area / AREA_UM2 - 1) > 0.05]
    if not odd:
        return []
    return [
        f"{len(odd)} images do not cover the published 2 mm² at their µm per pixel, the first is "
        f"{odd[0]} with {areas[odd[0]] / 1e6:.2f} mm²."
    ]


def read_header(path: Path) -> tuple[int, int, float | None]:
    """Width and height, px, and the mpp that the tags of a TIFF state (None: none or unlikely).

    Raises:
        UserError: not readable, or a TIFF that ends before its pixels do.
    """
    if path.suffix.lower() == ".png":
        return *image_size(path), None
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            ends = [a + b for a, b in zip(page.dataoffsets, page.databytecounts, strict=True)]
            facts = page.imagewidth, page.imagelength, _tag_mpp(page.tags)
    except Exception as error:  # tifffile refuses damaged files with errors of many kinds
        raise UserError(f"the image {path} does not decode ({error}); fetch it again.") from None
    if max(ends, default=0) > path.stat().st_size:
        raise UserError(f"the image {path} is cut short; fetch it again.")
    return facts


def _tag_mpp(tags: Any) -> float | None:
    unit = UNIT_UM.get(int(tags.valueof("ResolutionUnit", 2)))
    pixels = [tags.valueof(name) for name in ("XResolution", "YResolution")]
    if unit is None or any(value is None or 0 in value for value in pixels):
        return None
    x, y = (unit * below / above for above, below in pixels)
    likely = all(TAG_RANGE[0] <= value <= TAG_RANGE[1] for value in (x, y))
    return math.sqrt(x * y) if likely and abs(x / y - 1) < 0.02 else None


def listed_mpp(row: Mapping[str, str] | None) -> float | None:
    """The mpp in the columns mm_x and mm_y that some copies of the table of slides have."""
    try:
        value = 1000 * math.sqrt(float(row["mm_x"]) * float(row["mm_y"])) if row else 0.0
    except (KeyError, ValueError):
        return None
    return value if TAG_RANGE[0] <= value <= TAG_RANGE[1] else None
