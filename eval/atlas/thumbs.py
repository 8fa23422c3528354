"""Thumbnails: the windows that the encoder saw, cut from the slides, as JPEG sprite sheets."""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.atlas.source import Embedded
from eval.progress import Progress
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

ACROSS = 32  # cells of a sheet in each direction: a sheet of 1280 px decodes in some 10 ms
SMALLEST, LARGEST = 32, 48  # px of a cell
# Where the file does not say how large a window is, and for dense encoders, which see hundreds of
# nuclei in one.
DEFAULT_UM = 10.0
QUALITY = 82
PER_SHEET = ACROSS * ACROSS


@dataclass(frozen=True)
class Cells:
    """How thumbnails are cut: `size` px a side at `mpp` µm per px."""

    size: int
    mpp: float


def cells(encoder: dict[str, Any], side: float) -> Cells:
    """Thumbnails as large as the encoder's window, or of `side` µm where that is not 0.

    A window of 32 to 48 px keeps its own pixels (in steps of 8, the blocks of JPEG, so that cells
    do not bleed into each other); other sizes are resampled. Without a window, and for dense
    encoders, whose window is no picture of a nucleus, thumbnails are 10 µm wide.
    """
    try:
        window, mpp = float(encoder["window"]), float(encoder["mpp"])
        if encoder.get("kind") == "dense" or not (window > 0 and 0 < mpp < 100):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        window, mpp = DEFAULT_UM / 0.25, 0.25
    size = int(np.clip(round(window / 8) * 8, SMALLEST, LARGEST))
    return Cells(size, (side or window * mpp) / size)


def sheets(
    found: Embedded, order: np.ndarray, *, side: float, moved: Path | None
) -> tuple[Iterator[bytes], np.ndarray, Cells, list[str]]:
    """Cut a thumbnail of every nucleus.

    Args:
        order: int [n], the order of the nuclei on the page.
        side: µm, or 0 for the encoder's window.
        moved: a folder that is searched for slides which are not where the file says.

    Returns:
        JPEG sheets of 32 x 32 cells in that order, made one by one; whether a nucleus (of the
        page's order) has a picture, bool [n]; how cells were cut; notes for the reader.
    """
    how = cells(found.encoder, side)
    n = len(order)
    # Slides come one after another, sheets mix them: pixels wait on disk, not in memory.
    with tempfile.TemporaryFile() as file:
        pixels = np.memmap(file, np.uint8, "w+", shape=(n, how.size, how.size, 3))
    there = np.zeros(n, bool)
    position = np.empty(n, np.int64)
    position[order] = np.arange(n)
    notes: list[str] = []
    names = found.obs["slide"].astype(str).to_numpy()
    with Progress(n, what="thumbnails", unit="nuclei") as progress:
        for name in dict.fromkeys(names.tolist()):
            rows = np.flatnonzero(names == name)
            try:
                path, mpp = locate(name, found, moved)
                for at, crops in _cut(path, mpp, rows, found, how):
                    pixels[position[rows[at]]] = crops
                    there[position[rows[at]]] = True
            except UserError as error:
                notes.append(f"No thumbnails of {name}: {error}")
            progress.update(len(rows))
    return _encoded(pixels, there), there, how, notes


def locate(name: str, found: Embedded, moved: Path | None) -> tuple[Path, float]:
    """Where a slide lies now and its µm per px.

    Raises:
        UserError: the file does not say, or the slide is not there.
    """
    said = found.slides.get(name, {})
    try:
        path, mpp = Path(str(said["path"])), float(said["mpp"])
    except (KeyError, TypeError, ValueError):
        raise UserError("the .h5ad file does not say where the slide is.") from None
    places = [path, found.folder / path, found.folder / path.name]
    places += [] if moved is None else [moved / path.name]
    for place in places:
        if place.is_file():
            return place, mpp
    # The page may be published: it names the file, not the folders of who made it.
    raise UserError(f"{path.name} is not where it was; give slides=, the folder that it is in.")


def _cut(
    path: Path, mpp: float, rows: np.ndarray, found: Embedded, how: Cells
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions in `rows`, int64 [m], and windows, uint8 [m, size, size, 3]."""
    words = np.full(len(rows), "")
    obs = found.obs.iloc[rows]
    table = Table(
        image=np.full(len(rows), str(path)),
        x=obs["x_px"].to_numpy(np.float64),
        y=obs["y_px"].to_numpy(np.float64),
        mpp=np.full(len(rows), mpp),
        label=np.full(len(rows), -1),
        patient=words,
        slide=words,
        split=words,
    )
    try:
        yield from table.stream(how.size, how.mpp)
    except UserError as error:
        raise UserError(str(error).replace(f"{path.parent}/", "")) from None
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror or error}).") from None


def _encoded(pixels: np.ndarray, there: np.ndarray) -> Iterator[bytes]:
    size = pixels.shape[1]
    for start in range(0, len(pixels), PER_SHEET):
        part = pixels[start : start + PER_SHEET]
        if not there[start : start + PER_SHEET].any():
            yield b""
            continue
        down = -(-len(part) // ACROSS)
        sheet = np.full((down * ACROSS, size, size, 3), 255, np.uint8)
        sheet[: len(part)][there[start : start + PER_SHEET]] = part[
            there[start : start + PER_SHEET]
        ]
        sheet = sheet.reshape(down, ACROSS, size, size, 3).transpose(0, 2, 1, 3, 4)
        image = Image.fromarray(np.ascontiguousarray(sheet).reshape(down * size, ACROSS * size, 3))
        buffer = io.BytesIO()
        # 4:4:4: with halved colour the cells of a sheet bleed into each other.
        image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
        yield buffer.getvalue()
