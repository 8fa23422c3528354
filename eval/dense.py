"""Features of nuclei that are read from dense maps: images in windows, windows in batches.

An image is brought to the probing mpp once and divided into non-overlapping squares of `valid` px.
Each square is seen through a window of `window` px with the square in its middle, so that the
border of a square has context; nuclei are read in the square that they lie in. MUSE's settings
are 224/224 and 512/224 at 0.5 and 0.25 µm/px (preprocess/ of alibaba-damo-academy/MUSE). Where the
image's side is no multiple, the last square is moved back into the image: its part of the nuclei
then has real tissue around, where padding would show mirrored one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.features import finite
from eval.progress import Progress
from lemon_muse.data import geometry
from lemon_muse.data.ahead import map_ahead
from lemon_muse.data.slides import Slide, open_slide
from lemon_muse.data.slides_bands import level_grid
from lemon_muse.data.table import Table, is_large, read_image

# A window of 224 px counts as this many nuclei of `batch`.
NUCLEI_PER_WINDOW = 8
# Windows of a slide that are read at once.
HELD = 256


@dataclass(frozen=True)
class Windows:
    """Windows of images and the nuclei in them.

    Attributes:
        pixels: uint8 [t, window, window, 3].
        points: float32 [n, 2], x and y of the nuclei in px of their window, pixel centres at +0.5.
        owner: int64 [n], the window of each nucleus, ascending.
        rows: int64 [n], the nucleus: a row of the table.
    """

    pixels: np.ndarray
    points: np.ndarray
    owner: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def part(self, chosen: np.ndarray) -> "Windows":
        """The windows int64 [m] (in this order) with their nuclei."""
        place = np.full(len(self), -1)
        place[chosen] = np.arange(len(chosen))
        mine = np.flatnonzero(place[self.owner] >= 0)
        mine = mine[np.argsort(place[self.owner[mine]], kind="stable")]
        owner = place[self.owner[mine]]
        return Windows(self.pixels[chosen], self.points[mine], owner, self.rows[mine])


def joined(parts: list[Windows]) -> Windows:
    """All windows of some, in order."""
    first = np.cumsum([0, *(len(part) for part in parts)])
    return Windows(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.points for part in parts]),
        np.concatenate([part.owner + n for part, n in zip(parts, first, strict=False)]),
        np.concatenate([part.rows for part in parts]),
    )


def cut(
    image: np.ndarray, points: np.ndarray, rows: np.ndarray, *, window: int, valid: int
) -> Windows:
    """The windows of an image that already has the wanted mpp; those without nuclei are left out.

    Args:
        image: uint8 [H, W, 3]; beyond its border windows see it mirrored.
        points: float [n, 2], x and y in px of the image.
        rows: int64 [n], what to call the nuclei.
        window, valid: sides of the windows and of the squares in their middle, px.
    """
    sides = np.array([image.shape[1], image.shape[0]])
    place = squares(points, sides, window=window, valid=valid)
    pixels, _ = geometry.crop(image, place.corner[place.first] + window / 2, size=window)
    return place.windows(pixels, points, rows)


@dataclass(frozen=True)
class Squares:
    """Which window each nucleus is read in, nuclei in the order of their windows.

    `order` int64 [n] sorts the nuclei, `owner` [n] is the window of each sorted one, `corner`
    [n, 2] its window's corner, `first` [t] the first nucleus of each window.
    """

    order: np.ndarray
    owner: np.ndarray
    corner: np.ndarray
    first: np.ndarray

    def windows(self, pixels: np.ndarray, points: np.ndarray, rows: np.ndarray) -> Windows:
        """With the pixels of every window, uint8 [t, window, window, 3]."""
        near = (points[self.order] - self.corner).astype(np.float32)
        return Windows(pixels, near, self.owner, rows[self.order])


def squares(points: np.ndarray, sides: np.ndarray, *, window: int, valid: int) -> Squares:
    """The squares of an image of `sides` (x, y) px that hold its nuclei, float [n, 2]."""
    count = np.maximum(1, -(-sides // valid))
    # The square of a nucleus, and where that square begins: moved back, or the image in its middle.
    square = np.clip(np.floor(points / valid).astype(np.int64), 0, count - 1)
    begin = np.where(
        sides >= valid, np.minimum(square * valid, sides - valid), (sides - valid) // 2
    )
    number, owner = np.unique(square[:, 1] * count[0] + square[:, 0], return_inverse=True)
    order = np.argsort(owner, kind="stable")
    owner, corner = owner[order], (begin - (window - valid) // 2)[order]
    return Squares(order, owner, corner, np.searchsorted(owner, np.arange(len(number))))


def cut_slide(
    slide: Slide, centres: np.ndarray, rows: np.ndarray, *, window: int, valid: int, mpp: float
) -> Iterator[Windows]:
    """`cut` of an image that is not held in memory; `centres` are level-0 px of the slide."""
    level = slide.level_for(mpp)
    width, height, down = slide.levels[level]
    grid = level_grid((width, height), level_mpp=slide.mpp * down, mpp=mpp)
    scale = 1 / (np.array(grid.step) * down)
    points = centres * scale
    place = squares(points, np.array([grid.width, grid.height]), window=window, valid=valid)
    middle = (place.corner[place.first] + window / 2) / scale
    # Windows are numbered row by row, so a run of them needs few tiles twice.
    for begin in range(0, len(middle), HELD):
        piece = middle[begin : begin + HELD]
        for found, pixels in slide.bands(piece, window, mpp=mpp):
            rank = np.full(len(middle), -1)
            rank[begin + found] = np.arange(len(found))
            mine = np.flatnonzero(rank[place.owner] >= 0)
            mine = mine[np.argsort(rank[place.owner[mine]], kind="stable")]
            near = (points[place.order[mine]] - place.corner[mine]).astype(np.float32)
            yield Windows(pixels, near, rank[place.owner[mine]], rows[place.order[mine]])


def windows_of(
    table: Table,
    rows: np.ndarray | None = None,
    *,
    window: int,
    valid: int,
    mpp: float,
    workers: int = 0,
) -> Iterator[Windows]:
    """The windows with nuclei of some rows (int [n]; all when None), image by image.

    Each image is read once; with `workers` > 0 the next ones are read ahead in threads.
    """
    rows = np.arange(len(table)) if rows is None else np.asarray(rows)
    names, group = np.unique(table.image[rows], return_inverse=True)
    order = np.argsort(group, kind="stable")
    parts = np.split(rows[order], np.cumsum(np.bincount(group, minlength=len(names)))[:-1])

    def read(part: np.ndarray) -> Windows:
        image = read_image(Path(table.image[part[0]]))
        image, scale = geometry.resample(image, source_mpp=float(table.mpp[part[0]]), mpp=mpp)
        points = np.stack([table.x[part], table.y[part]], 1) * scale
        return cut(image, points, part, window=window, valid=valid)

    if not len(rows):
        return
    small = [part for part in parts if not is_large(Path(table.image[part[0]]))]
    yield from map_ahead(read, small, workers=workers)
    for part in parts:
        path = Path(table.image[part[0]])
        if is_large(path):
            centres = np.stack([table.x[part], table.y[part]], 1)
            with open_slide(path, mpp=float(table.mpp[part[0]])) as slide:
                yield from cut_slide(slide, centres, part, window=window, valid=valid, mpp=mpp)


def per_pass(batch: int, window: int) -> int:
    """Windows of a forward pass: as many pixels as batch / 8 windows of 224 px, at least one."""
    return max(1, round(batch / NUCLEI_PER_WINDOW * (224 / window) ** 2))


@torch.inference_mode()
def encode(
    encoder: Any,
    windows: Windows,
    *,
    batch: int = 256,
    device: str | torch.device = "cpu",
    bf16: bool = False,
) -> np.ndarray:
    """Features float32 [n, dim] of the nuclei of some windows, in their order.

    Args:
        encoder: has `nuclei(images, points, owner)`, mean and std.
        batch: see `per_pass`.
        bf16: the network runs under autocast; maps are read in float32.
    """
    from lemon_muse.data.augment import prepare

    side, step = windows.pixels.shape[1], per_pass(batch, windows.pixels.shape[1])
    parts = []
    for start in range(0, len(windows), step):
        piece = torch.from_numpy(windows.pixels[start : start + step]).to(device)
        low, high = np.searchsorted(windows.owner, [start, start + step])
        points = torch.from_numpy(windows.points[low:high]).to(device)
        owner = torch.from_numpy(windows.owner[low:high] - start).to(device)
        images = prepare(piece, window=side, mean=encoder.mean, std=encoder.std)
        with torch.autocast(piece.device.type, torch.bfloat16, enabled=bf16):
            parts.append(encoder.nuclei(images, points, owner).float().cpu().numpy())
    return np.concatenate(parts)


def dense_features(
    encoder: Any,
    table: Table,
    *,
    window: int,
    valid: int,
    mpp: float,
    batch: int = 256,
    workers: int = 0,
    device: str = "cpu",
    bf16: bool = False,
    name: str = "encoder",
) -> np.ndarray:
    """The features of every row of the table, float32 [n, dim], without augmentation.

    Args:
        encoder: a module with `nuclei`, mean and std (`DenseEncoder`); put into evaluation mode.
        window, valid: sides, px at `mpp`, of what the network sees and of its middle part that
            nuclei are read in; valid <= window.
        batch: nuclei of a forward pass; a window counts by its area, 224 px as 8.
        workers: threads that read images ahead.

    Raises:
        RunError: the table is empty, or the encoder gives numbers that are not finite.
    """
    if not 0 < valid <= window:
        raise ValueError(f"valid={valid} must be positive and at most window={window}")
    encoder = encoder.to(device).eval()
    out: np.ndarray | None = None
    waiting: list[Windows] = []

    def flush() -> int:
        nonlocal out
        windows = joined(waiting)
        waiting.clear()
        found = encode(encoder, windows, batch=batch, device=device, bf16=bf16)
        if out is None:
            out = np.full((len(table), found.shape[1]), np.nan, np.float32)
        out[windows.rows] = found
        return len(found)

    with Progress(len(table), what=f"features of {name}", unit="nuclei") as progress:
        stream = windows_of(table, window=window, valid=valid, mpp=mpp, workers=workers)
        for windows in stream:
            waiting.append(windows)
            if sum(map(len, waiting)) >= per_pass(batch, window):
                progress.update(flush())
        if waiting:
            progress.update(flush())
    return finite(out, name=name)
