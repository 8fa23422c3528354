"""Down-dated ridge against scikit-learn, fold by fold, and its alpha against plain nested loops."""

import logging
from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from eval import probes
from eval.plans import Fold
from eval.probes.moments import gather, solve
from eval.probes.ridge import GRID, MOST, ridge
from lemon_muse.errors import UserError

NONE = np.empty(0, np.int64)


def data(
    sizes: Sequence[int], *, dim: int, genes: int = 4, seed: int = 0, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of decaying spectrum with an offset of each slide; genes that they explain partly,
    by weights of which each slide has its own share. Rows of the slides are mixed."""
    rng = np.random.default_rng(seed)
    slide = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    z = rng.normal(size=(len(slide), dim)) * np.geomspace(1, 0.1, dim)
    z += (rng.normal(size=(len(sizes), dim)) * 0.3)[slide]
    common = rng.normal(size=(dim, genes))
    own = rng.normal(size=(len(sizes), dim, genes)) * 0.5
    y = z @ common + np.einsum("nd,ndg->ng", z, own[slide]) + noise * rng.normal(size=(1, genes))
    y += noise * rng.normal(size=y.shape) * np.sqrt(dim) / 2
    x = z @ np.linalg.qr(rng.normal(size=(dim, dim)))[0] + 0.2
    return x.astype(np.float32), y.astype(np.float32), np.array([f"S{s:03d}" for s in slide])


def leave_out(slide: np.ndarray, linked: dict[str, str] | None = None) -> list[Fold]:
    """One fold a slide; a slide linked to the tested one is not trained on."""
    folds = []
    for name in np.unique(slide).tolist():
        out = np.isin(slide, [name, (linked or {}).get(name, name)])
        folds.append(Fold(name, np.flatnonzero(~out), NONE, np.flatnonzero(slide == name)))
    return folds


def of_scikit_learn(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, alpha: float
) -> np.ndarray:
    model = make_pipeline(StandardScaler(), Ridge(alpha=alpha, solver="svd"))
    model.fit(x[train].astype(np.float64), y[train].astype(np.float64))
    return np.asarray(model.predict(x[test].astype(np.float64)))


def assert_equal_to_scikit_learn(
    x: np.ndarray, y: np.ndarray, slide: np.ndarray, folds: Sequence[Fold], ratio: float
) -> None:
    for fold, found in zip(folds, ridge(x, y, slide, folds, alphas=[ratio]), strict=True):
        alpha = ratio * len(fold.train)
        assert found.params["alpha"] == pytest.approx(alpha)
        assert found.test.dtype == np.float32 and found.val.shape == (0, y.shape[1])
        theirs = of_scikit_learn(x, y, fold.train, fold.test, alpha)
        np.testing.assert_allclose(found.test, theirs, rtol=1e-6, atol=1e-6 * theirs.std())


@pytest.mark.parametrize(
    ("sizes", "dim"),
    [((120, 90, 150, 60), 24), ((3, 700, 11, 1, 40), 24), ((12, 15, 9, 20), 90)],
    ids=["alike", "very unequal", "more features than rows"],
)
@pytest.mark.parametrize("ratio", [1e-4, 0.3])
def test_leave_one_slide_out_equals_scikit_learn(
    sizes: tuple[int, ...], dim: int, ratio: float
) -> None:
    x, y, slide = data(sizes, dim=dim)
    assert_equal_to_scikit_learn(x, y, slide, leave_out(slide), ratio)


def test_linked_slides_and_random_folds_equal_scikit_learn() -> None:
    x, y, slide = data((80, 70, 90, 60, 50), dim=16)
    folds = leave_out(slide, {"S001": "S002", "S002": "S001"})
    # A fold that cuts through slides, and one that tests rows which nobody trains on.
    shuffled = np.random.default_rng(0).permutation(len(x))
    folds.append(Fold("random", np.sort(shuffled[:200]), NONE, np.sort(shuffled[200:])))
    only = np.flatnonzero(slide == "S000")
    folds.append(Fold("within", only[:40], NONE, only[40:]))
    assert_equal_to_scikit_learn(x, y, slide, folds, 1e-3)


def test_constant_columns_and_large_offsets_equal_scikit_learn() -> None:
    x, y, slide = data((120, 90, 150, 60), dim=12)
    x[:, 2] += 1e4
    x[:, 5] = 1e4 + 0.1  # constant everywhere
    x[:, 7] = np.where(slide == "S001", x[:, 7], 3.3)  # constant unless S001 trains
    y[:, 1] += 1e4
    y[:, 2] = np.where(slide == "S003", y[:, 2], 0.7)
    assert_equal_to_scikit_learn(x, y, slide, leave_out(slide), 1e-3)


def test_a_slide_of_a_far_larger_scale_costs_the_other_folds_no_digits() -> None:
    x, y, slide = data((120, 90, 150, 60), dim=12)
    x[slide == "S002"] *= 3e7
    y[slide == "S002", 0] *= 1e8
    # Tested once itself and, linked to S000, left out of its fold too.
    folds = [f for f in leave_out(slide, {"S000": "S002"}) if f.name != "S003"]
    assert_equal_to_scikit_learn(x, y, slide, folds, 1e-3)


def test_a_column_of_rounding_noise_counts_for_nothing() -> None:
    x, y, slide = data((40, 30, 50), dim=6)
    noisy = np.concatenate([x, x[:, :1]], 1)
    noisy[:, 6] = 1e4 + 0.001 * np.sign(x[:, 0])  # a float32 there is exact to 0.001
    folds = leave_out(slide)
    for a, b in zip(ridge(x, y, slide, folds), ridge(noisy, y, slide, folds), strict=True):
        assert a.params == b.params
        np.testing.assert_allclose(a.test, b.test, rtol=1e-5, atol=1e-6)


def test_pearson_from_moments_is_numpys() -> None:
    x, y, slide = data((457, 331, 279), dim=8)
    y = y.astype(np.float64)  # in which the mean of a constant column is rounded
    y[slide != "S002", 1] = 1234.7  # constant where it trains
    y[slide == "S002", 3] = 987.1  # constant where it is judged
    bank = gather(x, y, [np.flatnonzero(slide == name) for name in ("S000", "S001", "S002")])
    fits = solve(bank.pool(np.array([True, True, False])), [0.1, 50.0])
    found = bank.pearson(fits, 2)
    held = slide == "S002"
    for alpha in range(2):
        guess = fits.predict(x[held])[alpha]
        for gene in (0, 2):
            r = np.corrcoef(guess[:, gene], y[held, gene])[0, 1]
            assert found[alpha, gene] == pytest.approx(r, abs=1e-6)
    assert not found[:, [1, 3]].any()


def chosen_by_loops(
    x: np.ndarray, y: np.ndarray, part: np.ndarray, train: np.ndarray, ratios: Sequence[float]
) -> tuple[float, np.ndarray]:
    """Each part of the train rows is held out; Pearson by numpy, nucleus by nucleus."""
    values = np.zeros(len(ratios))
    for held in np.unique(part[train]):
        fit, judge = train[part[train] != held], train[part[train] == held]
        for i, ratio in enumerate(ratios):
            guess = of_scikit_learn(x, y, fit, judge, ratio * len(fit))
            for gene in range(y.shape[1]):
                still = y[judge, gene].std() < 1e-6 or guess[:, gene].std() < 1e-12
                r = 0.0 if still else np.corrcoef(guess[:, gene], y[judge, gene])[0, 1]
                values[i] += r / y.shape[1] / len(np.unique(part[train]))
    return ratios[int(np.argmax(values))], values


def test_alpha_is_the_one_that_nested_loops_of_scikit_learn_choose() -> None:
    x, y, slide = data((30, 25, 40, 15, 20), dim=20, noise=0.5)
    y[slide == "S004", 0] = 0  # a gene that a slide does not express
    ratios = [1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0]
    folds = leave_out(slide, {"S001": "S003", "S003": "S001"})
    chosen = set()
    for fold, found in zip(folds, ridge(x, y, slide, folds, alphas=ratios), strict=True):
        best, values = chosen_by_loops(x, y, slide, fold.train, ratios)
        assert found.params["alpha_per_nucleus"] == pytest.approx(best)
        assert found.params["chosen_on"] == f"{len(set(slide[fold.train]))} folds of train groups"
        theirs = of_scikit_learn(x, y, fold.train, fold.test, best * len(fold.train))
        np.testing.assert_allclose(found.test, theirs, rtol=1e-6, atol=1e-6 * theirs.std())
        assert np.sort(values)[-1] - np.sort(values)[0] > 0.02
        chosen.add(best)
    # Folds differ, and an end of the grid is not all there is.
    assert len(chosen) > 1 and chosen & set(ratios[1:-1])


def test_many_patients_are_held_out_several_at_a_time() -> None:
    x, y, patient = data([6] * 90, dim=10)
    ids = np.unique(patient, return_inverse=True)[1]
    fold_of = np.random.default_rng(1).permutation(np.arange(90) % 5)[ids]
    folds = [
        Fold(str(i), np.flatnonzero(fold_of != i), NONE, np.flatnonzero(fold_of == i))
        for i in range(5)
    ]
    for fold, found in zip(folds, ridge(x, y, patient, folds), strict=True):
        assert found.params["chosen_on"] == f"{MOST * 4 // 5} folds of train groups"
        alpha = float(found.params["alpha"])
        theirs = of_scikit_learn(x, y, fold.train, fold.test, alpha)
        np.testing.assert_allclose(found.test, theirs, rtol=1e-6, atol=1e-6 * theirs.std())


def test_the_choice_reads_nothing_of_the_test_slide() -> None:
    x, y, slide = data((30, 25, 40, 20), dim=20)
    folds = [fold for fold in leave_out(slide) if fold.name == "S002"]
    first = ridge(x, y, slide, folds)[0]
    turned = np.where((slide == "S002")[:, None], -5 * y + 3, y).astype(np.float32)
    second = ridge(x, turned, slide, [*folds, *leave_out(slide)])[0]
    assert first.params == second.params
    np.testing.assert_allclose(first.test, second.test, rtol=1e-6)


def test_the_paper_protocol_is_scikit_learns_default_alpha() -> None:
    x, y, slide = data((30, 25, 40), dim=20)
    folds = leave_out(slide)
    for fold, found in zip(
        folds, probes.get("ridge")(x, y, slide, folds, protocol="paper"), strict=True
    ):
        assert found.params["alpha"] == 1.0 and found.params["chosen_on"] == "nothing"
        theirs = of_scikit_learn(x, y, fold.train, fold.test, 1.0)
        np.testing.assert_allclose(found.test, theirs, rtol=1e-6, atol=1e-6 * theirs.std())


def test_with_one_train_slide_there_is_nothing_to_choose_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, y, slide = data((30, 25), dim=8)
    with caplog.at_level(logging.WARNING):
        found = ridge(x, y, slide, leave_out(slide))
    assert "single group" in caplog.text
    assert {o.params["alpha_per_nucleus"] for o in found} == {0.01} <= set(GRID)
    assert {o.params["chosen_on"] for o in found} == {"nothing"}


def test_wrong_input_is_told() -> None:
    x, y, slide = data((30, 25, 20), dim=8)
    broken = x.copy()
    broken[17, 3] = np.nan
    with pytest.raises(UserError, match=r"feature of nucleus 17 .* not a finite"):
        ridge(broken, y, slide, leave_out(slide))
    without = y.copy()
    without[4, 0] = np.inf
    with pytest.raises(UserError, match="target of nucleus 4 "):
        ridge(x, without, slide, leave_out(slide))
    with pytest.raises(UserError, match="fold 'all' has no nuclei"):
        ridge(x, y, slide, [Fold("all", NONE, NONE, np.arange(75))])
