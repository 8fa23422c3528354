"""Intervals over patients and seeds against plain loops, scikit-learn and eval's own."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from eval.bootstrap import draw_counts, paired_difference
from launch.study import intervals


def material(seeds: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Labels, predictions of some runs, patients: unequal, one patient without class 2."""
    rng = np.random.default_rng(5)
    patient = np.repeat(["p3", "p1", "p2", "p0"], [30, 11, 24, 15])
    labels = rng.integers(0, 3, len(patient))
    labels[patient == "p1"] %= 2
    runs = []
    for _ in range(seeds):
        wrong = rng.random(len(labels)) < rng.uniform(0.2, 0.5)
        runs.append(np.where(wrong, rng.integers(0, 3, len(labels)), labels))
    return labels, runs, patient


def plain_values(labels: np.ndarray, said: np.ndarray, patient: np.ndarray, draws: int) -> Any:
    """The metrics by scikit-learn on copied nuclei, draw by draw."""
    names = np.unique(patient)
    picks = [np.ones(len(names)), *draw_counts(len(names), draws=draws)]
    out: dict[str, list[float]] = {"balanced_accuracy": [], "macro_f1": []}
    for pick in picks:
        rows = np.concatenate(
            [
                np.tile(np.flatnonzero(patient == n), int(k))
                for n, k in zip(names, pick, strict=True)
            ]
        )
        present = np.unique(labels[rows])
        f1 = f1_score(labels[rows], said[rows], labels=present, average="macro", zero_division=0)
        inside = np.isin(said[rows], present)
        guess = np.where(inside, said[rows], present[0] - 9)  # a class that no nucleus has
        recalls = [float((guess[labels[rows] == k] == k).mean()) for k in present]
        if inside.all():
            assert balanced_accuracy_score(labels[rows], guess) == pytest.approx(np.mean(recalls))
        out["balanced_accuracy"].append(float(np.mean(recalls)))
        out["macro_f1"].append(float(f1))
    return out


@pytest.mark.parametrize("seeds_by", ["t", "bootstrap"])
def test_intervals_are_those_of_a_plain_loop(seeds_by: Any) -> None:
    draws = 150
    labels, runs, patient = material(3)
    for metric in intervals.METRICS:
        mine = np.stack([
            intervals.values(labels, said, patient, classes=3, draws=draws)[metric] for said in runs
        ])  # fmt: skip
        plain = [plain_values(labels, said, patient, draws)[metric] for said in runs]
        assert mine == pytest.approx(np.array(plain), abs=1e-12)
        rng = np.random.default_rng(intervals._SEEDS)
        noise = rng.standard_t(2, draws) if seeds_by == "t" else rng.integers(0, 3, (draws, 3))
        drawn = []
        for d in range(draws):
            column = [plain[s][1 + d] for s in range(3)]
            if seeds_by == "t":
                middle = sum(column) / 3
                variance = sum((v - middle) ** 2 for v in column) / 2
                drawn.append(middle + noise[d] * (variance / 3) ** 0.5)
            else:
                drawn.append(sum(column[s] for s in noise[d]) / 3)
        found = intervals.estimate(mine, seeds_by)
        assert found.value == pytest.approx(np.mean([run[0] for run in plain]))
        assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_with_one_seed_a_difference_is_that_of_eval() -> None:
    labels, (a, b), patient = material(2)
    mine, other = (intervals.values(labels, x, patient, classes=3, draws=1000) for x in (a, b))
    wanted = paired_difference(a, b, labels, patient, classes=3, draws=1000)
    for metric in intervals.METRICS:
        found = intervals.estimate((mine[metric] - other[metric])[None])
        told = wanted[metric]
        assert found.value == pytest.approx(told["difference"])
        assert (found.low, found.high) == pytest.approx((told["ci_low"], told["ci_high"]))
        assert found.p == pytest.approx(told["p"])
        assert found.excludes_zero == (found.low > 0 or found.high < 0)


def test_three_seeds_are_few_and_the_interval_knows_it() -> None:
    """Where seeds alone vary, 't' holds the truth as often as it says; drawing seeds does not."""
    rng = np.random.default_rng(0)
    held = {"t": 0, "bootstrap": 0}
    for _ in range(400):
        runs = np.repeat(rng.normal(size=(3, 1)), 401, axis=1)
        for how in held:
            found = intervals.estimate(runs, how)  # type: ignore[arg-type]
            held[how] += found.low < 0 < found.high
    assert 0.91 < held["t"] / 400 < 0.98
    assert 0.65 < held["bootstrap"] / 400 < 0.82


def test_a_single_patient_has_no_interval() -> None:
    labels, (said,), patient = material(1)
    found = intervals.values(labels, said, np.full(len(patient), "p"), classes=3, draws=100)
    estimate = intervals.estimate(found["macro_f1"][None])
    assert np.isfinite(estimate.value) and np.isnan(estimate.low) and not estimate.excludes_zero
