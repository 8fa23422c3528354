"""The official folds of NuCLS: train_test_splits/fold_<k>_<train|test>.csv, k = 1 … 5.

A file has the columns index, slide_name, hospital, type, fold. Each fold tests the slides of three
or four hospitals and trains on all others, so that neither patient nor hospital is on both sides.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.benchmarks.nucls.files import barcode, read_lines
from eval.plans import Fold
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

FOLDS = 5


@dataclass(frozen=True)
class Folds:
    """The official folds: `tested` says in which fold a slide is tested; empty if not complete.

    `missing` names the files that are not there, `untrained` the slides that a train list lacks.
    """

    tested: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)


def read_folds(root: Path) -> Folds:
    """The official folds; fold 999, a subset for trials, is not read.

    Raises:
        UserError: a file without slide names, a slide that is tested twice, or trained and tested.
    """
    folder = root / "train_test_splits"
    if not folder.is_dir():
        return Folds(missing=[f"{folder.name}/"])
    parts = [(k, part) for k in range(1, FOLDS + 1) for part in ("train", "test")]
    paths = {(k, part): folder / f"fold_{k}_{part}.csv" for k, part in parts}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        return Folds(missing=missing)
    slides = {key: _slides(path) for key, path in paths.items()}
    tested: dict[str, int] = {}
    for k in range(1, FOLDS + 1):
        for slide in slides[k, "test"]:
            if slide in tested or slide in slides[k, "train"]:
                other = f"fold_{tested[slide]}_test" if slide in tested else f"fold_{k}_train"
                raise UserError(
                    f"the slide {slide} stands in fold_{k}_test.csv and in {other}.csv of "
                    f"{folder}; fetch the folder again."
                )
            tested[slide] = k
    untrained = [
        f"{slide} of fold {k}"
        for k in range(1, FOLDS + 1)
        for slide, home in tested.items()
        if home != k and slide not in slides[k, "train"]
    ]
    return Folds(tested, [], untrained)


def _slides(path: Path) -> list[str]:
    lines = read_lines(path)
    header = lines[0][1] if lines else []
    if "slide_name" not in header:
        raise UserError(f"{path} has no column slide_name; fetch the folder again.")
    place = header.index("slide_name")
    found = []
    for line, row in lines[1:]:
        code = barcode(row[place]) if len(row) > place else None
        if code is None:
            raise UserError(f"{path}, line {line}, has no slide such as TCGA-A1-A0SP-DX1.")
        found.append(code[0])
    return found


def official(table: Table) -> list[Fold]:
    """The official folds of a table with the group `fold`, '1' … '5', '' where a slide is in none.

    Raises:
        UserError: the slides of the table are tested in fewer than two folds.
    """
    fold, none = table.groups["fold"], np.empty(0, np.int64)
    found = []
    for k in map(str, range(1, FOLDS + 1)):
        train, test = np.flatnonzero((fold != k) & (fold != "")), np.flatnonzero(fold == k)
        if len(train) and len(test):
            found.append(Fold(f"{k} of {FOLDS}", train, none, test))
        else:
            log.warning("official fold %s has no nucleus here and is left out", k)
    if not found:
        raise UserError(
            "the slides of this folder are of fewer than two official folds; use plan=folds."
        )
    return found
