"""UNI's linear probe: a norm as penalty, full-batch L-BFGS (mahmoodlab/UNI, linear probe code)."""

import logging
from typing import TYPE_CHECKING

import numpy as np

from eval.probes import Outcome, Part, Protocol

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ITERATIONS = 1000


def uni(
    train: Part,
    val: Part,
    test: Part,
    *,
    classes: int,
    protocol: Protocol = "default",
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """The logistic regression of UNI's released code, on raw features, fitted on train alone.

    It minimises mean cross-entropy + (1/C) · 0.5 · ||W||_2: the Frobenius norm of the weights
    [K, d], NOT squared, biases free, C = d · K / 100 for the K classes that train has. (Its option
    `use_sklearn` is another problem.) A class without a train nucleus scores 0.

    Both protocols are the same: nothing is chosen and val is only scored. UNI's script adds val to
    train where there is one; the mitosis benchmark, which uses this probe, gives it none.

    Returns:
        Probabilities float32 [n, classes] of val and test; params: C, iterations, chosen_on.
    """
    del protocol, seed
    import torch

    present, labels = np.unique(train.label, return_inverse=True)
    weight, bias, found = fit(train.x, labels.reshape(-1), device=device)
    scores = []
    for part in (val, test):
        x = torch.from_numpy(np.ascontiguousarray(part.x, np.float32)).to(device)
        out = np.zeros((len(part), classes), np.float32)
        out[:, present] = torch.addmm(bias, x, weight.T).softmax(1).cpu().numpy()
        scores.append(out)
    return Outcome(scores[0], scores[1], {**found, "chosen_on": "nothing"})


def fit(
    x: np.ndarray, labels: np.ndarray, *, device: str = "cpu"
) -> tuple["torch.Tensor", "torch.Tensor", dict[str, float | int | str]]:
    """Minimise the formula for features [n, d] and labels [n] of 0 … K-1, each of which occurs.

    torch's L-BFGS, strong Wolfe search, its own tolerances, at most 1000 iterations, float32, from
    W = 0 as in UNI's code. The norm has no gradient there (torch takes the subgradient 0) and pulls
    with the constant force 0.5 / C elsewhere. So W = 0 is the minimum wherever the gradient of the
    cross-entropy at W = 0 and the best biases is no longer than that: few features, of small scale,
    or useless ones. This is tested first, since the line search finds no step down in that case; a
    warning says that every nucleus gets the same scores. For the same reason biases start at their
    best for W = 0 (log of the class shares), not at 0: the problem is convex, the minimum the same.

    Returns:
        Weights [K, d], biases [K], and C and iterations.
    """
    import torch
    from torch.nn.functional import cross_entropy

    data = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device)
    target = torch.from_numpy(labels.astype(np.int64)).to(device)
    share = torch.bincount(target) / len(target)
    weight = torch.zeros(len(share), data.shape[1], device=device, requires_grad=True)
    bias = share.log().requires_grad_()
    c = data.shape[1] * len(share) / 100
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = cross_entropy(torch.addmm(bias, data, weight.T), target)
        value = value + 0.5 / c * weight.norm()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    loss()
    assert weight.grad is not None
    iterations = 0
    if float(weight.grad.norm()) <= 0.5 / c:
        log.warning("uni: its penalty holds all weights at 0; every nucleus gets the same scores")
    else:
        optimiser.step(loss)  # type: ignore[no-untyped-call]
        iterations = int(optimiser.state[weight]["n_iter"])
    return weight.detach(), bias.detach(), {"C": c, "iterations": iterations}
