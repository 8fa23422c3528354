"""Where the pixels of a slide come from: OpenSlide or a whole image (slides_tiff has a third).

All sources hand out tiles of one level, uint8 RGB, clipped to the level; white stands for what the
scanner did not keep. Coordinates are pixels of the level. A source belongs to one thread.
"""

import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.errors import UserError

CACHE_BYTES = 64 * 2**20  # decoded tiles kept for `read`
BLOCK = 768  # side of what OpenSlide is asked for at once, about, px
SLIDES_ONLY = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi")
SCANNERS = ("aperio.ScanScope ID", "hamamatsu.Product", "leica.device-model", "tiff.Model")


@dataclass(frozen=True)
class Facts:
    """What a file says about itself.

    Attributes:
        sizes: (width, height) of every level in px, finest first.
        downsamples: level-0 px per px of the level.
        mpp: µm per level-0 px as the file states it, unchecked; None where it states none.
        vendor: OpenSlide's name of the format, or 'image'.
        scanner: device, or ''.
        bounds: corner (x, y) of the scanned area in level-0 px, (0, 0) where not stated.
    """

    sizes: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    mpp: float | None
    vendor: str
    scanner: str = ""
    bounds: tuple[int, int] = (0, 0)


class Tiles:
    """A source of pixels; the ways to get them differ in `shape` and `decode`."""

    facts: Facts

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._bytes = 0

    def shape(self, level: int) -> tuple[int, int]:
        """Width and height of the tiles of a level in px."""
        raise NotImplementedError

    def decode(self, level: int, row: int, column: int) -> np.ndarray:
        """One tile, uint8 [h, w, 3], clipped to the level; not cached."""
        raise NotImplementedError

    def close(self) -> None:
        """Let the file go."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """A rectangle of a level, uint8 [height, width, 3]; white beyond the level."""
        out = np.full((height, width, 3), 255, np.uint8)
        full, (tw, th) = self.facts.sizes[level], self.shape(level)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, full[0]), min(y + height, full[1])
        if left >= right or top >= bottom:
            return out
        for row in range(top // th, (bottom - 1) // th + 1):
            for column in range(left // tw, (right - 1) // tw + 1):
                x0, y0 = max(left, column * tw), max(top, row * th)
                x1, y1 = min(right, (column + 1) * tw), min(bottom, (row + 1) * th)
                # The neighbours of this rectangle need tiles at its border alone.
                is_whole = (x1 - x0, y1 - y0) == (tw, th)
                tile = self._tile(level, row, column, keep=not is_whole)
                part = tile[y0 - row * th : y1 - row * th, x0 - column * tw : x1 - column * tw]
                out[y0 - y : y1 - y, x0 - x : x1 - x] = part
        return out

    def _tile(self, level: int, row: int, column: int, *, keep: bool) -> np.ndarray:
        key = (level, row, column)
        tile = self._kept.get(key)
        if tile is not None:
            self._kept.move_to_end(key)
            return tile
        tile = self.decode(level, row, column)
        if keep:
            self._kept[key] = tile
            self._bytes += tile.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return tile

    def _clipped(self, level: int, row: int, column: int) -> tuple[int, int, int, int]:
        """Corner, width and height of a tile, clipped to the level."""
        (tw, th), (width, height) = self.shape(level), self.facts.sizes[level]
        x, y = column * tw, row * th
        return x, y, min(tw, width - x), min(th, height - y)


class OpenSlideTiles(Tiles):
    """Any format that OpenSlide reads; its blocks are whole native tiles, so none is cut twice."""

    def __init__(self, path: Path) -> None:
        import openslide

        super().__init__(path)
        try:
            self._slide = openslide.OpenSlide(path)
        except (openslide.OpenSlideError, OSError, ValueError) as error:
            raise damaged(path, error) from None
        self.facts = _facts(self._slide)

    def shape(self, level: int) -> tuple[int, int]:
        found = []
        for side in ("width", "height"):
            text = self._slide.properties.get(f"openslide.level[{level}].tile-{side}", "")
            native = int(text) if text.isdigit() and int(text) else 256
            found.append(native * max(1, round(BLOCK / native)))
        return found[0], found[1]

    def decode(self, level: int, row: int, column: int) -> np.ndarray:
        return self._rectangle(level, *self._clipped(level, row, column))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        full = self.facts.sizes[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, full[0]), min(y + height, full[1])
        out = np.full((height, width, 3), 255, np.uint8)
        if left < right and top < bottom:
            part = self._rectangle(level, left, top, right - left, bottom - top)
            out[top - y : bottom - y, left - x : right - x] = part
        return out

    def _rectangle(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        import openslide

        # OpenSlide's own ratio, not ours: it divides by it again.
        scale = self._slide.level_downsamples[level]
        try:
            image = self._slide.read_region(
                (round(x * scale), round(y * scale)), level, (width, height)
            )
        except openslide.OpenSlideError as error:
            raise damaged(self.path, error) from None
        pixels = np.asarray(image)
        alpha = pixels[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(pixels[..., :3])
        weight = alpha.astype(np.float32) / 255
        return (pixels[..., :3] * weight + 255 * (1 - weight)).round().astype(np.uint8)

    def close(self) -> None:
        self._slide.close()


class WholeImage(Tiles):
    """A PNG, JPEG or plain TIFF, held whole in memory; its tiles are bands of rows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._pixels = _whole(path)
        height, width = self._pixels.shape[:2]
        self.facts = Facts(((width, height),), (1.0,), None, "image")

    def shape(self, level: int) -> tuple[int, int]:
        return self.facts.sizes[0][0], 256

    def decode(self, level: int, row: int, column: int) -> np.ndarray:
        return self._pixels[row * 256 : (row + 1) * 256]


def damaged(path: Path, why: object) -> UserError:
    """The error of a file that cannot be read."""
    text = " ".join(str(why).split()).rstrip(".")
    return UserError(f"the slide {path} cannot be read ({text}); fetch it again or leave it out.")


def _facts(slide: Any) -> Facts:
    properties = slide.properties
    width, height = slide.dimensions
    factors = []
    for (w, h), ratio in zip(slide.level_dimensions, slide.level_downsamples, strict=True):
        # The ratio of two rounded sizes is not the factor that made them: 2, not 2.0005.
        whole = max(1, round(ratio))
        meant = all(abs(a / whole - b) < 1 for a, b in ((width, w), (height, h)))
        factors.append(float(whole) if meant and abs(ratio / whole - 1) < 0.02 else float(ratio))
    return Facts(
        tuple(slide.level_dimensions),
        tuple(factors),
        _stated_mpp(properties),
        properties.get("openslide.vendor", ""),
        next((properties[k].strip() for k in SCANNERS if k in properties), ""),
        (
            int(properties.get("openslide.bounds-x", 0)),
            int(properties.get("openslide.bounds-y", 0)),
        ),
    )


def _stated_mpp(properties: Any) -> float | None:
    try:
        x, y = (float(properties[f"openslide.mpp-{axis}"]) for axis in "xy")
    except (KeyError, ValueError):
        return None
    # Pixels that are not square are no statement about one mpp.
    return (x * y) ** 0.5 if x > 0 and y > 0 and abs(x / y - 1) < 0.02 else None


def _whole(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]; transparent is white."""
    from PIL import Image

    if path.suffix.lower() in SLIDES_ONLY:
        # Pillow would take the first picture of a slide that was cut short for an image.
        raise damaged(path, "OpenSlide does not know it")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.filterwarnings("error", category=UserWarning)  # tags beyond the file's end
            if image.mode[0] in "IF":
                raise damaged(path, f"pixels of mode {image.mode}, not 8 bits a channel")
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
                return np.array(Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB"))
            return np.array(image.convert("RGB"))
    except Image.DecompressionBombError:
        return _whole_vips(path)
    except (OSError, SyntaxError, ValueError, UserWarning) as error:
        raise error if isinstance(error, UserError) else damaged(path, error) from None


def _whole_vips(path: Path) -> np.ndarray:
    """Images so large that Pillow takes them for an attack."""
    import pyvips

    try:
        image = pyvips.Image.new_from_file(str(path), access="sequential").colourspace("srgb")
        if image.hasalpha():
            image = image.flatten(background=255)
        return np.ascontiguousarray(image.cast("uchar").numpy()[..., :3])
    except pyvips.Error as error:
        raise damaged(path, error) from None
