"""The only place that opens a slide: SVS, NDPI, MRXS, tiled TIFF …, and plain images.

Formats and mpp come from OpenSlide (the wheel openslide-bin); pixels of plain TIFF grids from
their native tiles, each decoded by itself, once a region of the slide was the same as OpenSlide's.
Coordinates are level-0 pixels, x right, y down; beyond the slide and where nothing was scanned it
is white. ICC profiles are not applied.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from lemon_muse.data.slides_bands import Grid, cut_bands, level_grid, taps, weigh
from lemon_muse.data.slides_tiff import open_tiles
from lemon_muse.data.slides_tiles import Facts, Tiles
from lemon_muse.errors import UserError

MPP_RANGE = (0.05, 10.0)  # µm per pixel that a microscope can have; 264.58 is a 96 dpi tag
STRIP = 16 * 2**20  # source pixels that are resampled at once


class MppError(UserError):
    """A slide states no usable mpp."""


class Slide:
    """One open slide; made by `open_slide`. A context manager; pickled by path and reopened.

    It belongs to one thread: give each thread or process its own.

    Attributes:
        path: the file.
        width, height: level-0 px.
        mpp: µm per level-0 px.
        mpp_source: 'file' or 'given'.
        levels: (width, height, downsample) of every level, finest first.
        vendor: OpenSlide's name of the format, or 'image'.
        bounds: corner (x, y) of the scanned area in level-0 px; (0, 0) where not stated.
    """

    def __init__(self, path: Path, tiles: Tiles, *, mpp: float, mpp_source: str) -> None:
        facts = tiles.facts
        self.path, self.mpp, self.mpp_source = path, mpp, mpp_source
        self.width, self.height = facts.sizes[0]
        self.levels = [(*s, d) for s, d in zip(facts.sizes, facts.downsamples, strict=True)]
        self.vendor, self.bounds = facts.vendor, facts.bounds
        self._tiles = tiles

    def __enter__(self) -> "Slide":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.mpp if self.mpp_source == "given" else None)

    def close(self) -> None:
        """Let the file go; nothing can be read afterwards."""
        self._tiles.close()

    def level_for(self, mpp: float) -> int:
        """The coarsest level that is as fine as `mpp` (within `geometry.MPP_TOLERANCE`), or 0."""
        from lemon_muse.data import geometry

        limit = mpp * (1 + geometry.MPP_TOLERANCE)
        fine = [i for i, (_, _, d) in enumerate(self.levels) if self.mpp * d <= limit]
        return max(fine, key=lambda i: self.levels[i][2], default=0)

    @property
    def tile_size(self) -> tuple[int, int]:
        """Width and height of the tiles of level 0 that are decoded at once, px."""
        return self._tiles.shape(0)

    def extent(self, size: int, *, mpp: float) -> float:
        """Level-0 px of a square that `region` gives as exactly `size` x `size` px at `mpp`."""
        level = self.level_for(mpp)
        down = self.levels[level][2]
        grid = level_grid(self.levels[level][:2], level_mpp=self.mpp * down, mpp=mpp)
        return size * down if grid.is_native else size * mpp / self.mpp

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Stored pixels: uint8 [height, width, 3] at corner (x, y), all in px of `level`."""
        return self._tiles.read(level, x, y, width, height)

    def region(self, x: float, y: float, width: float, height: float, *, mpp: float) -> np.ndarray:
        """A rectangle of the slide at another resolution.

        The nearest finer level is resampled once (antialiased bicubic, as `geometry.resample`, with
        the true surroundings); within `geometry.MPP_TOLERANCE` its pixels are copied.

        Args:
            x, y: corner in level-0 px; may lie outside the slide.
            width, height: extent in level-0 px, > 0.
            mpp: µm per pixel wanted.

        Returns:
            uint8 [h', w', 3]; a level-0 point p lies at (p.x - x) * w' / width, and so for y.
        """
        _check_mpp(mpp, f"the mpp of a region of {self.path}")
        level = self.level_for(mpp)
        down = self.levels[level][2]
        grid = level_grid(self.levels[level][:2], level_mpp=self.mpp * down, mpp=mpp)
        if grid.is_native:
            sides = (max(1, round(width / down)), max(1, round(height / down)))
            return self.read(level, round(x / down), round(y / down), *sides)
        wide, high = (max(1, round(side * self.mpp / mpp)) for side in (width, height))
        step = (width / down / wide, height / down / high)
        return self._sample(level, (x / down, y / down), Grid(wide, high, step))

    def thumbnail(self, max_side: int) -> np.ndarray:
        """The whole slide, uint8 [h, w, 3], its longer side at most `max_side` px."""
        factor = max(1.0, max(self.width, self.height) / max_side)
        wide, high = (max(1, round(side / factor)) for side in (self.width, self.height))
        enough = [i for i, (w, h, _) in enumerate(self.levels) if w >= wide and h >= high]
        level = max(enough, key=lambda i: self.levels[i][2])
        width, height, _ = self.levels[level]
        return self._sample(level, (0, 0), Grid(wide, high, (width / wide, height / high)))

    def bands(
        self,
        centres: np.ndarray,
        size: int,
        *,
        mpp: float,
        band: int = 1024,
        edge: str = "reflect",
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Crops around nuclei, band by band of rows, each native tile decoded once.

        The crops are those of `geometry.resample` of the whole nearest finer level followed by
        `geometry.crop`: equal where pixels are copied, within one grey level where resampled.
        Memory: about (band + size) rows of that level, 3 bytes a pixel.

        Args:
            centres: float [n, 2], level-0 px, each inside the slide.
            size: side of a crop, px at `mpp`.
            mpp: µm per pixel of the crops.
            band: rows of the level that are decoded together.
            edge: 'reflect' mirrors the slide beyond its border, 'drop' leaves such nuclei out.

        Yields:
            Rows of `centres`, int64 [m], and pixels, uint8 [m, size, size, 3]; m <= 4096; each row
            once, in the order of the bands, not of `centres`.

        Raises:
            UserError: a centre outside the slide; the file is damaged.
        """
        if edge not in ("reflect", "drop"):
            raise ValueError(f"edge must be 'reflect' or 'drop', not {edge!r}")
        _check_mpp(mpp, f"the mpp of crops of {self.path}")
        centres = np.asarray(centres, np.float64).reshape(-1, 2)
        inside = ((centres >= 0) & (centres <= (self.width, self.height))).all(1)
        if not inside.all():
            raise UserError(
                f"{(~inside).sum()} of {len(centres)} nuclei lie outside the slide {self.path} "
                f"({self.width} x {self.height} px); drop them, or check that they belong to it."
            )
        level = self.level_for(mpp)
        width, height, down = self.levels[level]
        grid = level_grid((width, height), level_mpp=self.mpp * down, mpp=mpp)
        # A rounded level size can end a fraction of a pixel before the slide does.
        points = np.minimum(centres / down, (width, height)) / grid.step
        yield from cut_bands(self._tiles, level, grid, points, size=size, band=band, edge=edge)

    def _sample(self, level: int, corner: tuple[float, float], grid: Grid) -> np.ndarray:
        """Resample the part of a level that begins at `corner`; white outside the level."""
        out = np.full((grid.height, grid.width, 3), 255, np.uint8)
        length = self.levels[level][:2]
        axes = []
        for axis, count in ((0, grid.width), (1, grid.height)):
            positions = corner[axis] + (np.arange(count) + 0.5) * grid.step[axis]
            there = np.flatnonzero((positions >= 0) & (positions < length[axis]))
            axes.append((there, positions[there]))
        (columns, x), (rows, y) = axes
        if not len(columns) or not len(rows):
            return out
        x0, x1, across = taps(x, grid.step[0], length[0])
        deep = max(1, int(STRIP / (x1 - x0) / max(1.0, grid.step[1])))
        for start in range(0, len(rows), deep):
            y0, y1, down = taps(y[start : start + deep], grid.step[1], length[1])
            part = weigh(self.read(level, x0, y0, x1 - x0, y1 - y0), across, down)
            here = rows[start : start + deep]
            out[here[0] : here[-1] + 1, columns[0] : columns[-1] + 1] = part
        return out


def open_slide(path: Path | str, *, mpp: float | None = None) -> Slide:
    """Open a slide or a plain image.

    Args:
        path: the file.
        mpp: µm per level-0 px; goes before what the file states. Needed where it states nothing.

    Raises:
        MppError: neither the file nor `mpp` gives µm per px within 0.05 to 10.
        UserError: the file is missing, damaged or of no known format.
    """
    path = Path(path)
    tiles = open_tiles(path)
    try:
        value, source = choose_mpp(path, tiles.facts.mpp, mpp)
    except UserError:
        tiles.close()
        raise
    return Slide(path, tiles, mpp=value, mpp_source=source)


def read_facts(path: Path) -> Facts:
    """What a slide says about itself, without asking for an mpp; one region of it was decoded."""
    tiles = open_tiles(path)
    try:
        width, height = tiles.facts.sizes[0]
        tiles.read(0, width // 2, height // 2, min(64, width), min(64, height))
        return tiles.facts
    finally:
        tiles.close()


def choose_mpp(path: Path, stated: float | None, given: float | None) -> tuple[float, str]:
    """The mpp to use and where it is from ('given' or 'file').

    Raises:
        MppError: there is none, or it lies outside 0.05 to 10.
    """
    if given is not None:
        return _check_mpp(given, f"the mpp given for {path}"), "given"
    if stated is None:
        raise MppError(
            f"{path} does not state its resolution; give mpp=, the µm per pixel of the slide."
        )
    return _check_mpp(stated, f"the resolution that {path} states"), "file"


def _check_mpp(mpp: float, what: str) -> float:
    low, high = MPP_RANGE
    if not low <= mpp <= high:
        raise MppError(
            f"{what} is {mpp:g} µm per pixel, outside {low:g} to {high:g}; give the true value "
            f"as mpp= ."
        )
    return float(mpp)


def _reopen(path: Path, mpp: float | None) -> Slide:
    return open_slide(path, mpp=mpp)
