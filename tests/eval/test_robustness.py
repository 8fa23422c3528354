"""Purity and robustness index against plain loops, and what must come out of features that encode
one thing alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import robustness, sources
from eval.bootstrap import draw_counts
from eval.plans import Fold
from eval.robustness import (
    Ratio,
    draw_evenly,
    group_accuracy,
    neighbours,
    purity,
    ratio_interval,
)
from eval.stain_shift import stability
from lemon_muse.data.table import Table
from tests.eval.standins import TinyEncoder
from tests.eval.test_stain_shift import stained_images, table_of

# Nuclei of each (class, group): as unequal as in a real data set.
CELLS = {("t", "a"): 900, ("t", "b"): 80, ("l", "a"): 120, ("l", "b"): 400, ("s", "c"): 300}


def nuclei(cells: dict[tuple[str, str], int] = CELLS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """label, group and patient: six patients in each group, shuffled."""
    generator = np.random.default_rng(0)
    rows = [(label, group) for (label, group), n in cells.items() for _ in range(n)]
    label, group = np.array(rows)[generator.permutation(len(rows))].T
    number = generator.integers(0, 6, len(label))
    return label, group, np.array([f"{g}{i}" for g, i in zip(group, number, strict=True)])


def encoding(*columns: np.ndarray, noise: float = 0.05, seed: int = 0) -> np.ndarray:
    """Features of a direction for every value of some columns, and a little noise."""
    generator = np.random.default_rng(seed)
    parts = [generator.normal(0, noise, (len(columns[0]) if columns else 0, 24))]
    for column in columns:
        names, code = np.unique(column, return_inverse=True)
        parts.append(generator.normal(size=(len(names), 24))[code])
    return np.sum(parts, 0).astype(np.float32)


def values(ratios: dict[str, Ratio]) -> dict[str, float]:
    return {name: ratio.value for name, ratio in ratios.items()}


def test_features_of_the_group_alone_and_of_the_class_alone() -> None:
    label, group, patient = nuclei()
    of_group = values(purity(encoding(group), label, group, patient, name="hospital"))
    assert of_group["purity/hospital"] == 1 and of_group["index/hospital"] == 0
    assert of_group["purity/class"] == pytest.approx(of_group["purity/class/chance"], abs=0.25)
    of_class = values(purity(encoding(label), label, group, patient, name="hospital"))
    assert of_class["purity/class"] == 1 and of_class["index/hospital"] == 1
    assert of_class["purity/hospital"] < 0.6
    alone = values(purity(encoding(label), label, None, patient))
    assert alone["purity/class"] == 1 and list(alone) == ["purity/class", "purity/class/chance"]


def test_blind_features_are_at_chance_whatever_the_counts() -> None:
    label, group, patient = nuclei()
    found = []
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(len(label), 24)).astype(np.float32)
        found.append(values(purity(x, label, group, patient)))
    mean = {name: np.mean([one[name] for one in found]) for name in found[0]}
    assert mean["index/group"] == pytest.approx(0.5, abs=0.02)
    assert mean["purity/group"] == pytest.approx(mean["purity/group/chance"], abs=0.01)
    assert mean["purity/class"] == pytest.approx(mean["purity/class/chance"], abs=0.01)
    # The formula without the shares would call these features robust or not by the counts alone.
    assert mean["purity/group/chance"] != pytest.approx(0.5, abs=0.02)


def plain_neighbours(x: np.ndarray, patient: np.ndarray, k: int) -> list[list[int]]:
    unit = [v / np.linalg.norm(v) for v in x.astype(np.float64)]
    out = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if patient[j] != patient[i]]
        out.append(sorted(others, key=lambda j: -float(unit[i] @ unit[j]))[:k])
    return out


def test_everything_equals_a_plain_loop() -> None:
    cells = {
        ("t", "a"): 40,
        ("t", "b"): 9,
        ("l", "a"): 12,
        ("l", "b"): 30,
        ("s", "a"): 3,
        ("s", "b"): 4,
    }
    label, group, patient = nuclei(cells)
    x = encoding(label, group, patient, noise=1.0)
    k, n = 5, len(label)
    sums = {"class": 0.0, "class_chance": 0.0, "group": 0.0, "group_chance": 0.0}
    top = bottom = total = 0.0
    kinds = []
    for i, near in enumerate(plain_neighbours(x, patient, k)):
        pool = [j for j in range(n) if patient[j] != patient[i]]

        def share(rows: list[int], same_class: bool, same_group: bool, i: int = i) -> float:
            hits = [
                (label[j] == label[i]) == same_class and (group[j] == group[i]) == same_group
                for j in rows
            ]
            return sum(hits) / len(rows)

        kinds.append(
            {
                (c, g, where): share(rows, c, g)
                for c in (True, False)
                for g in (True, False)
                for where, rows in (("near", near), ("pool", pool))
            }
        )
    valid = [one[True, False, "pool"] > 0 and one[False, True, "pool"] > 0 for one in kinds]
    for i, one in enumerate(kinds):
        mine = sum(
            ok and label[j] == label[i] and group[j] == group[i] for j, ok in enumerate(valid)
        )
        if not valid[i] or mine < k:
            continue
        weight = 1 / mine
        total += weight
        for where, end in (("near", ""), ("pool", "_chance")):
            same = one[True, True, where]
            sums["class" + end] += weight * (same + one[True, False, where])
            sums["group" + end] += weight * (same + one[False, True, where])
        s, o = one[True, False, "pool"], one[False, True, "pool"]
        so, os = one[True, False, "near"] * o / (s + o), one[False, True, "near"] * s / (s + o)
        top, bottom = top + weight * so, bottom + weight * (so + os)
    found = values(purity(x, label, group, patient, k=k))
    assert found["purity/class"] == pytest.approx(sums["class"] / total)
    assert found["purity/class/chance"] == pytest.approx(sums["class_chance"] / total)
    assert found["purity/group"] == pytest.approx(sums["group"] / total)
    assert found["purity/group/chance"] == pytest.approx(sums["group_chance"] / total)
    assert found["index/group"] == pytest.approx(top / bottom)
    assert 0.1 < found["index/group"] < 0.9


def test_with_two_classes_and_groups_in_equal_numbers_it_is_the_published_index() -> None:
    label, group, _ = nuclei({(c, g): 60 for c in "tl" for g in "ab"})
    x = encoding(label, group, noise=1.5)
    near = np.array(plain_neighbours(x, np.arange(len(x)), 20))
    same_class, same_group = label[near] == label[:, None], group[near] == group[:, None]
    so, os = (same_class & ~same_group).sum(), (~same_class & same_group).sum()
    found = values(purity(x, label, group, None))
    assert found["index/group"] == pytest.approx(so / (so + os))
    assert found["purity/class/chance"] == pytest.approx(119 / 239)


def test_neighbours_equal_a_plain_search_also_among_equal_rows() -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(90, 5)).astype(np.float32)
    owner = generator.integers(0, 7, 90)
    assert neighbours(x, owner, k=9).tolist() == plain_neighbours(x, owner, 9)
    assert neighbours(x, None, k=9).tolist() == plain_neighbours(x, np.arange(90), 9)
    twins = np.repeat(x[:3], 10, 0)
    near = neighbours(twins, None, k=9)
    for i, row in enumerate(near.tolist()):
        assert i not in row and {j // 10 for j in row} == {i // 10} and len(set(row)) == 9


def test_what_cannot_be_measured_is_left_out() -> None:
    label, group, patient = nuclei()
    x = encoding(label, noise=1.0)
    # Group c has one class alone; with one patient a group has no neighbours of its own.
    ratio = purity(x, label, group, patient)["index/group"]
    assert not ratio.bottom[group == "c"].any() and ratio.bottom[group == "a"].any()
    assert purity(x, label, group, group) == {}
    assert purity(x, label, group, np.full(len(x), "p")) == {}


def test_draws_are_even_over_the_cells() -> None:
    cells = np.repeat(["rare", "some", "many"], [5, 40, 400])
    rows = np.arange(1000, 1445)
    drawn = draw_evenly(cells, rows, most=65, seed=0)
    assert np.all(np.diff(drawn) > 0)
    counts = dict(zip(*np.unique(cells[drawn - 1000], return_counts=True), strict=True))
    assert counts == {"rare": 5, "some": 30, "many": 30}
    assert not np.array_equal(drawn, draw_evenly(cells, rows, most=65, seed=1))
    assert np.array_equal(draw_evenly(cells, rows, most=10_000, seed=0), rows)


def test_the_group_is_told_from_patients_not_seen() -> None:
    _, group, patient = nuclei({("t", "a"): 300, ("t", "b"): 150, ("t", "c"): 150})
    seen = group_accuracy(encoding(group, noise=0.5), group, patient, name="site")
    assert seen["group_accuracy/site"].value > 0.95
    assert seen["group_accuracy/site/chance"].value == pytest.approx(1 / 3)
    # What a patient looks like says nothing about others of the same site.
    none = group_accuracy(encoding(patient, noise=0.5), group, patient, name="site")
    assert none["group_accuracy/site"].value < 0.6
    assert none["group_accuracy/site"].low < 1 / 3 < none["group_accuracy/site"].high
    assert group_accuracy(encoding(group), group, group, name="site") == {}


def test_intervals_resample_patients() -> None:
    generator = np.random.default_rng(0)
    patient = generator.integers(0, 8, 60)
    ratio = Ratio(generator.random(60), 1 + generator.random(60))
    drawn = []
    for counts in draw_counts(8, draws=50, seed=4):
        weight = counts[patient]
        drawn.append((weight * ratio.top).sum() / (weight * ratio.bottom).sum())
    found = ratio_interval(ratio, patient, draws=50, seed=4)
    assert found.value == pytest.approx(ratio.top.sum() / ratio.bottom.sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    assert np.isnan(ratio_interval(ratio, np.zeros(60), seed=0).low)


def test_stability_of_features_that_stay_and_of_those_that_move() -> None:
    label, _, patient = nuclei({("t", "a"): 60, ("l", "a"): 60, ("l", "b"): 40})
    code = np.unique(label, return_inverse=True)[1]
    x = encoding(label, noise=1.0) + 5
    still = values(stability(x, x.copy(), code, patient))
    assert still["cosine"] == pytest.approx(1)
    assert (still["retrieved"], still["vote_changed"], still["nearest_changed"]) == (1, 0, 0)
    other = encoding(label, noise=1.0, seed=9) + 5
    moved = values(stability(x, other, code, patient, k=7))
    assert abs(moved["cosine"]) < 0.2 and moved["retrieved"] < 0.1

    def unit(v: np.ndarray) -> np.ndarray:
        return v / np.linalg.norm(v, axis=1, keepdims=True)

    changed, nearest = [], []
    for i in range(len(x)):
        pool = np.flatnonzero(patient != patient[i])
        near = []
        for query in (x, other):
            similarity = unit(x[pool]) @ unit(query[i : i + 1])[0]
            near.append(code[pool[np.argsort(-similarity)[:7]]])
        votes = [np.bincount(one, minlength=2).argmax() for one in near]
        changed.append(votes[0] != votes[1])
        nearest.append(near[0][0] != near[1][0])
    assert moved["vote_changed"] == pytest.approx(np.mean(changed))
    assert moved["nearest_changed"] == pytest.approx(np.mean(nearest))
    assert 0 < np.mean(changed) < 1
    # Of a single patient the neighbours are all other nuclei.
    alone = values(stability(x, x, code, np.full(len(x), "p")))
    assert (alone["retrieved"], alone["vote_changed"]) == (1, 0)


def grouped_table(folder: Path) -> Table:
    """Nuclei of drawn images of eight patients from two hospitals, in two classes."""
    table = table_of(stained_images(folder, count=8), per_image=80)
    number = np.arange(len(table)) // 80
    groups = {
        "hospital": number % 2,
        "fold": number // 2 % 2,
        "field": number,
        "scanner": 0 * number,
    }
    return replace(table, groups={name: column.astype(str) for name, column in groups.items()})


def test_all_measures_of_an_encoder(tmp_path: Path) -> None:
    table = grouped_table(tmp_path)
    settings: dict[str, Any] = {"workers": 0, "device": "cpu", "batch": 64}
    source = sources.from_encoder(TinyEncoder(), name="tiny", **settings)
    rows = np.arange(len(table))
    folds = [Fold("a", rows[100:], rows[:0], rows[20:100])]
    given: dict[str, Any] = {"benchmark": "b", "version": "1", "folder": tmp_path / "features"}
    found = robustness.measure(source, table, folds=folds, seed=1, **given)
    names = {"purity/class", "purity/class/chance", "stain/cosine", "stain/retrieved"}
    names |= {"stain/vote_changed", "stain/nearest_changed"}
    names |= {"group_accuracy/hospital", "group_accuracy/hospital/chance"}
    names |= {f"purity/{g}{end}" for g in ("hospital", "slide") for end in ("", "/chance")}
    assert set(found) == {*names, "index/hospital", "index/slide"}
    for name, interval in found.items():
        assert 0 <= interval.value <= 1, name
        if not name.startswith("group_accuracy/hospital/"):
            assert interval.low <= interval.value <= interval.high, name
    again = robustness.measure(source, table, folds=folds, seed=1, **given)
    assert str(again) == str(found)  # NaN is not equal to itself
    # Labels are drawn blindly; the stain of an image is its own.
    assert found["purity/class"].value == pytest.approx(
        found["purity/class/chance"].value, abs=0.05
    )
    assert found["purity/slide"].value > 2 * found["purity/slide/chance"].value
    assert found["stain/cosine"].value < 0.9
    assert len(list((tmp_path / "features").glob("*.npy"))) == 2
    assert not list((tmp_path / "features").glob("stained-*"))
    # What occurs in no fold is not looked at: eight images would give another figure.
    whole = [Fold("a", rows, rows[:0], rows[:0])]
    other = robustness.measure(source, table, folds=whole, seed=1, **given)
    assert other["purity/class"] != found["purity/class"]
    majority = sources.floor("majority", size=0, mpp=0.0, seed=0, workers=0)
    assert robustness.measure(majority, table, folds=folds, **given) == {}
