"""Correlations per gene and slide, their intervals and comparisons, against plain loops."""

import logging

import numpy as np
import pytest
from scipy import stats

from eval import regression
from lemon_muse.errors import RunError

S, G = 6, 7


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets and predictions float32 [n, G] of slides with unlike levels and sizes; owners."""
    rng = np.random.default_rng(0)
    owner = rng.permutation(np.repeat(np.arange(S), [5, 30, 12, 80, 2, 41]))
    level = rng.normal(0, 3, (S, G))[owner]
    targets = (level + rng.normal(size=(len(owner), G))).astype(np.float32)
    predicted = (0.4 * targets - level + rng.normal(size=targets.shape)).astype(np.float32)
    return targets, predicted, owner


def test_pearson_is_scipys_inside_every_slide(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    targets, predicted, owner = case
    values = regression.pearson(targets, predicted, owner, S)
    assert values.shape == (S, G) and values.dtype == np.float64
    for s in range(S):
        rows = owner == s
        for g in range(G):
            expected = stats.pearsonr(
                targets[rows, g].astype(float), predicted[rows, g].astype(float)
            ).statistic
            assert values[s, g] == pytest.approx(expected, abs=1e-9)
    # Levels of slides do not count: over all nuclei at once the sign is another.
    pooled = stats.pearsonr(targets[:, 0], predicted[:, 0]).statistic
    assert pooled < 0 < values[:, 0].mean()


def test_large_offsets_cost_no_precision() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=(500, 1)) + 1e4
    b = a + rng.normal(size=(500, 1))
    owner = np.zeros(500, int)
    expected = stats.pearsonr(a[:, 0], b[:, 0]).statistic
    assert regression.pearson(a, b, owner, 1)[0, 0] == pytest.approx(expected, abs=1e-9)


def test_constant_columns_count_as_zero_and_are_counted(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    targets, predicted, owner = case
    targets[owner == 1, 2] = 0
    predicted[owner == 3, 4] = 0.37
    # As constant as float32 makes it.
    predicted[owner == 3, 5] = 0.37 * (1 + 1e-7 * (np.arange((owner == 3).sum()) % 2))
    with caplog.at_level(logging.WARNING):
        values = regression.pearson(targets, predicted, owner, S)
    flat = regression.constant(targets, predicted, owner, S)
    assert [*zip(*np.nonzero(flat), strict=True)] == [(1, 2), (3, 4), (3, 5)]
    assert (values[flat] == 0).all() and (values[~flat] != 0).all()
    assert f"3 of {S * G}" in caplog.text


def test_a_slide_of_one_nucleus_has_no_correlation() -> None:
    rng = np.random.default_rng(2)
    owner = np.array([0, 1, 1, 1])
    values = regression.pearson(rng.normal(size=(4, 2)), rng.normal(size=(4, 2)), owner, 2)
    assert (values[0] == 0).all() and (values[1] != 0).all()


def test_what_cannot_be_scored_is_refused(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    targets, predicted, owner = case
    broken = predicted.copy()
    broken[3, 1] = np.nan
    with pytest.raises(RunError, match=r"1 of .* predictions are not finite"):
        regression.pearson(targets, broken, owner, S)
    with pytest.raises(ValueError, match="do not fit"):
        regression.pearson(targets, predicted[:, :-1], owner, S)
    with pytest.raises(ValueError, match="each with one or more"):
        regression.pearson(targets, predicted, owner, S + 1)


def test_intervals_are_those_of_a_loop_over_drawn_patients() -> None:
    rng = np.random.default_rng(3)
    values = rng.uniform(-0.2, 0.6, (S, G))
    patient = np.array(["a", "b", "b", "c", "d", "c"])
    genes = [f"gene{g}" for g in range(G)]
    found = regression.intervals(values, genes, patient=patient, draws=300, seed=5)
    assert set(found) == {"pearson", *(f"pearson/{gene}" for gene in genes)}
    assert found["pearson"].value == pytest.approx(values.mean())
    assert found["pearson/gene4"].value == pytest.approx(values[:, 4].mean())
    # The same draws, one after another.
    people = np.unique(patient)
    chosen = np.random.default_rng(5).integers(0, len(people), (300, len(people)))
    means, fourth = [], []
    for draw in chosen:
        slides = [s for k in draw for s in np.flatnonzero(patient == people[k])]
        means.append(np.mean([values[s].mean() for s in slides]))
        fourth.append(np.mean([values[s, 4] for s in slides]))
    for name, drawn in (("pearson", means), ("pearson/gene4", fourth)):
        low, high = np.percentile(drawn, [2.5, 97.5])
        assert found[name].low == pytest.approx(low) and found[name].high == pytest.approx(high)


def test_slides_of_one_patient_widen_the_interval() -> None:
    rng = np.random.default_rng(4)
    values = np.repeat(rng.uniform(0, 1, (6, 1)), 2, axis=0)
    pairs = np.repeat(np.arange(6), 2)
    apart = regression.intervals(values, ["g"])["pearson"]
    together = regression.intervals(values, ["g"], patient=pairs)["pearson"]
    assert together.high - together.low > 1.2 * (apart.high - apart.low)
    single = regression.intervals(values, ["g"], patient=np.zeros(12))["pearson"]
    assert single.value == apart.value and np.isnan([single.low, single.high]).all()


def test_the_paired_difference_follows_the_convention_of_the_bootstrap() -> None:
    rng = np.random.default_rng(6)
    a = rng.uniform(0, 1, (S, G))
    b = a - rng.normal(0.02, 0.03, (S, G))
    found = regression.paired_difference(a, b, 7, draws=400)["pearson"]
    gain = (a - b).mean(1)
    drawn = gain[np.random.default_rng(7).integers(0, S, (400, S))].mean(1)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    assert found["difference"] == pytest.approx(gain.mean())
    assert found["ci_low"] == pytest.approx(np.percentile(drawn, 2.5))
    assert found["ci_high"] == pytest.approx(np.percentile(drawn, 97.5))
    assert found["p"] == pytest.approx(min(1, 2 * (tail + 1) / 401))
    back = regression.paired_difference(b, a, 7, draws=400)["pearson"]
    assert back["difference"] == -found["difference"] and back["p"] == found["p"]


def test_equal_and_clearly_different_encoders() -> None:
    rng = np.random.default_rng(8)
    a = rng.uniform(0, 1, (S, G))
    assert regression.paired_difference(a, a)["pearson"]["p"] == 1
    better = regression.paired_difference(a + 0.1, a)["pearson"]
    assert better["p"] == pytest.approx(2 / 1001) and better["ci_low"] == pytest.approx(0.1)
    alone = regression.paired_difference(a, a - 1, patient=np.zeros(S))["pearson"]
    assert alone["difference"] == pytest.approx(1) and np.isnan(alone["p"])
    with pytest.raises(ValueError, match="same slides"):
        regression.paired_difference(a, a[:-1])
