"""How tables are divided, and metrics of the parts, against plain loops."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from eval import breakdown, plans
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError


def table(*, n: int = 600, people: int = 20, classes: int = 3, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, people, n)
    name = np.char.add("p", patient.astype(str))
    return Table(
        image=name,
        x=np.zeros(n),
        y=np.zeros(n),
        mpp=np.full(n, 0.25),
        label=rng.integers(0, classes, n),
        patient=name,
        slide=name,
        split=np.full(n, "all"),
        classes=tuple("abc"[:classes]),
        groups={
            "domain": np.array(["lung", "skin", "breast"])[patient % 3],
            "single": np.full(n, "x"),
        },
    )


def people(data: Table, rows: np.ndarray) -> set[str]:
    return set(data.patient[rows].tolist())


def test_folds_test_every_nucleus_once_and_share_no_patient() -> None:
    data = table()
    folds = plans.grouped(data, seed=3)
    assert len(folds) == 5
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested.tolist()) == list(range(len(data)))
    for fold in folds:
        assert not people(data, fold.train) & people(data, fold.test)
        assert len(fold.train) + len(fold.test) == len(data) and not len(fold.val)
        # Classes are spread evenly: a third each.
        share = np.bincount(data.label[fold.test], minlength=3) / len(fold.test)
        assert np.abs(share - 1 / 3).max() < 0.12


def test_leaving_a_group_out_trains_on_all_others() -> None:
    data = table()
    folds = plans.leave_out(data, "domain")
    assert [fold.name for fold in folds] == ["breast", "lung", "skin"]
    for fold in folds:
        assert set(data.groups["domain"][fold.test].tolist()) == {fold.name}
        assert fold.name not in set(data.groups["domain"][fold.train].tolist())
    with pytest.raises(UserError, match="nothing can be left out"):
        plans.leave_out(data, "single")


def test_a_patient_of_two_groups_is_not_on_both_sides() -> None:
    data = table()
    domain = data.groups["domain"].copy()
    mine = np.flatnonzero(data.patient == "p1")
    domain[mine[:5]] = "lung"
    data = Table(**{**vars(data), "groups": {"domain": domain}})
    for fold in [*plans.leave_out(data, "domain"), *plans.cross(data, "domain")]:
        assert not people(data, fold.train) & people(data, fold.test)


def test_a_cross_plan_tests_the_rest_of_its_own_group_and_all_others() -> None:
    data = table()
    domain = data.groups["domain"]
    for fold in plans.cross(data, "domain", seed=1):
        assert set(domain[fold.train].tolist()) == {fold.name}
        own = fold.test[domain[fold.test] == fold.name]
        assert 0.05 < len(own) / (domain == fold.name).sum() < 0.4
        assert len(fold.test) - len(own) == (domain != fold.name).sum()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("official", "use plan=folds"),
        ("leave_out:colour", "use one of: patient, slide, domain, single"),
        ("cross", "is not known"),
        ("sideways", "is not known"),
        ("folds:single", "nothing to hold out"),
        ("cross:single", "two values"),
    ],
)
def test_wrong_plans_are_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plans.from_word(word, table(), seed=0)


def scored(data: Table, folds: list[plans.Fold]) -> list[breakdown.Scored]:
    rng = np.random.default_rng(5)
    out = []
    for fold in folds:
        scores = rng.random((len(fold.test), 3)) + np.eye(3)[data.label[fold.test]] * 0.4
        out.append(breakdown.Scored(fold.name, fold.test, scores / scores.sum(1, keepdims=True)))
    return out


def pairs_in_order(data: Table, parts: list[breakdown.Scored], k: int) -> float:
    """AUROC of class k from the pairs of each fold alone."""
    won = count = 0.0
    for part in parts:
        positive = data.label[part.rows] == k
        pairs = positive.sum() * (~positive).sum()
        if not pairs:
            continue
        won += roc_auc_score(positive, part.scores[:, k]) * pairs
        count += pairs
    return won / count


def test_the_auroc_never_compares_scores_of_two_models() -> None:
    data = table()
    parts = []
    for fold in plans.grouped(data, seed=1):
        # What the majority floor says: the shares of train, which move against those of test.
        share = np.bincount(data.label[fold.train], minlength=3) / len(fold.train)
        parts.append(breakdown.Scored(fold.name, fold.test, np.tile(share, (len(fold.test), 1))))
    found = breakdown.pooled(data, parts, seed=0)["auroc"]
    assert found.value == found.low == found.high == 0.5
    own = scored(data, plans.grouped(data, seed=1))
    # Any constant added to the scores of one model changes nothing.
    moved = [breakdown.Scored(p.name, p.rows, p.scores + number) for number, p in enumerate(own)]
    whole, same = (breakdown.pooled(data, parts, seed=0)["auroc"] for parts in (own, moved))
    assert whole == same


def test_nothing_trains_of_a_patient_that_is_tested() -> None:
    data = table()
    folds = plans.random(data)
    assert plans.shares_patients(data, folds)
    split = np.where(np.arange(len(data)) % 3, "train", "test")
    split[data.patient == "p0"] = "train"
    data = replace(data, split=split)
    given = plans.official(data)
    (fold,) = plans.apart(data, given)
    assert people(data, fold.train) == {"p0"} and np.array_equal(fold.test, given[0].test)
    honest = plans.grouped(data)
    for before, after in zip(honest, plans.apart(data, honest), strict=True):
        assert np.array_equal(before.train, after.train)
    with pytest.raises(UserError, match="nothing is left to train on"):
        plans.apart(data, folds)


def test_nothing_is_chosen_on_val_where_val_is_scored() -> None:
    data = table()
    data = replace(data, split=np.array(["train", "val", "test"])[np.arange(len(data)) % 3])
    (fold,) = plans.official(data, scored="val")
    assert np.array_equal(fold.test, data.rows("val")) and not len(fold.val)


def test_metrics_of_folds_and_groups_equal_scikit_learn() -> None:
    data = table()
    parts = scored(data, plans.grouped(data))
    folds = breakdown.by_fold(data, parts)
    each = [balanced_accuracy_score(data.label[p.rows], p.scores.argmax(1)) for p in parts]
    assert folds["balanced_accuracy/fold_mean"].value == pytest.approx(np.mean(each))
    assert folds["balanced_accuracy/fold_sd"].value == pytest.approx(np.std(each, ddof=1))
    rows = np.concatenate([p.rows for p in parts])
    scores = np.concatenate([p.scores for p in parts])
    groups = breakdown.by_group(data, parts, seed=0)
    assert {name.split("/")[1] for name in groups} == {
        f"domain={d}" for d in ("lung", "skin", "breast")
    }
    for domain in ("lung", "skin", "breast"):
        mine = data.groups["domain"][rows] == domain
        truth, guess = data.label[rows][mine], scores[mine].argmax(1)
        found = groups[f"balanced_accuracy/domain={domain}"]
        assert found.value == pytest.approx(balanced_accuracy_score(truth, guess))
        assert found.low < found.value < found.high
        parted = [p.only(data.groups["domain"][p.rows] == domain) for p in parts]
        expected = np.mean([pairs_in_order(data, parted, k) for k in range(3)])
        assert groups[f"auroc/domain={domain}"].value == pytest.approx(expected)
    whole = breakdown.pooled(data, parts, seed=0)
    truth = data.label[rows]
    expected = f1_score(truth, scores.argmax(1), average="weighted")
    assert whole["weighted_f1"].value == pytest.approx(expected)


def test_a_cross_matrix_has_every_pair_and_its_mean_leaves_the_own_group_out() -> None:
    data = table()
    folds = plans.cross(data, "domain")
    parts = scored(data, folds)
    found = breakdown.crossed(data, parts, by="domain", seed=0)
    domain = data.groups["domain"]
    for part in parts:
        for name in ("lung", "skin", "breast"):
            mine = part.only(domain[part.rows] == name)
            expected = balanced_accuracy_score(data.label[mine.rows], mine.scores.argmax(1))
            assert found[f"balanced_accuracy/{part.name}>{name}"].value == pytest.approx(expected)
    outside = [part.only(domain[part.rows] != part.name) for part in parts]
    truth = np.concatenate([data.label[p.rows] for p in outside])
    guess = np.concatenate([p.scores.argmax(1) for p in outside])
    assert found["accuracy"].value == pytest.approx(float((truth == guess).mean()))
