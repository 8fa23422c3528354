"""Pictures of prepared data: crops side by side, ROIs with their nuclei, histograms.

All are PNGs that appear whole or not at all.
"""

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lemon_muse.data.files import write_atomic

GAP = 2  # px of white between crops
ROI_SIDE = 1400  # longer side of a picture, px
SHARPER = 2  # circles are drawn so much larger and made smaller: Pillow draws no smooth ones
NUCLEUS, LINE = 3.0, 1.5  # radius of a circle, µm; its line at most, px
BAR = 50.0  # µm, length of the scale bar
MOST_TYPES = 8  # in a legend; the others are one entry
INK, PAPER = (25, 25, 25), (255, 255, 255)
# Bright hues that H&E does not have, in an order in which the colour-blind can tell the first four.
COLOURS = (
    (255, 235, 0),
    (0, 230, 255),
    (255, 255, 255),
    (0, 0, 0),
    (90, 255, 90),
    (255, 140, 0),
    (30, 90, 255),
    (140, 90, 40),
)
OTHER = (160, 160, 160)


def contact_sheet(crops: np.ndarray, path: Path, columns: int = 20) -> None:
    """Crops side by side, row by row, each followed by white lines of 2 px.

    Args:
        crops: uint8 [n, S, S, 3], n > 0.
        path: the PNG.
        columns: crops in a row.
    """
    if crops.ndim != 4 or not len(crops) or columns < 1:
        raise ValueError(f"crops must be [n, S, S, 3] with n > 0, not {crops.shape}")
    n, high, wide, _ = crops.shape
    rows = math.ceil(n / columns)
    size = (rows * (high + GAP), columns * (wide + GAP))
    sheet = np.full((*size, 3), 255, np.uint8)
    for i, crop in enumerate(crops):
        y, x = i // columns * (high + GAP), i % columns * (wide + GAP)
        sheet[y : y + high, x : x + wide] = crop
    _save(Image.fromarray(sheet), path)


def roi_overlay(
    image: np.ndarray,
    xy: np.ndarray,
    path: Path,
    types: np.ndarray | None = None,
    *,
    mpp: float,
) -> None:
    """A ROI with a circle of 3 µm radius around each nucleus and a scale bar of 50 µm.

    Args:
        image: uint8 [H, W, 3]; made smaller where its longer side has more than 1400 px.
        xy: float [n, 2], px of `image`.
        path: the PNG.
        types: str [n], '' where unknown: colours and a legend, most frequent first.
        mpp: µm per pixel of `image`.
    """
    high, wide = image.shape[:2]
    scale = min(1.0, ROI_SIDE / max(high, wide))
    size = (max(1, round(wide * scale)), max(1, round(high * scale)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    xy = np.asarray(xy, np.float64).reshape(-1, 2)
    entries, colours = _colours(types, len(xy))
    points = xy * (size[0] / wide, size[1] / high)
    picture = _circles(picture, points, NUCLEUS / mpp * scale, colours)
    draw = ImageDraw.Draw(picture)
    _scale_bar(draw, size, BAR / mpp * scale)
    if entries:
        _legend(draw, entries)
    _save(picture, path)


def histograms(path: Path, panels: Sequence[tuple[str, np.ndarray, str]]) -> None:
    """Small histograms side by side, three in a row, each with its median.

    Args:
        path: the PNG.
        panels: title, values (any shape; what is not finite is left out) and unit of each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("histograms need at least one panel")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # by itself, so that the caller's pyplot stays as it is
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, values, unit) in zip(axes, panels, strict=False):
        _panel(axis, title, np.asarray(values, np.float64).ravel(), unit)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_atomic(path, file.getvalue())


def _panel(axis: Any, title: str, values: np.ndarray, unit: str) -> None:
    values = values[np.isfinite(values)]
    axis.set_title(f"{title} (n = {len(values):,})", fontsize=9, loc="left")
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(labelsize=7)
    for edge in ("top", "right"):
        axis.spines[edge].set_visible(False)
    if not len(values):
        axis.text(0.5, 0.5, "no values", transform=axis.transAxes, ha="center", fontsize=8)
        axis.set_yticks([])
        return
    low, high = values.min(), values.max()
    middle = float(np.median(values))
    if high - low <= 1e-9 * max(1.0, abs(high)):  # one bar: no bins fit between equal values
        half = max(abs(middle) * 0.02, 1e-3)
        axis.hist(values, bins=[middle - half, middle + half], color="#7a8fb8")
        axis.set_xlim(middle - 5 * half, middle + 5 * half)
    else:
        bins = int(np.clip(2 * len(values) ** (1 / 3), 8, 40))  # Rice's rule
        whole = bool((values == values.round()).all()) and high - low < bins
        edges = np.arange(low - 0.5, high + 1) if whole else np.linspace(low, high, bins + 1)
        axis.hist(values, bins=edges, color="#7a8fb8")
    axis.axvline(middle, color="#b03030", lw=1)
    axis.annotate(
        f"{middle:.4g}", (middle, 1), xycoords=("data", "axes fraction"), xytext=(4, -8),
        textcoords="offset points", color="#b03030", fontsize=7,
    )  # fmt: skip


def _circles(
    picture: Image.Image, points: np.ndarray, radius: float, colours: list[tuple[int, int, int]]
) -> Image.Image:
    """The picture with thin smooth circles."""
    size = (picture.width * SHARPER, picture.height * SHARPER)
    layer = picture.resize(size, Image.Resampling.BILINEAR)
    mask = Image.new("L", size)
    draw, on = ImageDraw.Draw(layer), ImageDraw.Draw(mask)
    radius = max(radius, 1.5)
    radius, line = radius * SHARPER, max(1, round(min(LINE, radius / 4) * SHARPER))
    for (x, y), colour in zip(points * SHARPER, colours, strict=True):
        # Pillow's ellipse covers both ends of its box: pixel centres at +0.5 are half a px less.
        box = (x - radius - 0.5, y - radius - 0.5, x + radius - 0.5, y + radius - 0.5)
        draw.ellipse(box, outline=colour, width=line)
        on.ellipse(box, outline=255, width=line)
    # Off the circles, pixels stay as they are.
    touched = mask.reduce(SHARPER).point([0] + [255] * 255)
    return Image.composite(layer.reduce(SHARPER), picture, touched)


def _colours(
    types: np.ndarray | None, n: int
) -> tuple[list[tuple[str, tuple[int, int, int]]], list[tuple[int, int, int]]]:
    """The legend and each nucleus' colour."""
    if types is None or not any(str(t) for t in types):
        return [], [COLOURS[0]] * n
    if len(types) != n:
        raise ValueError(f"{n} nuclei have {len(types)} types")
    names = [str(t) for t in types]
    ranked = sorted(Counter(names).items(), key=lambda kv: (kv[0] == "", -kv[1], kv[0]))
    named = [name for name, _ in ranked if name]
    table = dict(zip(named[:MOST_TYPES], COLOURS, strict=False))
    legend = [(f"{name} {count:,}", table[name]) for name, count in ranked if name in table]
    rest = sum(count for name, count in ranked if name not in table)
    if rest:
        legend.append((f"{'other' if len(named) > MOST_TYPES else 'unknown'} {rest:,}", OTHER))
    return legend, [table.get(name, OTHER) for name in names]


def _font() -> ImageFont.FreeTypeFont:
    import matplotlib  # for its font: Pillow's own has no µ

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 14)


def _legend(draw: ImageDraw.ImageDraw, entries: list[tuple[str, tuple[int, int, int]]]) -> None:
    font = _font()
    wide = max(draw.textlength(text, font=font) for text, _ in entries)
    draw.rectangle((8, 8, 8 + wide + 36, 16 + 22 * len(entries)), fill=PAPER, outline=INK)
    for i, (text, colour) in enumerate(entries):
        y = 12 + 22 * i
        draw.ellipse((15, y + 4, 27, y + 16), fill=colour, outline=INK)
        draw.text((34, y + 10), text, fill=INK, font=font, anchor="lm")


def _scale_bar(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], length: float, micrometres: float = BAR
) -> None:
    """A bar at the lower right; none where the picture is no wider than it."""
    wide, high = size
    if length + 40 > wide or high < 60:
        return
    text = f"{micrometres:g} µm" if micrometres < 1000 else f"{micrometres / 1000:g} mm"
    font = _font()
    right, bottom = wide - 18, high - 16
    half = max(length, draw.textlength(text, font=font)) / 2 + 8
    middle = min(right - length / 2, wide - 6 - half)
    draw.rectangle((middle - half, bottom - 30, middle + half, bottom + 10), fill=PAPER)
    left = round(middle - length / 2)
    draw.rectangle((left, bottom, left + round(length) - 1, bottom + 4), fill=INK)
    draw.text((middle, bottom - 14), text, fill=INK, font=font, anchor="mm")


def _round_length(most: float) -> float:
    """The largest of 1, 2, 5 x 10^k that is not above `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return max(k * power for k in (1, 2, 5) if k * power <= most)


def _save(picture: Image.Image, path: Path) -> None:
    file = io.BytesIO()
    picture.save(file, "PNG")
    write_atomic(path, file.getvalue())
