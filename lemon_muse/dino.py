"""Self-distillation over prototypes: image loss (DINO), nucleus loss (NuLo of MUSE), centres.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021), with the values
of its public reference (facebookresearch/dino, main_dino.py); MUSE (arXiv 2511.05170), eq. 6.
A head gives a bottleneck of length 1; logits are its products with K prototypes, so everything here
takes bottlenecks and prototypes (`heads.DINOHead`). Computed in fp32 whatever the autocast around.
Rank losses are such that their mean over ranks, and the mean gradient that
DistributedDataParallel makes of them, are those of one process with all rows.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from lemon_muse import distributed
from lemon_muse.heads import DINOHead
from lemon_muse.matching import MatchedCrossEntropy, Teacher, match

Reduction = Literal["pair", "sqrt", "nucleus", "sum"]
# A pair has n matched nuclei. It enters the loss with the mean of their cross-entropies times
# n ** inner; the loss is divided by the sum over pairs of n ** outer.
EXPONENTS: dict[str, tuple[float, float]] = {
    "pair": (0.0, 0.0),  # every pair alike
    "sqrt": (0.5, 0.5),
    "nucleus": (1.0, 1.0),  # every matched nucleus alike
    "sum": (1.0, 0.0),  # eq. 6 of MUSE: a sum over nuclei, a mean over pairs
}


class Centre(nn.Module):
    """Running mean of the teacher's logits, the same on all ranks; one for each head.

    Momentum 0.9 as in DINO, but over the all-reduced [sum, weight]: dividing by local rows times
    ranks, as the reference does, drifts apart where ranks hold different numbers of nuclei.
    """

    value: torch.Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(prototypes))

    @torch.no_grad()
    def update(self, total: torch.Tensor, weight: torch.Tensor) -> None:
        """Move towards total / weight of all ranks; unchanged when the weight of all ranks is 0.

        A collective: every rank calls it, with zeros if it has no rows. Call it after the loss has
        used the centre, once an optimiser step.

        Args:
            total: float [K], this rank's weighted sum of logits (`logit_sum`).
            weight: float scalar, the sum of the weights.
        """
        packed = torch.cat([total.double(), weight.double().reshape(1)])
        packed = distributed.sum_over_ranks(packed)
        rows = packed[-1]
        mean = packed[:-1] / torch.where(rows > 0, rows, 1.0)
        moved = self.value * self.momentum + mean * (1 - self.momentum)
        self.value.copy_(torch.where(rows > 0, moved, self.value))


@torch.no_grad()
def logit_sum(
    bottleneck: torch.Tensor, prototypes: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the logits of rows [n, d] (n may be 0), float [K], and the sum of weights.

    Logits are linear in the bottleneck, so no [n, K] is made.
    """
    with torch.autocast(bottleneck.device.type, enabled=False):
        y = _wide(bottleneck)
        weights = y.new_ones(len(y)) if weights is None else weights.to(y)
        return prototypes.to(y) @ (weights @ y), weights.sum()


def nucleus_weights(
    key: torch.Tensor, *, slots: int, reduction: Reduction = "pair"
) -> torch.Tensor:
    """Weight of each nucleus of a view in centre and Sinkhorn, float32 [m]: n ** (inner - 1).

    n is the number of nuclei of its roi in the view: with 'pair' every roi counts the same, else a
    dense lymphoid roi would own the centre.

    Args:
        key: int64 [m], roi * slots + nucleus.
    """
    inner, _ = EXPONENTS[reduction]
    _, group, n = np.unique(key.cpu().numpy() // slots, return_inverse=True, return_counts=True)
    weights = n[group].astype(np.float64) ** (inner - 1)
    return torch.from_numpy(weights.astype(np.float32)).to(key.device)


@torch.no_grad()
def targets(logits: torch.Tensor, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """Teacher distributions softmax((logits - centre) / T), fp32 [n, K], rows sum to 1."""
    with torch.autocast(logits.device.type, enabled=False):
        return ((_wide(logits) - centre) / temperature).softmax(1)


@torch.no_grad()
def sinkhorn_centre(
    bottleneck: torch.Tensor,
    prototypes: torch.Tensor,
    temperature: float,
    *,
    weights: torch.Tensor | None = None,
    iterations: int = 3,
    chunk: int = 1024,
) -> torch.Tensor:
    """The centre [K] with which `targets` gives the Sinkhorn-Knopp assignment over all ranks.

    SwAV's algorithm as in DINOv2 (facebookresearch/dinov2, loss/dino_clstoken_loss.py): from
    exp(logits / T), alternately scale prototypes to equal mass and rows to theirs, rows last. The
    result is diag(a) exp(logits / T) diag(b), whose rows are softmax(logits / T + log b): a centre
    of -T log b says all. In log space: exp(1 / 0.04) squares past fp32 once a prototype is long.

    A collective: every rank calls it with the same `iterations`, with 0 rows if it has none.

    Args:
        bottleneck: float [n, d], the teacher's rows of this rank; n differs between ranks.
        weights: float [n], mass of each row; 1 for all by default.
        chunk: rows whose logits exist at one time; they are made anew in every iteration.
    """
    with torch.autocast(bottleneck.device.type, enabled=False):
        y = _wide(bottleneck)
        w = prototypes.to(y)
        mass = (y.new_ones(len(y)) if weights is None else weights.to(y)).log()
        shift = y.new_zeros(len(w))
        for iteration in range(iterations):
            column = y.new_full((len(w),), -math.inf)
            for start in range(0, len(y), chunk):
                rows = slice(start, start + chunk)
                z = (y[rows] @ w.T).div_(temperature)
                scale = mass[rows]
                if iteration:
                    scale = scale - (z + shift).logsumexp(1)
                column = torch.logaddexp(column, z.add_(scale[:, None]).logsumexp(0))
            column = distributed.logsumexp_over_ranks(column)
            shift = torch.where(column.isneginf(), 0.0, -column)  # no rows anywhere: no centre
            shift -= shift.mean()  # a constant changes no softmax
        return shift * -temperature


def image_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    prototypes: torch.Tensor,
    target: Teacher,
    *,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> dict[str, torch.Tensor]:
    """Cross-entropy between views of an image: mean over (teacher view t, student view s != t).

    Args:
        student: bottleneck of each view, float [B, d] each; the first ones are the teacher's views.
        teacher: bottleneck of the global views, float [B, d] each.
        prototypes: the student's, float [K, d], with gradient.
        target: prototypes, centre and temperature of the teacher.
        temperature: of the student.

    Returns:
        `loss`; and detached: `entropy` of the targets, `kl` = loss - entropy. Chance: `chance(K)`.
    """
    # An image is a roi with one nucleus that every view shows.
    images = len(teacher[0])
    out = nucleus_loss(
        student, teacher, [torch.arange(images)] * len(student), prototypes, target,
        rois=images, slots=1, temperature=temperature, chunk=chunk,
    )  # fmt: skip
    return {name: out[name] for name in ("loss", "entropy", "kl")}


def nucleus_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    prototypes: torch.Tensor,
    target: Teacher,
    *,
    rois: int,
    slots: int,
    temperature: float = 0.1,
    reduction: Reduction = "pair",
    chunk: int = 1024,
) -> dict[str, torch.Tensor]:
    """Cross-entropy between views of a nucleus (NuLo), over all (t, s != t) that both show it.

    The denominator is that of all ranks (at least 1), times the world size, because
    DistributedDataParallel averages gradients. A collective: every rank calls it. Without a single
    match anywhere the loss is 0 and its gradients are zeros, not missing: no rank hangs.

    Args:
        student: bottleneck of the nuclei of each view, float [m_v, d]; m_v may be 0. The first
            views are the teacher's.
        teacher: the same of the global views, float [m_t, d], rows as in `keys`.
        keys: of each view, int64 [m_v], strictly ascending, roi * slots + nucleus with roi in
            [0, rois) counted on this rank; kept on the CPU they cost no waiting for the GPU.
        prototypes: the student's, float [K, d], with gradient.
        target: prototypes, centre and temperature of the teacher.
        reduction: how the (roi, t, s) with n > 0 matches are weighed; see `EXPONENTS`.
        chunk: rows whose logits exist at one time.

    Returns:
        `loss`; and detached, of all ranks: `matched` nuclei, `pairs` with a match, `empty_pairs`
        (share without one); detached, to be averaged over ranks like the loss: `entropy` of the
        targets and `kl` of the student from them, means with the weights of the loss.
    """
    lengths = [len(k) for k in keys]
    if [len(x) for x in student] != lengths or [len(y) for y in teacher] != lengths[: len(teacher)]:
        raise ValueError(
            f"rows of student {[len(x) for x in student]} and teacher {[len(y) for y in teacher]} "
            f"must be those of the keys {lengths}, the teacher's views first"
        )
    inner, outer = EXPONENTS[reduction]
    matches = match(
        keys, len(teacher), slots=slots, rois=rois, inner=inner, outer=outer, chunk=chunk
    )
    device = prototypes.device
    possible = rois * len(teacher) * (len(student) - 1)
    counts = [matches.norm, matches.mass, len(matches.weights), matches.groups, possible]
    packed = torch.tensor(counts, dtype=torch.float64).to(device, non_blocking=True)
    sums = distributed.sum_over_ranks(packed)
    matches = matches.to(device)
    with torch.autocast(device.type, enabled=False):
        x, y, w = _rows(student, matches.student), _rows(teacher, matches.teacher), prototypes
        wide = Teacher(target.prototypes.to(y), target.centre.to(y), target.temperature)
        loss, entropy = MatchedCrossEntropy.apply(x, w.to(x), y, wide, matches, temperature)
    norm, mass, matched, pairs, possible_pairs = sums.to(loss.dtype).unbind()
    scale, mean = (distributed.world() / s.clamp_min(1) for s in (norm, mass))
    return {
        "loss": loss * scale,
        "entropy": entropy * mean,
        "kl": (loss.detach() - entropy) * mean,
        "matched": matched,
        "pairs": pairs,
        "empty_pairs": 1 - pairs / possible_pairs.clamp_min(1),
    }


def cancel_last_layer_gradient(head: DINOHead, step: int, frozen_steps: int) -> None:
    """Leave the prototypes alone in the first steps, as DINO does; call it after clipping.

    Gradients become None: the optimiser then skips the tensors, weight decay and moments included.
    """
    if step < frozen_steps:
        for parameter in head.last_layer.parameters():
            parameter.grad = None


def chance(prototypes: int) -> float:
    """Loss of a student whose logits are all equal: ln K. (11.09 for 65,536.)"""
    return math.log(prototypes)


def _rows(views: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    return _wide(torch.cat(list(views)))[rows]


def _wide(x: torch.Tensor) -> torch.Tensor:
    """fp32; double stays double, for checks."""
    return x if x.dtype == torch.float64 else x.float()
