"""Ridge regression of many targets (genes), alpha chosen inside the train rows of each fold."""

import logging
from collections.abc import Sequence

import numpy as np

from eval.plans import Fold
from eval.probes import Outcome, Protocol
from eval.probes.moments import Bank, gather, solve
from lemon_muse.errors import UserError

Params = dict[str, float | int | str]
log = logging.getLogger(__name__)

# alpha / (train rows), half decades from 1e-5 to 100. Features are standardised: 1 is the mean
# eigenvalue of what alpha is added to, whatever the number of rows.
GRID = tuple(float(f"{10 ** (exponent / 2):.6g}") for exponent in range(-10, 5))
# Where there is nothing to choose on: 1 % of the mean eigenvalue.
FALLBACK = 1e-2
# Of more groups several are held out at a time: the time grows with the square of the number.
MOST = 40


def ridge(
    x: np.ndarray,
    targets: np.ndarray,
    group: np.ndarray,
    folds: Sequence[Fold],
    *,
    protocol: Protocol = "default",
    seed: int = 0,
    device: str = "cpu",
    alphas: Sequence[float] = GRID,
) -> list[Outcome]:
    """Ridge regression on standardised features, alpha chosen inside the train rows of each fold.

    Features are scaled by mean and std of the train rows (columns constant there count for
    nothing), targets are centred, the intercept is not penalised.

    By default every train group is held out once (leave-one-group-out inside train) and the alpha
    with the best Pearson correlation wins: mean over targets, then over held-out groups; a target
    or prediction that is constant in a group counts 0; ties: the larger alpha. Of more than 40
    groups some are held out together. `fold.val` is not used.

    protocol='paper': LEMON says 'ridge regression' and no more, so scikit-learn's default is taken,
    alpha = 1, on standardised features: with 10,000 nuclei a slide hardly a penalty at all.
    (HEST-bench has another probe, for tiles: 256 principal components of standardised features,
    alpha = 100 / (256 · genes), no intercept.)

    Args:
        x: float [n, d]; targets: float [n, G].
        group: [n], what must not be on both sides: patients, or slides of which no two are linked.
        folds: rows of x. Folds whose train rows are no whole groups cost a pass each.
        seed, device: not used: nothing is drawn, and float64 runs on the CPU.
        alphas: alpha / (train rows); a single one is taken as it is.

    Returns:
        One outcome a fold. `test`: predictions float32 [n_test, G]; `val`: empty. params: `alpha`
        as scikit-learn counts it, `alpha_per_nucleus`, and `chosen_on`, in words.

    Raises:
        UserError: a feature or target is not finite; a fold has no train rows.
    """
    del seed, device
    paper = protocol == "paper"
    if min(alphas) <= 0:
        raise ValueError("alphas must be above 0")
    ratios = np.sort(np.asarray([1.0] if paper else alphas, np.float64))
    out: dict[int, Outcome] = {}
    for which, rows, masks in shared_banks(group, folds):
        bank = gather(x, targets, rows)
        places = choose(bank, masks, ratios) if len(ratios) > 1 else [(0, "nothing")] * len(which)
        for number, mask, (place, words) in zip(which, masks, places, strict=True):
            train = bank.pool(mask)
            alpha = 1.0 if paper else float(ratios[place]) * train.n
            predicted = solve(train, [alpha]).predict(x[folds[number].test])[0]
            params: Params = {
                "alpha": alpha,
                "alpha_per_nucleus": alpha / train.n,
                "chosen_on": words,
            }
            out[number] = Outcome(predicted[:0], predicted, params)
    return [out[number] for number in range(len(folds))]


def choose(bank: Bank, masks: Sequence[np.ndarray], ratios: np.ndarray) -> list[tuple[int, str]]:
    """Leave-one-part-out inside the parts that each mask names: place in `ratios`, and how, in
    words. A set of train parts that several folds share (train without a, held out b, is train
    without b, held out a) is solved once."""
    jobs: dict[bytes, list[tuple[int, int]]] = {}
    for number, mask in enumerate(masks):
        for held in np.flatnonzero(mask).tolist() if mask.sum() > 1 else []:
            inner = mask.copy()
            inner[held] = False
            jobs.setdefault(inner.tobytes(), []).append((number, held))
    total = np.zeros((len(masks), len(ratios)))
    for key, uses in jobs.items():
        train = bank.pool(np.frombuffer(key, bool))
        fits = solve(train, ratios * train.n)
        found = {held: bank.pearson(fits, held).mean(1) for held in {held for _, held in uses}}
        for number, held in uses:
            total[number] += found[held]
    out = []
    for values, mask in zip(total, masks, strict=True):
        if mask.sum() > 1:
            best = len(ratios) - 1 - int(np.argmax(values[::-1]))
            out.append((best, f"{mask.sum()} folds of train groups"))
        else:
            best = int(np.argmin(np.abs(np.log(ratios / FALLBACK))))
            told = "train has a single group: nothing to choose on, alpha = %g a nucleus is taken"
            log.warning(told, ratios[best])
            out.append((best, "nothing"))
    return out


def shared_banks(
    group: np.ndarray, folds: Sequence[Fold]
) -> list[tuple[list[int], list[np.ndarray], list[np.ndarray]]]:
    """Which folds can share moments: all that train on whole groups; any other stands alone.

    Returns:
        For each bank its folds, the rows of each of its P parts, and for each fold the parts that
        it trains on, bool [P].

    Raises:
        UserError: a fold has no train rows.
    """
    empty = [fold.name for fold in folds if not len(fold.train)]
    if empty:
        raise UserError(f"fold '{empty[0]}' has no nuclei to train on; choose another plan=.")
    _, ids = np.unique(group, return_inverse=True)
    size = np.bincount(ids)
    counts = np.array([np.bincount(ids[fold.train], minlength=len(size)) for fold in folds])
    whole = ((counts == 0) | (counts == size)).all(1)
    sets = [np.flatnonzero(whole).tolist()] if whole.any() else []
    out = []
    for which in sets + [[number] for number in np.flatnonzero(~whole).tolist()]:
        trained = np.zeros(len(ids), bool)
        for number in which:
            trained[folds[number].train] = True
        rows = np.flatnonzero(trained)
        member = counts[which] > 0
        part = bundles(member, size)
        of_row = part[ids[rows]]
        parts = [rows[of_row == p] for p in range(part.max() + 1)]
        masks = [np.isin(np.arange(len(parts)), part[mine]) for mine in member]
        out.append((which, parts, masks))
    return out


def bundles(member: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Part of each group, int [S]; -1: no fold trains on it.

    Up to 40 groups are a part each. More are bundled, to parts of similar size, as far as all folds
    (bool [F, S]: which trains on which) treat them alike.
    """
    part = np.full(len(size), -1)
    used = np.flatnonzero(member.any(0))
    if len(used) <= MOST:
        part[used] = np.arange(len(used))
        return part
    _, kind = np.unique(member[:, used], axis=1, return_inverse=True)
    first = 0
    for value in range(int(kind.max()) + 1):
        mine = used[kind.reshape(-1) == value]
        count = max(1, MOST * len(mine) // len(used))
        part[mine[np.argsort(-size[mine], kind="stable")]] = first + np.arange(len(mine)) % count
        first += count
    return part
