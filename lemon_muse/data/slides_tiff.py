"""Native tiles of tiled TIFFs (SVS, NDPI, pyramids), and the choice of a file's fastest source."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.data.slides_tiles import OpenSlideTiles, Tiles, WholeImage, damaged
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

CHECKED = 96  # side of the region that must agree with OpenSlide before fast tiles are trusted, px
# Formats whose levels are plain grids of TIFF tiles; others (BIF, SCN, Philips) move their tiles.
PLAIN_GRIDS = ("aperio", "hamamatsu", "generic-tiff", "trestle")
JPEG = (6, 7, 33007, 34892)  # TIFF compressions that need the tables of the page
J2K_YCC = 33003  # Aperio's JPEG 2000 whose components are YCbCr, which no decoder undoes by itself


class TiffTiles(Tiles):
    """Native tiles of a TIFF, each decoded by itself: several times faster than OpenSlide.

    A level is trusted when one region of it has the same pixels as OpenSlide's; the region lies
    where the file spends most bytes, since empty glass would agree with anything. Levels that do
    not agree, or are not there as tiles, are read by OpenSlide.
    """

    def __init__(self, slow: OpenSlideTiles) -> None:
        import tifffile

        super().__init__(slow.path)
        self.slow, self.facts = slow, slow.facts
        self._file = tifffile.TiffFile(slow.path)
        self._handle = os.open(slow.path, os.O_RDONLY)
        self._pages: dict[int, Any] = {}
        self._trusted: dict[int, bool] = {}
        end = os.fstat(self._handle).st_size
        page: Any
        for page in self._file.pages:
            if not _is_plain(page):
                continue
            size = (page.imagewidth, page.imagelength)
            offsets, counts = np.asarray(page.dataoffsets), np.asarray(page.databytecounts)
            if len(counts) and int((offsets + counts).max()) > end:
                self.close()
                raise damaged(slow.path, "it is cut short")
            for level, wanted in enumerate(self.facts.sizes):
                # OpenSlide fills a hole of a coarse level from the finer one: leave that to it.
                if size == wanted and level not in self._pages and (level == 0 or counts.all()):
                    self._pages[level] = page
                    break

    def is_fast(self, level: int) -> bool:
        """Whether the native tiles of this level are used."""
        if level not in self._trusted:
            self._trusted[level] = level in self._pages  # for the reads of the check itself
            if self._trusted[level] and not self._agrees(level):
                self._trusted[level] = False
                self._kept.clear()
                self._bytes = 0
        return self._trusted[level]

    def shape(self, level: int) -> tuple[int, int]:
        if not self.is_fast(level):
            return self.slow.shape(level)
        return self._pages[level].tilewidth, self._pages[level].tilelength

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        if not self.is_fast(level):
            return self.slow.read(level, x, y, width, height)
        return super().read(level, x, y, width, height)

    def decode(self, level: int, row: int, column: int) -> np.ndarray:
        if not self.is_fast(level):
            return self.slow.decode(level, row, column)
        page = self._pages[level]
        _, _, width, height = self._clipped(level, row, column)
        index = row * -(-page.imagewidth // page.tilewidth) + column
        count = page.databytecounts[index]
        if not count:
            return np.full((height, width, 3), 255, np.uint8)
        data = os.pread(self._handle, count, page.dataoffsets[index])
        tables = {}
        if page.compression in JPEG:
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        try:
            segment = page.decode(data, index, **tables)[0]
        except Exception as error:  # every codec has errors of its own
            raise damaged(self.path, error) from None
        if len(data) < count or segment is None:
            raise damaged(self.path, f"tile {row},{column} of level {level} is cut short")
        pixels = segment[0, :height, :width]
        return _rgb(pixels) if page.compression == J2K_YCC else pixels

    def _agrees(self, level: int) -> bool:
        page, scale = self._pages[level], self.slow._slide.level_downsamples[level]
        tw, th = page.tilewidth, page.tilelength
        columns = -(-page.imagewidth // tw)
        x = y = 0
        for index in np.argsort(page.databytecounts)[::-1][:64]:
            corner = (int(index) % columns * tw, int(index) // columns * th)
            left, top = (max(0, c - CHECKED // 3) for c in corner)
            # Only where OpenSlide does not have to interpolate for want of a whole coordinate.
            if all(abs(v * scale - round(v * scale)) / scale < 1 / 512 for v in (left, top)):
                x, y = left, top
                break
        sides = [min(CHECKED, f - v) for f, v in zip(self.facts.sizes[level], (x, y), strict=True)]
        wanted = self.slow.read(level, x, y, sides[0], sides[1])
        try:
            same = np.array_equal(Tiles.read(self, level, x, y, sides[0], sides[1]), wanted)
        except (UserError, ValueError):
            same = False
        if not same:
            log.info("%s, level %d: tiles differ from OpenSlide's, which is used", self.path, level)
        return same

    def release(self) -> None:
        """Close the file, but leave OpenSlide open."""
        self._file.close()
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def close(self) -> None:
        self.release()
        self.slow.close()


def open_tiles(path: Path) -> Tiles:
    """The fastest source that reads a file rightly.

    Raises:
        UserError: the file is missing, damaged or of no known format.
    """
    import openslide

    if not path.is_file():
        raise UserError(f"there is no slide {path}.")
    if openslide.OpenSlide.detect_format(path) is None:
        return WholeImage(path)
    slow = OpenSlideTiles(path)
    if slow.facts.vendor not in PLAIN_GRIDS:
        return slow
    try:
        fast = TiffTiles(slow)
        if fast.is_fast(0):
            return fast
        fast.release()
        return slow
    except UserError:
        slow.close()
        raise
    except Exception as error:  # tifffile refuses odd files with errors of many kinds
        log.info("%s: no tiles by tifffile (%s), OpenSlide is used", path, error)
        return slow


def _is_plain(page: Any) -> bool:
    return (
        page.is_tiled
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.dtype == np.uint8
    )


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """Full-range YCbCr to RGB (ITU-T T.871) in integers of 16 binary places: OpenSlide's result."""
    y, cb, cr = (pixels[..., i].astype(np.int32) for i in range(3))
    cb, cr, half = cb - 128, cr - 128, 1 << 15
    red = y + ((91881 * cr + half) >> 16)
    green = y + ((-22554 * cb - 46802 * cr + half) >> 16)
    blue = y + ((116130 * cb + half) >> 16)
    return np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)
