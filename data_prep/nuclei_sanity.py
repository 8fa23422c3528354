"""Do the points lie on nuclei? A swapped, scaled or shifted detection file is caught here.

The hematoxylin density at the points is compared with that at random places of the tissue: the
share of pairs in which the point is darker (the area under the ROC curve) is about 0.5 for points
that have nothing to do with the slide and 0.75 to 0.95 for nuclei.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.detector import hematoxylin, tissue_mask
from data_prep.nuclei_formats.record import Nuclei
from lemon_muse.data.slides import Slide

THUMBNAIL = 512  # longer side of the picture on which tissue is found, px
SAMPLE = 500  # points looked at
TRIAL = 250  # points looked at for each other reading of the coordinates
SIDE = 4.0  # µm, side of the square over which the density is taken
MPP = 1.0  # it is read from the coarsest level that is as fine, µm per pixel
GOOD = 0.65  # share of darker points from which on nothing is tried
GAIN = 0.1  # by which another reading must be better to be named
SCALES = (0.25, 0.5, 2.0, 4.0)


@dataclass(frozen=True)
class Sanity:
    """What the look at the pixels gave.

    Attributes:
        darker: share of (point, random tissue) pairs in which the point is darker; NaN where there
            is no point or no tissue.
        on_tissue: share of the points that lie on tissue.
        warning: one sentence, or ''.
    """

    darker: float
    on_tissue: float
    warning: str = ""


def check(slide: Slide, found: Nuclei, *, seed: int = 0) -> Sanity:
    """Compare up to 500 points with the pixels under them.

    Args:
        slide: the slide, open.
        found: nuclei as they were read, also those outside the slide.
        seed: of the points and of the random places.
    """
    mask = tissue_mask(slide.thumbnail(THUMBNAIL))
    if not len(found) or not mask.any():
        return Sanity(float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    places = _places(slide, mask, rng)
    chosen = rng.choice(len(found), min(SAMPLE, len(found)), replace=False)
    points = np.stack([found.x, found.y], 1)[chosen]
    # Read in one pass: both lie on the same tiles, more than the slide keeps.
    density = density_at(slide, np.concatenate([places, points]))
    tissue, seen = density[: len(places)], density[len(places) :]
    darker = _darker(seen, tissue)
    share = float(_on(mask, slide, points).mean())
    if darker >= GOOD:
        return Sanity(darker, share)
    readings = _readings(points[:TRIAL], slide)
    trials = density_at(slide, np.concatenate([moved for _, moved in readings]))
    best, says = 0.0, ""
    for (sentence, _), there in zip(readings, np.split(trials, len(readings)), strict=True):
        trial = _darker(there, tissue)
        if trial > best:
            best, says = trial, sentence
    if best >= max(GOOD, darker + GAIN):
        return Sanity(darker, share, says)
    return Sanity(
        darker,
        share,
        f"only {darker:.0%} of the points are darker than random tissue (50% is chance): the "
        f"detections look shifted or belong to another slide",
    )


def density_at(slide: Slide, points: np.ndarray) -> np.ndarray:
    """Mean hematoxylin OD of a small square around each point, float64 [n]; 0 off the slide."""
    out = np.zeros(len(points))
    side = SIDE / slide.mpp
    # A mean needs no resampling: the pixels of the level are taken as they are.
    mpp = slide.mpp * slide.levels[slide.level_for(MPP)][2]
    # Neighbours share tiles, and the slide keeps the last ones.
    for i in np.lexsort((points[:, 0], points[:, 1] // 512)):
        x, y = points[i]
        if 0 <= x < slide.width and 0 <= y < slide.height:
            patch = slide.region(x - side / 2, y - side / 2, side, side, mpp=mpp)
            out[i] = hematoxylin(patch).mean()
    return out


def _places(slide: Slide, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random level-0 positions on tissue, float64 [n, 2]."""
    rows, columns = np.nonzero(mask)
    chosen = rng.integers(len(rows), size=SAMPLE)
    cell = np.stack([columns[chosen], rows[chosen]], 1) + rng.random((SAMPLE, 2))
    return cell * (slide.width / mask.shape[1], slide.height / mask.shape[0])


def _darker(points: np.ndarray, tissue: np.ndarray) -> float:
    """Share of pairs in which the point is darker; half of the equal ones."""
    ordered = np.sort(tissue)
    below, upto = (np.searchsorted(ordered, points, side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(tissue))


def _on(mask: np.ndarray, slide: Slide, points: np.ndarray) -> np.ndarray:
    """Which points lie on tissue, bool [n]."""
    cell = np.floor(points * (mask.shape[1] / slide.width, mask.shape[0] / slide.height))
    there = (cell >= 0).all(1) & (cell < (mask.shape[1], mask.shape[0])).all(1)
    out = np.zeros(len(points), bool)
    column, row = cell[there].astype(int).T
    out[there] = mask[row, column]
    return out


def _readings(points: np.ndarray, slide: Slide) -> list[tuple[str, np.ndarray]]:
    """Other readings of the coordinates, each with what it would say of the file."""
    corner = np.asarray(slide.bounds, np.float64)
    local = points - corner
    readings = [("x and y look swapped", local[:, ::-1] + corner)]
    readings += [
        (f"coordinates look scaled by {factor:g}", local / factor + corner) for factor in SCALES
    ]
    if corner.any():
        readings += [
            (f"the bounds offset {tuple(slide.bounds)} looks missing", points + corner),
            (f"the bounds offset {tuple(slide.bounds)} looks added where it should not be", local),
        ]
    return readings
