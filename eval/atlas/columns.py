"""What the page knows of each nucleus: columns of classes and of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MOST_COLUMNS = 24  # of those that were not asked for by name
MOST_LABELS = 40
REST = "(others)"
MISSING = "(not known)"
FIRST = ("type", "slide", "patient", "cluster", "score")
PLACES = ("x_px", "y_px", "x_um", "y_um")
_NO_COLOUR = 2  # a class column in which nearly every nucleus has its own value is a name


@dataclass(frozen=True)
class Column:
    """One column of the page.

    Attributes:
        name: as in the file.
        values: int32 codes [n] of a class column (-1 where not known), else float32 [n] with NaN.
        labels: names of the codes, most frequent first; None for a column of numbers.
        shown: labels that have a colour of their own; the others share one.
        menu: whether it is offered to colour by.
    """

    name: str
    values: np.ndarray
    labels: tuple[str, ...] | None
    shown: int
    menu: bool


def columns(obs: Any, clusters: np.ndarray | None, wanted: Sequence[str]) -> list[Column]:
    """The columns of a page, those to colour by first, in the order of the menu.

    Args:
        obs: pandas DataFrame [n].
        clusters: int64 [n], numbers from the largest cluster down; None to take obs['cluster'].
        wanted: what the menu offers; all that fits when empty.
    """
    obs = obs.copy()
    if clusters is not None:
        obs["cluster"] = [str(c) for c in clusters]
    names = [*(n for n in FIRST if n in obs), *(n for n in obs if n not in (*FIRST, *PLACES))]
    if not wanted:
        names = [n for n in names[:MOST_COLUMNS] if not _is_a_name(obs[n])]
    menu = list(wanted) or names
    rest = [n for n in (*FIRST, *PLACES) if n in obs and n not in menu]
    made = [column(str(n), obs[n], menu=n in menu) for n in (*menu, *rest)]
    # A column of classes that is empty throughout, such as types that nobody knows, is no colour.
    return [replace(c, menu=c.menu and c.labels != ()) for c in made]


def column(name: str, values: Any, *, menu: bool) -> Column:
    """One column of a DataFrame: numbers stay numbers, all else becomes classes."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    if is_numeric_dtype(values) and not is_bool_dtype(values) and name != "cluster":
        return Column(name, values.to_numpy(np.float32, na_value=np.nan), None, 0, menu)
    known = values.notna().to_numpy()
    words = values.astype(object).where(known, "").astype(str).to_numpy()
    known &= words != ""
    found, code, counts = np.unique(words[known], return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    if all(word.isdigit() for word in found):
        order = np.argsort([int(word) for word in found], kind="stable")
    rank = np.empty(len(found), np.int32)
    rank[order] = np.arange(len(found))
    codes = np.full(len(words), -1, np.int32)
    codes[known] = rank[code]
    labels = tuple(str(found[i]) for i in order)
    shown = len(labels) if len(labels) <= MOST_LABELS else MOST_LABELS - 1
    return Column(name, codes, labels, shown, menu)


def _is_a_name(values: Any) -> bool:
    from pandas.api.types import is_numeric_dtype

    if is_numeric_dtype(values) or values.name in FIRST:
        return False
    return bool(values.nunique() > MOST_LABELS and values.nunique() * _NO_COLOUR > len(values))


def span(values: np.ndarray) -> tuple[float, float]:
    """Ends of the colour scale: the 1st and 99th percentile, or the extremes if those are equal."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(finite, [1, 99]))
    if low == high:
        low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + 1
