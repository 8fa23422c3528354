"""Generated tissue as files: a folder of images with their nuclei, or a pyramidal slide.

Everything is written under a temporary name, synced and renamed: a killed writer leaves no file
that looks finished.
"""

import csv
import io
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from lemon_muse.errors import RunError, UserError
from lemon_muse.synthetic.cells import CLASSES
from lemon_muse.synthetic.draw import World, patch, plan, tissue

COLOURS = ((60, 90, 220), (150, 60, 200), (220, 60, 60), (60, 170, 80), (240, 180, 20))
HEADER = ("slide", "patient", "image", "nuclei", "mpp", "split")
PATCH = 1024  # pixels drawn at a time: larger ones leave the caches and are slower
SCANNERS = 4
_SPACE = uuid.UUID("6f1c1a52-30c5-4a57-9d35-6a1f8d0f7c11")


def write_images(
    folder: Path,
    *,
    slides: int,
    side: int,
    mpp: float = 0.25,
    seed: int = 0,
    mitotic_rate: float = 0.03,
) -> None:
    """Write fields of tissue from `slides` slides, with their nuclei, as a plain folder.

    ``images/<slide>.png``, ``nuclei/<slide>.geojson`` and ``slides.csv`` with the columns slide,
    patient, image, nuclei, mpp, split; the two paths are relative to `folder`. A patient has
    one slide or two; train, val and test (about 60, 20, 20 % of the slides) are
    disjoint by patient. Slides take turns on four scanners. Each file is a pure function of the
    arguments and files already there are kept, so a killed call is finished by calling it again
    with the same arguments (``generated.json`` keeps them); `slides.csv` comes last.

    Args:
        folder: made if missing.
        slides: how many, >= 3 (one patient for each split).
        side: pixels per side of each image.
        mpp: µm per pixel.
        seed: another seed gives other patients.
        mitotic_rate: share of tumour cells in mitosis, 0 to 1.

    Raises:
        UserError: fewer than three slides, an argument of `tissue` outside its range, or a folder
            that holds tissue of other arguments.
        RunError: a file cannot be written.
    """
    if slides < 3:
        raise UserError(f"slides={slides} cannot be split by patient: give 3 or more.")
    patients = _patients(slides)
    splits = _splits(patients)
    claim(folder, {"side": side, "mpp": mpp, "seed": seed, "mitotic_rate": mitotic_rate})
    rows = []
    for index, patient in enumerate(patients):
        name = f"slide{index:03d}"
        image = f"images/{name}.png"
        nuclei = f"nuclei/{name}.geojson"
        number = seed * 100_003 + index
        if not ((folder / image).is_file() and (folder / nuclei).is_file()):
            field = tissue(
                number,
                side=side,
                mpp=mpp,
                slide=number,
                scanner=index % SCANNERS,
                mitotic_rate=mitotic_rate,
            )
            write_image(folder / image, field.image)
            write_nuclei(folder / nuclei, field.xy, field.kinds, key=f"{seed}/{name}/{side}/{mpp}")
        rows.append((name, f"patient{patient:03d}", image, nuclei, f"{mpp:g}", splits[patient]))
    write_table(folder / "slides.csv", rows)


def write_table(path: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """Write slides.csv: (slide, patient, image, nuclei, mpp, split) of each image."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(rows)
    with finished(path) as part:
        part.write_text(table.getvalue(), encoding="utf-8")


def write_image(path: Path, image: np.ndarray) -> None:
    """Write pixels uint8 [H, W, 3] as PNG."""
    with finished(path) as part:
        Image.fromarray(image).save(part, "PNG", compress_level=1)


def write_slide(
    path: Path,
    *,
    side: int,
    seed: int = 0,
    slide: int = 0,
    scanner: int = 0,
    mpp: float = 0.25,
    mitotic_rate: float = 0.02,
) -> Path:
    """Write a pyramidal, tiled JPEG TIFF that OpenSlide reads as Aperio, and its nuclei beside it.

    The nuclei go to ``<stem>.geojson``. Patches of 1024 px are drawn one at a time into a temporary
    file of side * side * 3 bytes beside `path`; memory stays below 1 GB at 20,000 px.

    Args:
        path: the file to write, usually ``*.tiff`` or ``*.svs``; replaced if there.
        side: pixels per side of level 0, >= 64.
        seed, slide, scanner, mpp, mitotic_rate: as in `tissue`.

    Returns:
        `path`.

    Raises:
        UserError: an argument outside its range.
        RunError: pyvips cannot be loaded or the file cannot be written.
    """
    path = Path(path)
    world = plan(
        seed,
        side=side,
        mpp=mpp,
        slide=slide,
        scanner=scanner,
        mitotic_rate=mitotic_rate,
        glass=True,
    )
    xy, kinds = world.nuclei()
    key = f"{seed}/{slide}/{side}/{mpp}/{mitotic_rate}"
    # The slide comes last: where it stands, its nuclei stand too.
    write_nuclei(path.with_suffix(".geojson"), xy, kinds, key=key)
    raw = path.with_name(f".{path.name}.{os.getpid()}.raw")
    try:
        with finished(path) as part:
            _draw_raw(world, raw)
            _save_pyramid(world, raw, part)
    finally:
        raw.unlink(missing_ok=True)
    return path


def claim(folder: Path, arguments: dict[str, float]) -> None:
    """Note the arguments in the folder; files of other arguments must not be taken for ours."""
    note = folder / "generated.json"
    text = json.dumps(arguments) + "\n"
    if note.is_file():
        if note.read_text(encoding="utf-8") != text:
            raise UserError(f"{folder} holds tissue of other settings: give another folder.")
        return
    with finished(note) as part:
        part.write_text(text, encoding="utf-8")


def _draw_raw(world: World, raw: Path) -> None:
    """All pixels, row by row, uint8; one band of patches in memory."""
    side = world.side
    with raw.open("wb") as file:
        for y in range(0, side, PATCH):
            height = min(PATCH, side - y)
            band = np.empty((height, side, 3), np.uint8)
            for x in range(0, side, PATCH):
                width = min(PATCH, side - x)
                band[:, x : x + width] = patch(world, x=x, y=y, width=width, height=height)
            file.write(band.data)


def _save_pyramid(world: World, raw: Path, part: Path) -> None:
    try:
        import pyvips  # loads a large native library: only slides need it
    except OSError as error:
        raise RunError(f"libvips cannot be loaded ({error}): install pyvips-binary.") from None
    side, quality = world.side, world.device.quality
    image = pyvips.Image.rawload(str(raw), side, side, 3).copy(interpretation="srgb")
    about = (
        f"Aperio Image Library v12.0.15 (generated tissue, not a scanner file)\r\n"
        f"{side}x{side} (256x256) JPEG/YCC Q={quality}"
        f"|AppMag = {round(10 / world.mpp)}|MPP = {world.mpp:.4f}"
    )
    image.set_type(pyvips.GValue.gstr_type, "image-description", about)
    try:
        image.tiffsave(
            str(part),
            tile=True,
            pyramid=True,
            compression="jpeg",
            Q=quality,
            tile_width=256,
            tile_height=256,
            bigtiff=True,
            depth="onetile",
            xres=1000 / world.mpp,  # pixels per mm; written per cm
            yres=1000 / world.mpp,
            resunit="cm",
        )
    except pyvips.Error as error:
        raise RunError(f"{part} cannot be written: {str(error).splitlines()[0]}.") from None


def write_nuclei(path: Path, xy: np.ndarray, kinds: np.ndarray, *, key: str) -> None:
    """A GeoJSON FeatureCollection of points in level-0 pixels, one feature per line, as QuPath."""
    lines = []
    for row, ((x, y), kind) in enumerate(zip(xy.tolist(), kinds.tolist(), strict=True)):
        feature = {
            "type": "Feature",
            "id": str(uuid.uuid5(_SPACE, f"{key}/{row}")),
            "geometry": {"type": "Point", "coordinates": [x, y]},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": CLASSES[kind], "color": COLOURS[kind]},
            },
        }
        lines.append(json.dumps(feature, separators=(",", ":")))
    text = '{"type":"FeatureCollection","features":[\n' + ",\n".join(lines) + "\n]}\n"
    with finished(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def finished(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; synced and renamed when the block ends well, else removed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


def _patients(slides: int) -> list[int]:
    """The patient of each slide: three patients with one, then two, two, one, two, two, one …"""
    out: list[int] = []
    patient = 0
    while len(out) < slides:
        out += [patient] * (1 if patient < 3 or patient % 3 == 2 else 2)
        patient += 1
    return out[:slides]


def _splits(patients: list[int]) -> dict[int, str]:
    """Patients dealt out so that each split has at least one: train, val, test, train, train …"""
    names = ("train", "val", "test", "train", "train")
    return {p: names[p % len(names)] for p in sorted(set(patients))}
