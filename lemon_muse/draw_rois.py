"""A picture of a ROI, its views as the network sees them, and the nuclei that views share."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ImageDraw

from lemon_muse import draw as pen
from lemon_muse.draw import COLOURS, DIM, EDGE, FINE, INK, TITLE, Colour

Place = tuple[int, int, int]  # left, top, side; px of the picture

SIDE, ROI_SIDE, GAP = 448, 600, 30  # about the side of a global view; of the ROI; between boxes
MOST = 12  # numbered nuclei
LINES = 2  # between two views
APART = 26.0  # between numbered nuclei of a view, px of the picture
NUCLEUS = 3.0  # radius of a circle, µm
GLOBAL, LOCAL, ALONE = (255, 255, 255), (120, 200, 255), (130, 130, 130)
LEGEND = (
    "numbers: shared nuclei, the same in all views; lines: some of them, between a global view and "
    "another; white dots: other shared nuclei; grey dots: nuclei that no pair of views shares"
)


@dataclass(frozen=True)
class ShownView:
    """One view of one ROI.

    Attributes:
        name: G1, G2 … for global views, L1, L2 … for local ones.
        pixels: uint8 [s, s, 3], as the network sees them.
        points: float [n, 2], nuclei, continuous px of the view.
        inside: bool [n], the nuclei that may be matched.
        corner: top-left corner, px of the ROI.
        extent: side, px of the ROI.
        mpp: µm per pixel of the view.
    """

    name: str
    pixels: np.ndarray
    points: np.ndarray
    inside: np.ndarray
    corner: tuple[float, float]
    extent: float
    mpp: float

    @property
    def colour(self) -> Colour:
        return GLOBAL if self.name.startswith("G") else LOCAL


def roi_picture(
    roi: np.ndarray,
    points: np.ndarray,
    views: Sequence[ShownView],
    teachers: int,
    path: Path,
    *,
    title: str,
    first: int = -1,
) -> None:
    """A ROI with the squares of its views, and the views with the nuclei that they share.

    Up to 12 shared nuclei have a number and a colour, the same in all views; lines join some of
    them, at most 2 between a global view and another. The other nuclei are dots.

    Args:
        roi: uint8 [S, S, 3].
        points: float [n, 2], its nuclei, px of the ROI.
        views: global ones first.
        teachers: how many of them are global.
        path: the PNG; it appears whole or not at all.
        title: above everything.
        first: the nucleus that gets number 1 if it is shared.
    """
    zoom = max(1, round(SIDE / len(views[0].pixels)))
    size, left, boxes = layout([zoom * len(view.pixels) for view in views], teachers)
    shared = shared_nuclei(views, teachers)
    chosen = choose(views, teachers, zoom=zoom, first=first)
    lines = list(_lines(views, teachers, boxes, chosen, zoom=zoom))
    canvas = pen.new_canvas(*size)
    draw = ImageDraw.Draw(canvas, "RGBA")
    _join(draw, lines, 200)
    canvas.paste(pen.enlarged(roi, left[2]), (left[0] * FINE, left[1] * FINE))
    for view, box, both in zip(views, boxes, shared, strict=True):
        image = pen.enlarged(view.pixels, box[2])
        _mark(ImageDraw.Draw(image, "RGBA"), view, both, chosen, zoom=zoom)
        canvas.paste(image, (box[0] * FINE, box[1] * FINE))
    _join(draw, lines, 90)  # fainter where they cross views
    scale = left[2] / len(roi)
    for view in reversed(views):
        corner = np.array(view.corner) * scale + left[:2]
        width = 2.0 if view.colour == GLOBAL else 1.0
        pen.square(draw, (*corner.tolist(), view.extent * scale), view.colour, width)
    for number, nucleus in reversed(list(enumerate(chosen))):
        pen.dot(draw, points[nucleus] * scale + left[:2], COLOURS[number], 2.5)
    picture = canvas.reduce(FINE)
    draw = ImageDraw.Draw(picture)
    draw.text((EDGE, 10), title, fill=INK, font=pen.font(14))
    draw.text((EDGE, size[1] - 16), LEGEND, fill=DIM, font=pen.font(12), anchor="ls")
    for view, box, both in zip(views, boxes, shared, strict=True):
        _describe(draw, view, box, int(both.sum()), chosen, zoom=zoom)
    _name_squares(draw, views, left, scale)
    pen.save(picture, path)


def shared_nuclei(views: Sequence[ShownView], teachers: int) -> list[np.ndarray]:
    """Of every view, bool [n]: the nuclei that are matched with another view of the ROI.

    A global view is matched with all others, a local one with the global ones.
    """
    found = []
    for v, view in enumerate(views):
        partners = range(len(views)) if v < teachers else range(teachers)
        held = [views[p].inside for p in partners if p != v]
        found.append(view.inside & np.any(held, axis=0) if held else np.zeros_like(view.inside))
    return found


def choose(
    views: Sequence[ShownView], teachers: int, *, zoom: int, first: int = -1, most: int = MOST
) -> list[int]:
    """Nuclei to number: those that join pairs of views that few chosen ones join, well apart.

    Args:
        views: of one ROI.
        teachers: how many are global.
        zoom: px of the picture per px of a view.
        first: comes first if it is shared.
        most: at most so many.
    """
    inside = np.stack([view.inside for view in views])
    pairs = [(t, s) for t in range(teachers) for s in range(len(views)) if s != t]
    if not pairs:
        return []
    held = np.stack([inside[t] & inside[s] for t, s in pairs])
    free: np.ndarray = np.logical_or.reduce(held)
    joined = np.zeros(len(pairs))
    chosen: list[int] = []
    while free.any() and len(chosen) < most:
        gain = np.where(free, (held / (1 + joined)[:, None] ** 2).sum(0), -1.0)
        best = int(gain.argmax())
        if not chosen and 0 <= first < len(free) and free[first]:
            best = first
        chosen.append(best)
        joined += held[:, best]
        free[best] = False
        for view in views:
            if view.inside[best]:
                away = np.hypot(*(view.points - view.points[best]).T) * zoom
                free &= ~(view.inside & (away < APART))
    return chosen


def layout(sides: Sequence[int], teachers: int) -> tuple[tuple[int, int], Place, list[Place]]:
    """Size of the picture, and where the ROI and the views lie in it.

    The ROI is at the left; the global views are in one row, the local ones in rows above and below,
    so that few lines to them cross other views.

    Args:
        sides: of the views in the picture, px, global ones first; one number for each kind.
        teachers: how many are global.
    """
    side, small, count = sides[0], sides[-1], len(sides) - teachers
    start, room = EDGE + ROI_SIDE + GAP, max(teachers * (side + GAP), small + GAP)
    most = room // (small + GAP)
    y, globals_, locals_ = TITLE, [], []
    for above in (True, False):
        for n in _even(math.ceil(count / 2) if above else count // 2, most):
            y += TITLE
            x = start + (room - n * (small + GAP)) // 2
            locals_ += [(x + i * (small + GAP), y, small) for i in range(n)]
            y += small + GAP // 2
        if above:
            y += TITLE
            globals_ = [(start + t * (side + GAP), y, side) for t in range(teachers)]
            y += side + GAP // 2
    high = max(y, 2 * TITLE + ROI_SIDE)
    roi = (EDGE, TITLE + (high - TITLE - ROI_SIDE) // 2, ROI_SIDE)
    # The legend and the title want some width.
    return (max(start + room - GAP + EDGE, 1240), high + 44), roi, globals_ + locals_


def _even(count: int, most: int) -> list[int]:
    """`count` in as few rows as hold `most` each, alike."""
    rows = math.ceil(count / most)
    return [count // rows + (r < count % rows) for r in range(rows)]


def _lines(
    views: Sequence[ShownView],
    teachers: int,
    boxes: Sequence[Place],
    chosen: Sequence[int],
    *,
    zoom: int,
) -> Iterator[tuple[np.ndarray, Colour]]:
    """Ends float [2, 2] and colours, between global views and the views that share their nuclei."""
    used = np.zeros(len(chosen))
    for t in range(teachers):
        for s in range(t + 1, len(views)):
            both = views[t].inside & views[s].inside
            here = [number for number, nucleus in enumerate(chosen) if both[nucleus]]
            # Those with few lines so far: otherwise all would belong to the same nuclei.
            for number in sorted(here, key=lambda n: (used[n], n))[:LINES]:
                used[number] += 1
                ends = [views[v].points[chosen[number]] * zoom + boxes[v][:2] for v in (t, s)]
                yield np.stack(ends), COLOURS[number]


def _join(
    draw: ImageDraw.ImageDraw, lines: Sequence[tuple[np.ndarray, Colour]], alpha: int
) -> None:
    for ends, colour in lines:
        draw.line((ends * FINE).ravel().tolist(), fill=(*colour, alpha), width=FINE)


def _mark(
    draw: ImageDraw.ImageDraw,
    view: ShownView,
    both: np.ndarray,
    chosen: Sequence[int],
    *,
    zoom: int,
) -> None:
    """Circles round the numbered nuclei of a view, dots on the others; px of the view's box."""
    at = view.points * zoom
    for nucleus in np.flatnonzero(view.inside).tolist():
        if nucleus not in chosen:
            pen.dot(draw, at[nucleus], GLOBAL if both[nucleus] else ALONE, 1.8)
    for number, nucleus in enumerate(chosen):
        if view.inside[nucleus]:
            pen.circle(draw, at[nucleus], COLOURS[number], NUCLEUS / view.mpp * zoom)


def _describe(
    draw: ImageDraw.ImageDraw,
    view: ShownView,
    box: Place,
    matched: int,
    chosen: Sequence[int],
    *,
    zoom: int,
) -> None:
    """The title of a view and the numbers of its nuclei."""
    above = f"{view.name}  {len(view.pixels)} px at {view.mpp:.2f} µm/px"
    below = f"nuclei: {int(view.inside.sum())} inside, {matched} matched"
    draw.text((box[0], box[1] - 20), above, fill=view.colour, font=pen.font(12), anchor="ls")
    draw.text((box[0], box[1] - 5), below, fill=DIM, font=pen.font(12), anchor="ls")
    for number, nucleus in enumerate(chosen):
        if view.inside[nucleus]:
            off = NUCLEUS / view.mpp * zoom * 0.75
            x, y = (view.points[nucleus] * zoom).tolist()
            x, y = min(x + off, box[2] - 18), max(y - off - 10, 3)
            pen.label(draw, (box[0] + x, box[1] + y), str(number + 1), COLOURS[number], 12)


def _name_squares(
    draw: ImageDraw.ImageDraw, views: Sequence[ShownView], roi: Place, scale: float
) -> None:
    """The names of the views at corners of their squares, where there is room for them."""
    taken: list[tuple[float, float]] = []
    for view in views:
        x, y = (np.array(view.corner) * scale + roi[:2]).tolist()
        far = view.extent * scale
        corners = [(a, b) for b in (y + 3, y + far - 11) for a in (x + 3, x + far - 17)]
        for a, b in corners:
            if all(abs(a - c) > 17 or abs(b - d) > 11 for c, d in taken):
                taken.append((a, b))
                pen.label(draw, (a, b), view.name, view.colour, 10)
                break
