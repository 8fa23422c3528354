"""Pictures of what a network sees in training: crops and their views; the pen of `draw_rois`.

Pixels of views are enlarged by a whole factor and not smoothed: they are the network's. Places are
px of the picture, which is drawn on a canvas `FINE` times as large and made smaller, because Pillow
draws no smooth lines.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lemon_muse.data.files import write_atomic

Colour = tuple[int, int, int]
Box = tuple[float, float, float]  # left, top, side

FINE = 2
EDGE, TITLE = 20, 38  # round the picture; above a view
# About the side of a crop; most crops in a row; between them; px of a row where views are many.
CROP_SIDE, COLUMNS, GAP, WIDEST = 128, 4, 30, 2000
PAPER, INK, DIM, BLACK = (30, 30, 34), (240, 240, 240), (165, 165, 170), (0, 0, 0)
# Bright on dark paper, and hues that H&E does not have.
COLOURS: tuple[Colour, ...] = (
    (255, 230, 0), (0, 235, 255), (120, 255, 70), (255, 150, 0), (80, 140, 255), (255, 255, 255),
    (255, 75, 60), (0, 200, 150), (230, 190, 130), (185, 200, 0), (190, 190, 255), (160, 255, 225),
)  # fmt: skip


@dataclass(frozen=True)
class ShownCrop:
    """A crop and its views.

    Attributes:
        title: above it.
        pixels: uint8 [S, S, 3], as stored.
        views: uint8 [w, w, 3] each, as the network sees them.
        corners: float [4, 2] a view, px of the crop, in the order of the outline.
    """

    title: str
    pixels: np.ndarray
    views: Sequence[np.ndarray]
    corners: Sequence[np.ndarray]


def crop_picture(crops: Sequence[ShownCrop], path: Path, *, title: str) -> None:
    """Crops, each with the outlines of its views and followed by them.

    Args:
        crops: at least one.
        path: the PNG; it appears whole or not at all.
        title: above everything.
    """
    sides = [len(crops[0].pixels), *(len(view) for view in crops[0].views)]
    shown = [side * max(1, round(CROP_SIDE / side)) for side in sides]
    wide, high = sum(shown) + 6 * (len(shown) - 1) + GAP, max(shown) + 22
    columns = max(1, min(COLUMNS, len(crops), WIDEST // wide))
    size = (2 * EDGE + columns * wide - GAP, EDGE + TITLE + math.ceil(len(crops) / columns) * high)
    canvas = new_canvas(max(size[0], 600), size[1])
    draw = ImageDraw.Draw(canvas, "RGBA")
    places = [
        (EDGE + i % columns * wide, TITLE + 22 + i // columns * high) for i in range(len(crops))
    ]
    for crop, (x, y) in zip(crops, places, strict=True):
        left = x
        for v, (image, side) in enumerate(zip((crop.pixels, *crop.views), shown, strict=True)):
            canvas.paste(enlarged(image, side), (left * FINE, y * FINE))
            if v:
                square(draw, (left, y, side), COLOURS[v - 1])
            left += side + 6
        for corners, colour in zip(crop.corners, COLOURS, strict=False):
            outline(draw, np.asarray(corners) * (shown[0] / sides[0]) + (x, y), colour)
    picture = canvas.reduce(FINE)
    draw = ImageDraw.Draw(picture)
    draw.text((EDGE, 10), title, fill=INK, font=font(14))
    for crop, (x, y) in zip(crops, places, strict=True):
        draw.text((x, y - 5), crop.title, fill=DIM, font=font(11), anchor="ls")
    save(picture, path)


def new_canvas(wide: int, high: int) -> Image.Image:
    """Of a picture of that size."""
    return Image.new("RGB", (wide * FINE, high * FINE), PAPER)


def enlarged(pixels: np.ndarray, side: int) -> Image.Image:
    """uint8 [s, s, 3] for a square of `side` px: smoothed only if that is no multiple of s."""
    whole = side % len(pixels) == 0
    filter_ = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    # The canvas repeats pixels: made smaller again, they are as they were.
    small = Image.fromarray(pixels).resize((side, side), filter_)
    return small.resize((side * FINE, side * FINE), Image.Resampling.NEAREST)


def square(draw: ImageDraw.ImageDraw, box: Box, colour: Colour, width: float = 1.5) -> None:
    """The outline of a box."""
    x, y, side = box
    corners = np.array([(x, y), (x + side, y), (x + side, y + side), (x, y + side)])
    outline(draw, corners, colour, width)


def outline(
    draw: ImageDraw.ImageDraw, corners: np.ndarray, colour: Colour, width: float = 1.5
) -> None:
    """A closed line through float [k, 2], with a dark rim."""
    around = [(float(x), float(y)) for x, y in np.concatenate([corners, corners[:2]]) * FINE]
    draw.line(around, fill=(*BLACK, 120), width=round((width + 1.5) * FINE), joint="curve")
    draw.line(around, fill=colour, width=round(width * FINE), joint="curve")


def dot(draw: ImageDraw.ImageDraw, at: np.ndarray, colour: Colour, radius: float) -> None:
    """A disc with a dark rim."""
    x, y = (np.asarray(at, np.float64) * FINE).tolist()
    for r, fill in (((radius + 0.8) * FINE, BLACK), (radius * FINE, colour)):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def circle(draw: ImageDraw.ImageDraw, at: np.ndarray, colour: Colour, radius: float) -> None:
    """A circle with a dark rim."""
    x, y = (np.asarray(at, np.float64) * FINE).tolist()
    for grow, width, ink in ((0.75, 3.0, BLACK), (0.0, 1.5, colour)):
        r = (radius + grow) * FINE
        draw.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=round(width * FINE))


def label(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: Colour, size: int
) -> None:
    """Text with a dark rim; `at` is its top left. Drawn on the picture, not on the canvas."""
    draw.text(
        at, text, fill=colour, font=font(size), anchor="lt", stroke_width=2, stroke_fill=BLACK
    )


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans."""
    import matplotlib  # for its font: Pillow's own has no µ

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG that appears whole or not at all."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    write_atomic(path, file.getvalue())
