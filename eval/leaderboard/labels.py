"""Names beside points that cover neither each other nor a point, as near as there is room."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.report.style import FAINT, INK

Box = tuple[float, float, float, float]
_SIZE = 7
# CSS pixels: between a point and its name, and the step of the grid that is searched further out.
_NEAR, _STEP = 7, 9


def place_labels(
    ax: Any,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    bars: Sequence[tuple[float, float]],
) -> list[Box]:
    """Write each name beside its point in `ax`, with a thin line to it where it is not near.

    Args:
        points: (x, y) in data coordinates; bars: (low, high) of the vertical bar, or NaN.

    Returns:
        The boxes of the names (left, bottom, right, top), display pixels, in the order given. No
        two overlap, unless the panel has no room left.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import IdentityTransform

    unit = ax.figure.dpi / 96
    frame = ax.get_window_extent()
    room: Box = (frame.x0 + unit, frame.y0 + unit, frame.x1 - unit, frame.y1 - unit)
    centres = [tuple(ax.transData.transform(p)) for p in points]
    taken = [_around(c, 5 * unit) for c in centres]
    lines: list[Box] = []
    for (x, _), bar in zip(centres, bars, strict=True):
        if math.isfinite(bar[0]) and math.isfinite(bar[1]):
            ends = [ax.transData.transform((1, b))[1] for b in bar]
            lines.append((x - unit, ends[0], x + unit, ends[1]))
    for text in ax.texts:
        if text.get_gid() == "below":
            extent = text.get_window_extent()
            taken.append((extent.x0, extent.y0, extent.x1, extent.y1))
    out: list[Box] = [(0.0, 0.0, 0.0, 0.0)] * len(names)
    # From the top down: the order in which a reader meets them.
    for i in sorted(range(len(names)), key=lambda i: (-centres[i][1], centres[i][0])):
        text = ax.text(0, 0, names[i], fontsize=_SIZE, color=INK, zorder=5, in_layout=False)
        extent = text.get_window_extent()
        size = (extent.width, extent.height)
        box = _free(centres[i], size, taken, lines, room, unit)
        taken.append(box)
        out[i] = box
        text.set_transform(IdentityTransform())
        text.set(position=(box[0], (box[1] + box[3]) / 2), va="center", ha="left")
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
        _line_to(ax, centres[i], box, unit)
    return out


def _around(centre: tuple[float, float], half: float) -> Box:
    return centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half


def _free(
    centre: tuple[float, float],
    size: tuple[float, float],
    taken: Sequence[Box],
    lines: Sequence[Box],
    room: Box,
    unit: float,
) -> Box:
    """A box of that size that overlaps nothing of `taken`, the nearest that there is.

    Beside the point it may lie on one of `lines` (the pale bars) rather than go far away.
    """
    width, height = size
    near, half = _NEAR * unit, height / 2
    x, y = centre
    corners = [(x + near, y - half), (x - near - width, y - half), (x - width / 2, y + near),
               (x - width / 2, y - near - height), (x + near, y + half), (x + near, y - 3 * half),
               (x - near - width, y + half), (x - near - width, y - 3 * half)]  # fmt: skip
    step = _STEP * unit
    grid = [(a, b) for a in np.arange(room[0], room[2] - width, step)
            for b in np.arange(room[1], room[3] - height, step)]  # fmt: skip
    grid.sort(key=lambda c: math.hypot(c[0] + width / 2 - x, 2 * (c[1] + half - y)))
    beside = _boxes(corners, size, room)
    away = _boxes(grid, size, room)
    free = (box for box in [*beside, *away] if not _hits(box, taken))
    # Beside the point and off the bars; beside it; anywhere, which is a last resort with a line.
    for box in beside:
        if not _hits(box, taken) and not _hits(box, lines):
            return box
    return next(free, (beside or away or [(x, y, x + width, y + height)])[0])


def _boxes(
    corners: Sequence[tuple[float, float]], size: tuple[float, float], room: Box
) -> list[Box]:
    """Boxes with these lower left corners that lie inside the room."""
    boxes = [(float(a), float(b), float(a + size[0]), float(b + size[1])) for a, b in corners]
    return [box for box in boxes if _within(box, room)]


def _hits(box: Box, others: Sequence[Box]) -> bool:
    return any(overlap(box, other) for other in others)


def _within(box: Box, room: Box) -> bool:
    return box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _line_to(ax: Any, centre: tuple[float, float], box: Box, unit: float) -> None:
    """A thin line from the point to the nearest edge of a name that stands away from it."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import IdentityTransform

    x = min(max(centre[0], box[0]), box[2])
    y = min(max(centre[1], box[1]), box[3])
    away = math.hypot(x - centre[0], y - centre[1])
    if away <= (_NEAR + 4) * unit:
        return
    # From the rim of the point, not from its middle.
    share = 5 * unit / away
    start = (centre[0] + share * (x - centre[0]), centre[1] + share * (y - centre[1]))
    line = Line2D([start[0], x], [start[1], y], color=FAINT, lw=0.7)
    line.set_transform(IdentityTransform())
    line.set_in_layout(False)
    ax.figure.add_artist(line)


def spread(wanted: Sequence[float], *, gap: float, top: float) -> list[float]:
    """Positions at least `gap` apart, in the same order, near those wanted and at most `top`.

    Where there are too many for 0 … top they go below 0.
    """
    order = sorted(range(len(wanted)), key=lambda i: -wanted[i])
    out = [0.0] * len(wanted)
    ceiling = top
    for i in order:
        out[i] = min(wanted[i], ceiling)
        ceiling = out[i] - gap
    lowest = min(out, default=0.0)
    floor = 0.0
    if lowest < 0 <= top - gap * (len(out) - 1):
        for i in reversed(order):
            out[i] = max(out[i], floor)
            floor = out[i] + gap
    return out
