"""Metrics against scikit-learn, intervals against a plain loop over the same resamples."""

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)

from eval import bootstrap, metrics

CLASSES = ("a", "b", "c")


def example(
    n: int = 400, *, people: int = 9, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores with ties, and patients of unequal size."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, n, p=[0.6, 0.3, 0.1])
    scores = np.eye(3)[labels] * 0.8 + generator.normal(size=(n, 3))
    patient = np.array([f"p{i}" for i in (generator.random(n) ** 2 * people).astype(int)])
    return labels, np.round(scores, 1), patient


def test_point_values_equal_scikit_learn() -> None:
    labels, scores, patient = example()
    guess = scores.argmax(1)
    matrix = metrics.confusion(labels, guess, classes=3)
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, guess))
    found = bootstrap.intervals(labels, guess, scores, patient, classes=CLASSES, draws=50)
    assert found["accuracy"].value == pytest.approx(accuracy_score(labels, guess))
    assert found["balanced_accuracy"].value == pytest.approx(balanced_accuracy_score(labels, guess))
    assert found["macro_f1"].value == pytest.approx(f1_score(labels, guess, average="macro"))
    per_class = f1_score(labels, guess, average=None)
    for k, name in enumerate(CLASSES):
        assert found[f"f1/{name}"].value == pytest.approx(per_class[k])
    each = [roc_auc_score(labels == k, scores[:, k]) for k in range(3)]
    assert found["auroc"].value == pytest.approx(np.mean(each))


def test_intervals_equal_a_plain_loop_over_the_same_resamples() -> None:
    labels, scores, patient = example(250, people=6)
    guess = scores.argmax(1)
    draws = 120
    names = np.unique(patient)
    counts = bootstrap.draw_counts(len(names), draws=draws, seed=3)
    values: dict[str, list[float]] = {"accuracy": [], "balanced_accuracy": [], "macro_f1": []}
    values |= {"auroc": [], "f1/c": []}
    for row in counts:
        rows = np.concatenate(
            [
                np.flatnonzero(patient == name)
                for name, times in zip(names, row, strict=True)
                for _ in range(int(times))
            ]
        )
        y, z, s = labels[rows], guess[rows], scores[rows]
        present = np.unique(y)
        values["accuracy"].append(accuracy_score(y, z))
        values["balanced_accuracy"].append(np.mean([(z[y == k] == k).mean() for k in present]))
        values["macro_f1"].append(f1_score(y, z, labels=present, average="macro"))
        values["auroc"].append(np.mean([roc_auc_score(y == k, s[:, k]) for k in present]))
        values["f1/c"].append(
            f1_score(y, z, labels=[2], average=None)[0] if 2 in present else np.nan
        )
    found = bootstrap.intervals(
        labels, guess, scores, patient, classes=CLASSES, draws=draws, seed=3
    )
    for name, column in values.items():
        low, high = np.nanpercentile(column, [2.5, 97.5])
        assert found[name].low == pytest.approx(low, abs=1e-9), name
        assert found[name].high == pytest.approx(high, abs=1e-9), name


def test_draws_are_of_whole_patients_with_replacement() -> None:
    counts = bootstrap.draw_counts(7, draws=4000, seed=0)
    assert (counts.sum(1) == 7).all()
    # A patient is missing from (1 - 1/7)^7 of the draws.
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 7) ** 7, abs=0.01)
    np.testing.assert_array_equal(counts, bootstrap.draw_counts(7, draws=4000, seed=0))
    assert (counts != bootstrap.draw_counts(7, draws=4000, seed=1)).any()


def test_patients_give_wider_intervals_than_nuclei() -> None:
    generator = np.random.default_rng(0)
    patient = np.repeat(np.arange(10), 100)
    labels = generator.integers(0, 2, 1000)
    right = generator.random(1000) < np.linspace(0.3, 0.95, 10)[patient]
    guess = np.where(right, labels, 1 - labels)

    def width(owner: np.ndarray) -> float:
        found = bootstrap.intervals(labels, guess, None, owner, classes=("a", "b"))
        return found["balanced_accuracy"].high - found["balanced_accuracy"].low

    assert width(patient) > 3 * width(np.arange(1000))


def test_an_absent_class_is_left_out_of_the_means() -> None:
    labels = np.array([0, 0, 1, 1])
    guess = np.array([0, 2, 1, 1])
    scores = np.eye(3)[guess]
    found = bootstrap.intervals(
        labels, guess, scores, np.array([0, 1, 2, 3]), classes=CLASSES, draws=20
    )
    assert found["balanced_accuracy"].value == pytest.approx((0.5 + 1) / 2)
    assert found["macro_f1"].value == pytest.approx((2 / 3 + 1) / 2)
    assert "f1/c" not in found
    assert found["auroc"].value == pytest.approx((0.75 + 1) / 2)


def test_paired_difference_equals_a_plain_loop() -> None:
    labels, scores, patient = example(300, people=8)
    generator = np.random.default_rng(5)
    first = scores.argmax(1)
    second = np.where(generator.random(300) < 0.2, generator.integers(0, 3, 300), first)
    found = bootstrap.paired_difference(first, second, labels, patient, draws=200, seed=2)
    names = np.unique(patient)
    differences = []
    for row in bootstrap.draw_counts(len(names), draws=200, seed=2):
        weight = row[np.searchsorted(names, patient)]
        recalls = [
            [
                ((guess == k) & (labels == k)) @ weight / ((labels == k) @ weight)
                for k in range(3)
                if (labels == k) @ weight
            ]
            for guess in (first, second)
        ]
        differences.append(np.mean(recalls[0]) - np.mean(recalls[1]))
    values = np.array(differences)
    one = found["balanced_accuracy"]
    assert one["difference"] == pytest.approx(
        balanced_accuracy_score(labels, first) - balanced_accuracy_score(labels, second)
    )
    assert one["ci_low"] == pytest.approx(np.percentile(values, 2.5))
    assert one["ci_high"] == pytest.approx(np.percentile(values, 97.5))
    tail = min((values <= 0).sum(), (values >= 0).sum())
    assert one["p"] == pytest.approx(min(1, 2 * (tail + 1) / 201))
    assert found["macro_f1"]["difference"] == pytest.approx(
        f1_score(labels, first, average="macro") - f1_score(labels, second, average="macro")
    )


def test_a_single_patient_has_no_interval() -> None:
    labels, scores, _ = example(50)
    guess, alone = scores.argmax(1), np.zeros(50, int)
    found = bootstrap.intervals(labels, guess, scores, alone, classes=CLASSES, draws=20)
    assert np.isnan(found["accuracy"].low) and np.isnan(found["accuracy"].high)
    assert found["accuracy"].value == pytest.approx(accuracy_score(labels, guess))
    pair = bootstrap.paired_difference(guess, labels, labels, alone, draws=20)
    assert np.isnan(pair["macro_f1"]["p"]) and pair["macro_f1"]["difference"] < 0


def test_a_classifier_does_not_differ_from_itself() -> None:
    labels, scores, patient = example()
    guess = scores.argmax(1)
    found = bootstrap.paired_difference(guess, guess, labels, patient, draws=100)
    for value in found.values():
        assert value == {"difference": 0.0, "ci_low": 0.0, "ci_high": 0.0, "p": 1.0}
