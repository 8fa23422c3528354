"""How a table is divided for a measurement: the official split, folds by patient, by group.

Whatever a probe chooses, it chooses on train (and val, where a fold has one); test is read once.
A plan whose train and test share a patient exists for one purpose: to repeat a published figure.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

FOLDS = 5
WORDS = "auto, official, folds, leave_out:GROUP or cross:GROUP"


@dataclass(frozen=True)
class Fold:
    """One division: rows of the table, int64, ascending. `val` may be empty.

    `name` says what is tested ('test', '1 of 5', 'human melanoma'); of a plan 'cross:…' it is the
    group that trains.
    """

    name: str
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def official(table: Table, *, scored: str = "test") -> list[Fold]:
    """The split that the data set states; with scored='val' its val rows are what is tested, and
    nothing is chosen on them."""
    train, val, test = (table.rows(split) for split in ("train", "val", "test"))
    if scored == "val":
        return [Fold(scored, train, val[:0], val)]
    return [Fold(scored, train, val, test)]


def grouped(table: Table, *, by: str = "patient", folds: int = FOLDS, seed: int = 0) -> list[Fold]:
    """Folds that share no value of a column, classes spread evenly; each row is tested once.

    Raises:
        UserError: the column has a single value.
    """
    groups = column(table, by)
    if len(np.unique(groups)) < 2:
        raise UserError(f"every nucleus has the same {by}: there is nothing to hold out.")
    pairs = group_folds(table.label, groups, folds=folds, seed=seed)
    none = np.empty(0, np.int64)
    return [Fold(f"{i + 1} of {len(pairs)}", a, none, b) for i, (a, b) in enumerate(pairs)]


def group_folds(
    labels: np.ndarray, groups: np.ndarray, *, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(fit rows, held-out rows) of each fold, disjoint by group; [] with a single group."""
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(folds, len(np.unique(groups)))
    if count < 2:
        return []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    # A class rarer than the number of folds only makes the stratification approximate.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pairs = list(splitter.split(labels, labels, groups))
    return [(fit_rows, held) for fit_rows, held in pairs if len(fit_rows) and len(held)]


def leave_out(table: Table, by: str) -> list[Fold]:
    """One fold a value of a column: trained on all others, tested on it.

    A patient of the tested value who also has other rows is not trained on.
    """
    groups = column(table, by)
    names = np.unique(groups)
    if len(names) < 2:
        raise UserError(f"every nucleus has the same {by} ({names[0]}): nothing can be left out.")
    none = np.empty(0, np.int64)
    folds = []
    for name in names.tolist():
        held = groups == name
        shared = np.isin(table.patient, np.unique(table.patient[held]))
        train = np.flatnonzero(~held & ~shared)
        if len(train):
            folds.append(Fold(name, train, none, np.flatnonzero(held)))
        else:
            log.warning("%s %s shares its patients with all others and is left out", by, name)
    return folds


def cross(table: Table, by: str, *, seed: int = 0) -> list[Fold]:
    """One fold a value of a column: trained on 80 % of its patients, tested on the rest of it and
    on every other value. A value with a single patient cannot train and is only tested."""
    groups = column(table, by)
    none = np.empty(0, np.int64)
    folds = []
    for name in np.unique(groups).tolist():
        mine = np.flatnonzero(groups == name)
        pairs = group_folds(table.label[mine], table.patient[mine], folds=FOLDS, seed=seed)
        if not pairs:
            log.warning("%s %s has a single patient and is only tested", by, name)
            continue
        train, held = mine[pairs[0][0]], mine[pairs[0][1]]
        shared = np.isin(table.patient, np.unique(table.patient[train]))
        others = np.flatnonzero((groups != name) & ~shared)
        folds.append(Fold(name, train, none, np.sort(np.concatenate([held, others]))))
    if not folds or len(np.unique(groups)) < 2:
        raise UserError(f"cross:{by} needs two values of {by} with two patients or more each.")
    return folds


def random(table: Table, *, folds: int = FOLDS, seed: int = 0) -> list[Fold]:
    """Stratified folds of single nuclei: a patient stands on both sides. For protocol=paper."""
    from sklearn.model_selection import KFold, StratifiedKFold

    kind = StratifiedKFold if table.targets is None else KFold
    splitter = kind(folds, shuffle=True, random_state=seed)
    none = np.empty(0, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pairs = list(splitter.split(np.zeros(len(table)), table.label))
    return [Fold(f"{i + 1} of {folds}", a, none, b) for i, (a, b) in enumerate(pairs)]


def column(table: Table, by: str) -> np.ndarray:
    """The column of that name, str [n].

    Raises:
        UserError: the data set has no such column.
    """
    if by in ("patient", "slide"):
        return getattr(table, by)
    if by not in table.groups:
        known = ", ".join(["patient", "slide", *table.groups])
        raise UserError(f"this data set has no column '{by}'; use one of: {known}.")
    return table.groups[by]


def from_word(word: str, table: Table, *, seed: int) -> list[Fold]:
    """The folds that `plan=` names, beside 'auto', which is the benchmark's own.

    Raises:
        UserError: an unknown word or column, or a table that cannot be divided so.
    """
    kind, _, by = word.partition(":")
    if word == "official":
        if not len(table.rows("train")) or not len(table.rows("test")):
            raise UserError(
                "no nucleus of the train or of the test part is here: fetch the rest of the data "
                "set, or use plan=folds."
            )
        return official(table)
    if kind == "folds":
        return grouped(table, by=by or "patient", seed=seed)
    if kind in ("leave_out", "cross") and by:
        return leave_out(table, by) if kind == "leave_out" else cross(table, by, seed=seed)
    raise UserError(f"plan={word} is not known; use {WORDS}.")


def apart(table: Table, folds: Sequence[Fold]) -> list[Fold]:
    """The folds without what they train or choose on of patients that they test.

    Raises:
        UserError: nothing is left to train on.
    """
    out, left = [], 0
    for fold in folds:
        tested = np.unique(table.patient[fold.test])
        train, val = (
            rows[~np.isin(table.patient[rows], tested)] for rows in (fold.train, fold.val)
        )
        if len(fold.train) and not len(train):
            raise UserError(
                f"every patient who trains is tested too ({fold.name}): nothing is left to train "
                f"on; divide by patient (plan=folds) or, where protocol=paper exists, use it to "
                f"take the division as it is."
            )
        left += len(fold.train) + len(fold.val) - len(train) - len(val)
        out.append(Fold(fold.name, train, val, fold.test))
    if left:
        log.warning("%d nuclei do not train: their patients are tested in the same fold", left)
    return out


def shares_patients(table: Table, folds: Sequence[Fold]) -> bool:
    """Whether any fold trains (or chooses) on a patient that it tests."""
    return any(
        np.isin(
            table.patient[fold.test], table.patient[np.concatenate([fold.train, fold.val])]
        ).any()
        for fold in folds
    )
