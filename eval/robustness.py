"""How much of a feature is hospital, scanner or stain: a nucleus-level PathoROB.

PathoROB (Kömen et al., "Towards Robust Foundation Models for Digital Pathology", arXiv 2507.17845;
github.com/bifold-pathomics/PathoROB) asks of the k nearest neighbours of a patch how many share its
class but not its centre (SO) and how many its centre but not its class (OS):

    robustness index = SO / (SO + OS), summed over all patches; neighbours of the own slide left out

It holds as many patches of every class from every centre. Nuclei of real data sets do not come so.
Here, for nucleus i and its k neighbours among the nuclei of other patients, with s_i and o_i the
shares of SO and OS among ALL nuclei of other patients (what neighbours drawn blindly would show):

    index = Σ w_i SO_i o_i / (s_i + o_i)  /  Σ w_i (SO_i o_i + OS_i s_i) / (s_i + o_i)

where w_i makes every (class, group) cell weigh the same. Blind features have 0.5, whatever the
counts; features of the class alone 1, of the group alone 0. With two classes and two groups in
equal numbers it is PathoROB's.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.bootstrap import DRAWS, LEVEL, Interval, draw_counts, intervals
from eval.plans import Fold, group_folds
from eval.probes import Part
from eval.probes.knn import unit_rows
from eval.sources import Source
from lemon_muse.data.table import Table

log = logging.getLogger(__name__)

VERSION = "1"
K = 20
MOST = 20_000  # nuclei of a measurement
FOLDS = 5
# The accuracy is flat around the best C.
GRID = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Ratio:
    """A weighted mean over nuclei, Σ top / Σ bottom, float64 [n] each."""

    top: np.ndarray
    bottom: np.ndarray

    @property
    def value(self) -> float:
        return float(self.top.sum() / self.bottom.sum())


def measure(
    source: Source,
    table: Table,
    *,
    folds: Sequence[Fold],
    benchmark: str,
    version: str,
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Interval]:
    """Every robustness measure of a source, with 95 % intervals over patients.

    purity/class, purity/<group>, index/<group>, group_accuracy/<group> (all but the index with a
    /chance) and stain/… (`eval.stain_shift`). For `slide` nuclei of the same patient count: it
    tells how alike those of a slide are, shared surroundings included.

    Args:
        source: {} where it has no features.
        table: of classes; its `groups` are measured that have a value with two patients, except
            'fold'; an empty string is an unknown value.
        folds: rows that occur in no fold are left out.
        folder: of cached features; stained copies of images stand in it while they are needed.

    Raises:
        UserError, RunError: an image cannot be read, features are not finite.
    """
    from eval import stain_shift

    if source.features is None:
        return {}
    x = source.load(table, benchmark=benchmark, version=version, folder=folder)
    used = np.unique(np.concatenate([r for f in folds for r in (f.train, f.val, f.test)]))
    found: dict[str, Interval] = {}
    rows = draw_evenly(table.label[used], used, most=MOST, seed=seed)
    patient = table.patient[rows]
    for metric, ratio in purity(x[rows], table.label[rows], None, patient).items():
        found[metric] = ratio_interval(ratio, patient, seed=seed)
    for name, group in {**table.groups, "slide": table.slide}.items():
        known = used[group[used] != ""]
        values, pairs = len(np.unique(group[known])), _codes(group[known], table.patient[known])
        # Of a value with one patient there are no others to be near to.
        if name == "fold" or values < 2 or (name != "slide" and pairs.max() + 1 == values):
            continue
        cells = _codes(table.label[known], group[known])
        rows = draw_evenly(cells, known, most=MOST, seed=seed)
        patient = table.patient[rows]
        apart = None if name == "slide" else patient
        ratios = purity(x[rows], table.label[rows], group[rows], apart, name=name)
        # Purity of the class is measured once, over the rows of all groups.
        for metric in [m for m in ratios if m not in found]:
            found[metric] = ratio_interval(ratios[metric], patient, seed=seed)
        if name != "slide":
            given = x[rows], group[rows], patient
            found |= group_accuracy(*given, name=name, seed=seed, device=device)
    place: dict[str, Any] = {"benchmark": benchmark, "version": version, "folder": folder}
    return found | stain_shift.measure(source, table, used, seed=seed, **place)


def purity(
    x: np.ndarray,
    label: np.ndarray,
    group: np.ndarray | None,
    patient: np.ndarray | None,
    *,
    name: str = "group",
    k: int = K,
) -> dict[str, Ratio]:
    """What the k nearest neighbours of a nucleus (cosine) share with it.

    Args:
        x: float [n, d].
        label, group: [n], any type; without groups only the classes are looked at.
        patient: [n]; nuclei of the own patient are no neighbours. None: only the nucleus itself.

    Returns:
        purity/class, purity/<name>: mean share of neighbours of the own class, group; with
        /chance: that of neighbours drawn blindly; index/<name>: see the module. Empty where no
        nucleus counts: it must be possible to have neighbours of the own class in another group
        and of the own group in another class (so a group of one patient does not count), and its
        cell (class, group) must have k such nuclei.
    """
    owner = np.arange(len(x)) if patient is None else np.unique(patient, return_inverse=True)[1]
    pool = len(x) - np.bincount(owner)[owner]
    k = min(k, int(pool.min()))
    if k < 1:
        log.warning("a single patient has all nuclei: there are no neighbours to look at")
        return {}
    near = neighbours(x, owner if patient is not None else None, k=k)
    of_class = _others(_codes(label), owner) / pool
    same_class = label[near] == label[:, None]
    if group is None:
        weight = _even(_codes(label), of_class > 0, least=k)
        return _means(weight, {"purity/class": same_class.mean(1), "purity/class/chance": of_class})
    same_group = group[near] == group[:, None]
    of_group = _others(_codes(group), owner) / pool
    of_both = _others(_codes(label, group), owner) / pool
    s, o = of_class - of_both, of_group - of_both
    weight = _even(_codes(label, group), (s > 0) & (o > 0), least=k)
    if not weight.any():
        log.warning("no group has nuclei of two classes from two patients: no index")
        return {}
    both = np.where(s + o > 0, s + o, 1)
    only_class = (same_class & ~same_group).sum(1) * o / both
    only_group = (~same_class & same_group).sum(1) * s / both
    shares = {"purity/class": same_class.mean(1), "purity/class/chance": of_class}
    shares |= {f"purity/{name}": same_group.mean(1), f"purity/{name}/chance": of_group}
    index = Ratio(weight * only_class, weight * (only_class + only_group))
    # Where all neighbours share both or neither there is no index.
    return _means(weight, shares) | ({f"index/{name}": index} if index.bottom.any() else {})


def neighbours(
    x: np.ndarray, owner: np.ndarray | None, *, k: int, queries: np.ndarray | None = None
) -> np.ndarray:
    """The k nearest rows by cosine that have another owner, nearest first, int64 [n, k].

    Args:
        x: float [n, d].
        owner: int [n], 0 … owners - 1; at least k rows belong to others. None: every row is its
            own owner.
        queries: float [n, d], other features of the same nuclei; x where None.
    """
    import faiss

    metric = faiss.METRIC_INNER_PRODUCT
    order = np.arange(len(x)) if owner is None else np.argsort(owner, kind="stable")
    bank = unit_rows(x[order])
    asked = bank if queries is None else unit_rows(queries[order])
    if owner is None:
        _, near = faiss.knn(asked, bank, k + 1, metric=metric)
        # The row itself need not come first, and may not come at all.
        own = near == order[:, None]
        own[~own.any(1), -1] = True
        return near[~own].reshape(len(x), k).astype(np.int64)
    bounds = np.searchsorted(owner[order], np.arange(int(owner.max()) + 2))
    out = np.empty((len(x), k), np.int64)
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        # An owner's rows stand together, so all others are what is before and what is after.
        values, places = [], []
        for a, b in ((0, low), (high, len(bank))):
            if a < b:
                value, place = faiss.knn(asked[low:high], bank[a:b], min(k, b - a), metric=metric)
                values.append(value)
                places.append(place + a)
        best = np.argsort(-np.concatenate(values, 1), 1, kind="stable")[:, :k]
        out[order[low:high]] = order[np.take_along_axis(np.concatenate(places, 1), best, 1)]
    return out


def draw_evenly(cells: np.ndarray, rows: np.ndarray, *, most: int, seed: int) -> np.ndarray:
    """At most `most` of the rows int [n], ascending: all of a small cell [n], equally many of each
    large one."""
    order = np.random.default_rng(seed).permutation(len(rows))
    code = _codes(cells)[order]
    # Number of a row within its cell: the rows with the smallest numbers are taken.
    by_cell = np.argsort(code, kind="stable")
    first = np.searchsorted(code[by_cell], code[by_cell])
    number = np.empty(len(rows), np.int64)
    number[by_cell] = np.arange(len(rows)) - first
    return np.sort(rows[order[np.argsort(number, kind="stable")[:most]]])


def group_accuracy(
    x: np.ndarray,
    group: np.ndarray,
    patient: np.ndarray,
    *,
    name: str,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Interval]:
    """How well a logistic probe tells the group of patients that it has not seen.

    Balanced accuracy over 5 folds by patient, C chosen inside train, of x float32 [n, d], group and
    patient str [n]. Groups of one patient are left out.
    """
    from eval.probes.logistic import logistic

    pairs = np.unique(np.stack([group, patient], 1).astype(str), axis=0)
    names, people = np.unique(pairs[:, 0], return_counts=True)
    kept = np.flatnonzero(np.isin(group, names[people > 1]))
    x, patient = x[kept], patient[kept]
    names, code = np.unique(group[kept], return_inverse=True)
    if len(names) < 2:
        log.warning("%s: fewer than two of its values have two patients or more", name)
        return {}
    none = Part(x[:0], code[:0], patient[:0])
    guess = np.full(len(kept), -1)
    given: dict[str, Any] = {"classes": len(names), "grid": GRID, "seed": seed, "device": device}
    for train, held in group_folds(code, patient, folds=FOLDS, seed=seed):
        parts = [Part(x[rows], code[rows], patient[rows]) for rows in (train, held)]
        guess[held] = logistic(parts[0], none, parts[1], **given).test.argmax(1)
    at = np.flatnonzero(guess >= 0)
    classes = tuple(names.tolist())
    scored = intervals(code[at], guess[at], None, patient[at], classes=classes, seed=seed)
    chance = Interval(1 / len(names), float("nan"), float("nan"))
    metric = f"group_accuracy/{name}"
    return {metric: scored["balanced_accuracy"], f"{metric}/chance": chance}


def ratio_interval(
    ratio: Ratio, patient: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """A ratio and its 95 % percentile interval over resampled patients [n]."""
    names, owner = np.unique(patient, return_inverse=True)
    if len(names) < 2:
        return Interval(ratio.value, float("nan"), float("nan"))
    counts = draw_counts(len(names), draws=draws, seed=seed)
    top, bottom = (
        counts @ np.bincount(owner, v, minlength=len(names)) for v in (ratio.top, ratio.bottom)
    )
    drawn = np.divide(top, bottom, out=np.full(draws, np.nan), where=bottom > 0)
    tail = (100 - LEVEL) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return Interval(ratio.value, float(low), float(high))


def _codes(*columns: np.ndarray) -> np.ndarray:
    """Equal numbers for rows that agree in all columns, int64 [n], 0 … cells - 1."""
    code = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, number = np.unique(column, return_inverse=True)
        code = code * (int(number.max(initial=0)) + 1) + number
    return np.unique(code, return_inverse=True)[1]


def _others(code: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """How many rows of other owners have the same code, int64 [n]."""
    pair = _codes(code, owner)
    return np.bincount(code)[code] - np.bincount(pair)[pair]


def _means(weight: np.ndarray, shares: dict[str, np.ndarray]) -> dict[str, Ratio]:
    if not weight.any():
        return {}
    return {name: Ratio(weight * share, weight) for name, share in shares.items()}


def _even(cell: np.ndarray, valid: np.ndarray, *, least: int) -> np.ndarray:
    """Weights float64 [n] that sum to 1 in each cell of `least` valid rows or more; else 0."""
    counts = np.bincount(cell, valid)[cell]
    return np.where(valid & (counts >= least), 1 / np.maximum(counts, 1), 0.0)
