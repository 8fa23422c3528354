"""Cross-entropy between the views of one thing, for any number of prototypes in bounded memory.

Things (images, nuclei) have integer keys; each view holds one row for some of them. `match` finds
the rows of different views that share a key, on the CPU; `MatchedCrossEntropy` compares them, some
rows at a time: with 65,536 prototypes one row of logits is 0.26 MB, and a step has thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Teacher:
    """What turns a teacher's bottleneck into targets, softmax((bottleneck · prototypes - c) / T).

    `prototypes` float [K, d]; `centre` float [K]: a `dino.Centre`, or what `dino.sinkhorn_centre`
    returns; `temperature` T.
    """

    prototypes: torch.Tensor
    centre: torch.Tensor
    temperature: float


@dataclass(frozen=True)
class Part:
    """A chunk: where its rows and pairs lie in the lists of `Matches`."""

    student: slice
    teacher: slice
    pairs: slice


@dataclass(frozen=True)
class Matches:
    """Which rows are compared, in which order, and how much each comparison counts.

    Rows are counted through the concatenation of the views. `student` and `teacher`, int64, are the
    rows that have a partner; pair p compares row `student[pairs[0, p]]` with `teacher[pairs[1, p]]`
    with `weights[p]`, float64. A group is a (roi, teacher view, student view) with a pair or more.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    pairs: torch.Tensor
    weights: torch.Tensor
    parts: list[Part]
    groups: int
    mass: float  # sum over groups of n ** inner: the sum of `weights`
    norm: float  # sum over groups of n ** outer: what a loss is divided by

    def to(self, device: torch.device) -> "Matches":
        tensors = {name: getattr(self, name) for name in ("student", "teacher", "pairs", "weights")}
        moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items()}
        return Matches(
            **moved, parts=self.parts, groups=self.groups, mass=self.mass, norm=self.norm
        )


def match(
    keys: Sequence[torch.Tensor],
    teachers: int,
    *,
    slots: int,
    rois: int,
    inner: float,
    outer: float,
    chunk: int,
) -> Matches:
    """All pairs (row of teacher view t, row of student view s) with the same key, s != t.

    Args:
        keys: a view's int64 [m], strictly ascending, roi * slots + nucleus; the first `teachers`
            views are the teacher's as well. Best kept on the CPU: elsewhere this waits for them.
        rois: number of rois of this rank.
        inner, outer: a pair of a group of n weighs n ** (inner - 1), a group n ** outer in `norm`.
        chunk: rows of student and teacher in a part; exceeded by less than the rows of one key.
    """
    held = [k.detach().cpu().numpy() for k in keys]
    for view, k in enumerate(held):
        if len(k) and (np.any(np.diff(k) <= 0) or k[0] < 0 or k[-1] >= rois * slots):
            raise ValueError(
                f"keys of view {view} must ascend strictly within [0, {rois} rois * {slots})"
            )
    starts = np.cumsum([0, *map(len, held)])
    student, teacher, weights, sizes = [], [], [], []
    for t in range(teachers):
        for s in range(len(held)):
            if s == t:
                continue
            _, rows_t, rows_s = np.intersect1d(
                held[t], held[s], assume_unique=True, return_indices=True
            )
            roi = held[t][rows_t] // slots
            n = np.bincount(roi, minlength=rois).astype(np.float64)
            student.append(starts[s] + rows_s)
            teacher.append(starts[t] + rows_t)
            weights.append(n[roi] ** (inner - 1))
            sizes.append(n[n > 0])
    n = np.concatenate(sizes) if sizes else np.zeros(0)
    return Matches(
        *_arrange(
            np.concatenate(held),
            np.concatenate([np.zeros(0, np.int64), *student]),
            np.concatenate([np.zeros(0, np.int64), *teacher]),
            np.concatenate([np.zeros(0), *weights]),
            chunk,
        ),
        groups=len(n),
        mass=float((n**inner).sum()),
        norm=float((n**outer).sum()),
    )


def _arrange(
    keys: np.ndarray, student: np.ndarray, teacher: np.ndarray, weights: np.ndarray, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[Part]]:
    """Sort rows and pairs by key and cut them into chunks; the rows of a key stay together."""
    rows_s, at_s = np.unique(student, return_inverse=True)
    rows_t, at_t = np.unique(teacher, return_inverse=True)
    found = np.unique(keys[teacher])  # the keys of at least one pair
    key_s, key_t = np.searchsorted(found, keys[rows_s]), np.searchsorted(found, keys[rows_t])
    rows = np.bincount(key_s, minlength=len(found)) + np.bincount(key_t, minlength=len(found))
    _, part = np.unique((np.cumsum(rows) - 1) // chunk, return_inverse=True)
    order_s, order_t = np.argsort(key_s, kind="stable"), np.argsort(key_t, kind="stable")
    order = np.argsort(key_t[at_t], kind="stable")
    pairs = np.stack([np.argsort(order_s)[at_s], np.argsort(order_t)[at_t]])[:, order]
    count = int(part.max()) + 1 if len(part) else 0
    cuts = [
        np.cumsum([0, *np.bincount(part[key], minlength=count)]).tolist()
        for key in (key_s, key_t, key_t[at_t])
    ]
    parts = [Part(*(slice(cut[i], cut[i + 1]) for cut in cuts)) for i in range(count)]
    return (
        torch.from_numpy(rows_s[order_s]),
        torch.from_numpy(rows_t[order_t]),
        torch.from_numpy(pairs),
        torch.from_numpy(weights[order]),
        parts,
    )


class MatchedCrossEntropy(torch.autograd.Function):
    """Weighted sums of cross-entropy and of the targets' entropy over the pairs of `Matches`.

    The gradient is made in the forward pass, chunk by chunk, while a chunk's logits exist: what is
    kept is as large as the inputs. Logits are linear in the bottleneck, hence sums over prototypes
    of target · logit and of target · prototype are one product of small matrices (`pulled`), and
    no target is ever copied to its students.

    Inputs: student bottleneck [n, d] and prototypes [K, d] (both may have a gradient), teacher
    bottleneck [m, d], in the order of `matches`; `Teacher`; `Matches`; student temperature.
    Outputs: cross-entropy (with gradient) and entropy, scalars; 0 when there are no pairs, with
    gradients of 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        prototypes: torch.Tensor,
        y: torch.Tensor,
        teacher: Teacher,
        matches: Matches,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, entropy = x.new_zeros(()), x.new_zeros(())
        dx, dw = torch.zeros_like(x), torch.zeros_like(prototypes)
        wants_gradient = any(ctx.needs_input_grad[:2])
        for part in matches.parts:
            student, targets = x[part.student], y[part.teacher]
            weights = x.new_zeros(len(student), len(targets))
            rows = matches.pairs[0, part.pairs] - part.student.start
            columns = matches.pairs[1, part.pairs] - part.teacher.start
            weights[rows, columns] = matches.weights[part.pairs].to(x.dtype)
            # targets: p = e / total
            z = targets @ teacher.prototypes.T
            z.sub_(teacher.centre).div_(teacher.temperature)
            z.sub_(z.amax(1, keepdim=True))
            e = z.exp()
            total = e.sum(1, keepdim=True)
            own = total.log() - torch.einsum("nk,nk->n", e, z)[:, None] / total
            entropy += (weights.sum(0) * own[:, 0]).sum()
            pulled = weights @ ((e @ prototypes) / total)
            if wants_gradient:
                dw.addmm_(e.T, weights.T @ student / (total * -temperature))
            del z, e
            # students: softmax = e / total, lse = top + log total
            z = (student @ prototypes.T).div_(temperature)
            top = z.amax(1, keepdim=True)
            e = z.sub_(top).exp_()
            total = e.sum(1, keepdim=True)
            mass = weights.sum(1, keepdim=True)
            loss += (mass * (top + total.log())).sum() - (pulled * student).sum() / temperature
            if wants_gradient:
                share = mass / (total * temperature)
                dx[part.student] = (e @ prototypes) * share - pulled / temperature
                dw.addmm_(e.T, student * share)
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        dx, dw = ctx.saved_tensors
        wants = ctx.needs_input_grad
        return (dx * grad if wants[0] else None, dw * grad if wants[1] else None, *[None] * 4)
