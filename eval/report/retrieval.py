"""Nearest neighbours: test nuclei and what the encoder finds most alike among train crops."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.report.gallery import Gallery
from eval.report.style import INK, MUTED, WIDTH, Picture, class_colour, photographed, rgb

_FRAME, _GAP, _MARGIN, _TAIL = 8, 8, 26, 92  # picture pixels (two to a CSS pixel)
_CHUNK = 512


@dataclass(frozen=True)
class Retrieval:
    """Neighbours of every test nucleus among the train nuclei of a gallery.

    queries: int64 [q], gallery rows; found: int64 [q, k], gallery rows, nearest first;
    same: int64 [q], how many of the k are of the query's class; chance: float [K], the share of
    each class among the train nuclei (NaN never: 0 for a class that is not there).
    """

    queries: np.ndarray
    found: np.ndarray
    same: np.ndarray
    chance: np.ndarray
    shared_patients: int


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32 [n, d]; a row of zeros stays one."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.maximum(length, 1e-12)).astype(np.float32)


def nearest(queries: np.ndarray, base: np.ndarray, k: int) -> np.ndarray:
    """Exact cosine neighbours.

    Args:
        queries: float [q, d]; base: float [b, d]; both of any length.
        k: neighbours, at most b.

    Returns:
        int64 [q, k], rows of `base`, nearest first; the lower row first where two are equal.
    """
    left, right = unit(queries), unit(base).T
    out = np.empty((len(left), k), np.int64)
    for start in range(0, len(left), _CHUNK):
        similarity = left[start : start + _CHUNK] @ right
        out[start : start + _CHUNK] = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return out


def retrieve(gallery: Gallery, k: int) -> Retrieval | None:
    """Neighbours of every test nucleus; None without test nuclei or with under k train ones."""
    queries = np.flatnonzero(gallery.split == "test")
    base = np.flatnonzero(gallery.split == "train")
    if len(queries) == 0 or len(base) < k:
        return None
    found = base[nearest(gallery.features[queries], gallery.features[base], k)]
    same = (gallery.labels[found] == gallery.labels[queries][:, None]).sum(1)
    counts = np.bincount(gallery.labels[base], minlength=len(gallery.classes))
    shared = set(gallery.patient[queries]) & set(gallery.patient[base])
    return Retrieval(queries, found, same, counts / len(base), len(shared))


def choose_queries(
    gallery: Gallery, result: Retrieval, *, each: int, seed: int
) -> dict[int, list[int]]:
    """Per class, positions in `result.queries` of a random draw: not the prettiest, any."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for cls in range(len(gallery.classes)):
        mine = np.flatnonzero(gallery.labels[result.queries] == cls)
        if len(mine):
            chosen[cls] = sorted(rng.permutation(mine)[:each].tolist())
    return chosen


def by_class(gallery: Gallery, result: Retrieval) -> list[dict[str, Any]]:
    """Per class with queries: their number, the same-class share among neighbours, and chance."""
    k = result.found.shape[1]
    out = []
    for cls, name in enumerate(gallery.classes):
        mine = gallery.labels[result.queries] == cls
        if mine.any():
            share = float(result.same[mine].mean() / k)
            row = {"class": name, "queries": int(mine.sum()), "same_class": share}
            out.append({**row, "chance": float(result.chance[cls])})
    return out


def sheet(gallery: Gallery, result: Retrieval, rows: list[int], *, name: str, alt: str) -> Picture:
    """One line a query: the query, a gap, its neighbours from near to far, the same-class count."""
    k = result.found.shape[1]
    cell = min(168, (2 * WIDTH - _MARGIN - _TAIL - k * _GAP) // (k + 1))
    head = 34
    image = Image.new("RGB", (2 * WIDTH, head + len(rows) * (cell + _GAP) - _GAP), "white")
    draw = ImageDraw.Draw(image)
    small, bold = _font(20), _font(24, bold=True)
    draw.text((cell // 2, 2), "query", font=small, fill=MUTED, anchor="mt")
    for j in range(k):
        x = cell + _MARGIN + _GAP + j * (cell + _GAP) + cell // 2
        draw.text((x, 2), "nearest" if j == 0 else str(j + 1), font=small, fill=MUTED, anchor="mt")
    for i, row in enumerate(rows):
        y = head + i * (cell + _GAP)
        image.paste(framed(gallery, int(result.queries[row]), cell, _FRAME), (0, y))
        for j, other in enumerate(result.found[row]):
            x = cell + _MARGIN + _GAP + j * (cell + _GAP)
            image.paste(framed(gallery, int(other), cell, _FRAME), (x, y))
        middle = y + cell // 2
        end = cell + _MARGIN + _GAP + k * (cell + _GAP) + 8
        draw.text((end, middle), f"{result.same[row]}/{k}", font=bold, fill=INK, anchor="lm")
    return photographed(image, name, alt)


def framed(gallery: Gallery, row: int, side: int, frame: int) -> Image.Image:
    """A nucleus's crop, scaled to a square of `side` px with a frame in its class colour."""
    inner = side - 2 * frame
    crop = Image.fromarray(gallery.crops[row]).resize((inner, inner), Image.Resampling.BICUBIC)
    out = Image.new("RGB", (side, side), rgb(class_colour(int(gallery.labels[row]))))
    out.paste(crop, (frame, frame))
    return out


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
