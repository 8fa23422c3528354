"""Features that know the patient and nothing else are worth nothing, whatever the benchmark."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from eval import plans, probes, regression
from eval.benchmarks import Request, find
from eval.probes import Part
from lemon_muse.data.table import Table
from lemon_muse.synthetic import write_images
from tests.eval.standins import write_brca
from tests.fixtures import hest, midogpp, nucls, ocelot, puma

EACH = 30  # nuclei of a patient: the fixtures have few of some


def _brca(root: Path) -> None:
    write_brca(root)


def _folder(root: Path) -> None:
    write_images(root, slides=9, side=128, seed=1)


def _nucls(root: Path) -> None:
    nucls.write(root)


def _mitosis(root: Path) -> None:
    midogpp.write(root)


def _atypical(root: Path) -> None:
    midogpp.write_ami_br(root)


def _ocelot(root: Path) -> None:
    ocelot.write(root)


def _puma(root: Path) -> None:
    puma.write(root)


CASES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "brcam2c": ("brcam2c", "class", _brca),
    "folder": ("folder", "class", _folder),
    "nucls super": ("nucls", "super", _nucls),
    "nucls raw": ("nucls", "raw", _nucls),
    "midogpp mitosis": ("midogpp", "mitosis", _mitosis),
    "midogpp atypical": ("midogpp", "atypical", _atypical),
    "ocelot": ("ocelot", "class", _ocelot),
    "puma": ("puma", "track1", _puma),
}


def patients_only(table: Table, *, seed: int = 0) -> tuple[np.ndarray, Table]:
    """EACH rows of every patient: its number as features, and labels that follow from it."""
    rng = np.random.default_rng(seed)
    names = np.unique(table.patient)
    rows = np.concatenate(
        [np.resize(np.flatnonzero(table.patient == name), EACH) for name in names]
    )
    code = np.repeat(np.arange(len(names)), EACH)
    # All classes occur on all sides of the split: patients of a split take them in turn.
    turn = np.empty(len(names), np.int64)
    split = np.array([table.split[table.patient == name][0] for name in names])
    for part in np.unique(split):
        mine = np.flatnonzero(split == part)
        turn[mine] = rng.permutation(np.arange(len(mine)) % 2)
    label = np.where(rng.random(len(code)) < 0.95, turn[code], 1 - turn[code])
    # Large, so that neither few epochs nor a penalty hides them.
    x = np.eye(len(names), dtype=np.float32)[code] * 30
    x += rng.normal(size=x.shape).astype(np.float32) * 0.01
    return x, replace(table.take(rows), label=label, classes=("a", "b"))


def score(name: str, x: np.ndarray, table: Table, folds: list[plans.Fold]) -> float:
    """Mean balanced accuracy over folds."""
    values = []
    for fold in folds:
        parts = [
            Part(x[rows], table.label[rows], table.patient[rows])
            for rows in (fold.train, fold.val, fold.test)
        ]
        if len(np.unique(table.label[fold.train])) < 2:
            continue
        if name == "uni":  # of so few features its penalty would hold all weights at 0
            parts = [replace(part, x=part.x * 100) for part in parts]
        found = probes.get(name)(*parts, classes=2, seed=0)
        truth = table.label[fold.test]
        values.append(balanced_accuracy_score(truth, found.test.argmax(1)))
    assert values
    return float(np.mean(values))


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("case", CASES)
def test_the_default_protocol_gives_nothing_for_the_patient(case: str, tmp_path: Path) -> None:
    name, task, write = CASES[case]
    write(tmp_path)
    benchmark, request = find(name), Request(task=task, image_mpp=_mpp(case))
    table = benchmark.load(tmp_path, request)
    x, table = patients_only(table)
    folds = benchmark.folds(table, request)
    assert not plans.shares_patients(table, folds)
    tested = np.concatenate([fold.test for fold in folds])
    assert len(np.unique(tested)) == len(tested)
    leaky = plans.random(table)
    assert plans.shares_patients(table, leaky)
    for probe in ("knn", "logistic", "linear", "uni"):
        # One patient a class is held out at most: what a fold says of it is all or nothing.
        assert abs(score(probe, x, table, folds) - 0.5) < 0.2, probe
        # The same features are worth nearly everything where nuclei are divided at random.
        assert score(probe, x, table, leaky) > 0.85, probe


def _mpp(case: str) -> float | None:
    return 0.25 if case in ("midogpp atypical", "puma") else None


def test_slides_of_one_patient_give_no_genes(tmp_path: Path) -> None:
    ids = ("NCBI783", "NCBI785", "NCBI784", "TENX94", "TENX95", "TENX98")
    hest.write(tmp_path, tuple(i for i in ids if i != "NCBI784"))
    benchmark, request = find("hest"), Request(task="breast")
    table = benchmark.load(tmp_path, request)
    names, code = np.unique(table.patient, return_inverse=True)
    x = np.eye(len(names), dtype=np.float32)[code]
    assert table.targets is not None
    # Expression that differs between patients more than within them.
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(len(names), table.targets.shape[1]))[code]
    targets = (targets + 0.1 * rng.normal(size=targets.shape)).astype(np.float32)
    ridge: Callable[..., list[probes.Outcome]] = probes.get("ridge")  # type: ignore[assignment]

    def pearson(folds: list[plans.Fold]) -> float:
        # Where patients are divided at random, choosing alpha by patient would see through it.
        fixed = {} if folds is honest else {"alphas": (0.01,)}
        found = ridge(x, targets, table.patient, folds, protocol="default", seed=0, **fixed)
        rows = np.concatenate([fold.test for fold in folds])
        predicted = np.concatenate([outcome.test for outcome in found])
        owner = np.zeros(len(rows), np.int64)
        if folds is honest:
            owner = np.unique(table.slide[rows], return_inverse=True)[1]
        return float(regression.pearson(targets[rows], predicted, owner, owner.max() + 1).mean())

    honest = benchmark.folds(table, request)
    assert not plans.shares_patients(table, honest)
    assert abs(pearson(honest)) < 0.05
    assert pearson(plans.random(table)) > 0.8
