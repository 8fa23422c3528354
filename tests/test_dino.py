"""DINO and NuLo losses against plain loops, in value, gradient and memory."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lemon_muse import dino
from lemon_muse.heads import DINOHead
from lemon_muse.matching import Teacher

K, D, SLOTS, ROIS, VIEWS, GLOBALS = 37, 8, 12, 5, 5, 2
REDUCTIONS = ["pair", "sqrt", "nucleus", "sum"]


def nuclei(seed: int, empty_rois: tuple[int, ...] = (1,)) -> list[torch.Tensor]:
    """Keys of every view: ragged, some rois in no view, one local view without any nucleus."""
    rng = np.random.default_rng(seed)
    keys = []
    for view in range(VIEWS):
        shown = rng.random((ROIS, SLOTS)) < rng.uniform(0.05, 0.9, (ROIS, 1))
        shown[list(empty_rois)] = False
        if view == VIEWS - 1:
            shown[:] = False
        keys.append(torch.from_numpy(np.flatnonzero(shown)))
    return keys


def unit(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=1).to(
        dtype
    )


def features(
    keys: list[torch.Tensor], dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Student rows of every view (leaves) and teacher rows of the global ones."""
    student = [unit(len(k), 10 + v, dtype).requires_grad_() for v, k in enumerate(keys)]
    return student, [unit(len(k), 90 + v, dtype) for v, k in enumerate(keys[:GLOBALS])]


def prototypes(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 1.3 * unit(K, seed, dtype)


def teacher_of(dtype: torch.dtype = torch.float64) -> Teacher:
    return Teacher(prototypes(2, dtype), 0.3 * unit(K, 3, dtype)[:, 0], 0.05)


def cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, w: torch.Tensor, target: Teacher
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one row and one row, and the entropy of the target: the definition."""
    p = ((target.prototypes @ teacher - target.centre) / target.temperature).softmax(0)
    return -(p * (w @ student / 0.1).log_softmax(0)).sum(), -(p * p.log()).sum()


def naive(
    student: list[torch.Tensor],
    teacher: list[torch.Tensor],
    keys: list[torch.Tensor],
    w: torch.Tensor,
    target: Teacher,
    reduction: str,
) -> dict[str, torch.Tensor]:
    """NuLo, one nucleus at a time."""
    groups: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for roi in range(ROIS):
        for t in range(len(teacher)):
            for s in range(len(student)):
                if s == t:
                    continue
                group = []
                for row, key in enumerate(keys[t].tolist()):
                    if key // SLOTS == roi and key in keys[s].tolist():
                        other = student[s][keys[s].tolist().index(key)]
                        group.append(cross_entropy(other, teacher[t][row], w, target))
                groups.append(group)
    full = [g for g in groups if g]
    sizes = [len(g) for g in full]
    weigh = {"pair": lambda n: 1 / n, "sqrt": lambda n: n**-0.5}.get(reduction, lambda n: 1.0)
    mass = sum(weigh(n) * n for n in sizes)
    norm = len(full) if reduction == "sum" else mass
    ce = sum(weigh(len(g)) * value for g in full for value, _ in g)
    entropy = sum(weigh(len(g)) * value for g in full for _, value in g)
    return {
        "loss": ce / norm,
        "entropy": entropy / mass,
        "kl": (ce - entropy) / mass,
        "matched": torch.tensor(sum(sizes)),
        "pairs": torch.tensor(len(full)),
        "empty_pairs": torch.tensor(1 - len(full) / len(groups), dtype=torch.float64),
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk", [1, 23, 1024])
def test_the_ragged_loss_is_the_loop_over_nuclei(reduction: str, chunk: int) -> None:
    keys = nuclei(0)
    student, teacher = features(keys)
    w = prototypes(1).requires_grad_()
    expected = naive(student, teacher, keys, w, teacher_of(), reduction)
    wanted = torch.autograd.grad(expected["loss"], [*student[:-1], w])
    out = dino.nucleus_loss(
        student, teacher, keys, w, teacher_of(), rois=ROIS, slots=SLOTS,
        reduction=reduction, chunk=chunk,  # type: ignore[arg-type]
    )  # fmt: skip
    assert expected["pairs"] > 10 and 0.3 < expected["empty_pairs"] < 0.8
    for name, value in expected.items():
        assert float(out[name].detach()) == pytest.approx(float(value.detach()), rel=1e-12), name
        assert out[name].requires_grad == (name == "loss")
    got = torch.autograd.grad(out["loss"], [*student, w])
    assert got[VIEWS - 1].shape == (0, D)  # the view without nuclei has a gradient too
    for ours, theirs in zip([*got[: VIEWS - 1], got[-1]], wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    keys = nuclei(4)
    student, teacher = features(keys)
    w = prototypes(1).requires_grad_()

    def loss(w: torch.Tensor, *views: torch.Tensor) -> torch.Tensor:
        return dino.nucleus_loss(
            [*views, student[-1]], teacher, keys, w, teacher_of(), rois=ROIS, slots=SLOTS, chunk=20
        )["loss"]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (w, *student[:-1]), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_costs_rounding_only(dtype: torch.dtype) -> None:
    """fp32 under autocast is bit-equal; gradients come back in the dtype of the features."""
    keys = nuclei(1)
    student, teacher = features(keys, dtype)
    w = prototypes(1, torch.float32).requires_grad_()
    target = teacher_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = dino.nucleus_loss(student, teacher, keys, w, target, rois=ROIS, slots=SLOTS)
        image = dino.image_loss([s[:6] for s in student[:3]], [t[:6] for t in teacher], w, target)
    plain = dino.nucleus_loss(student, teacher, keys, w, target, rois=ROIS, slots=SLOTS)
    wide = naive(
        [s.double() for s in student], [t.double() for t in teacher], keys, w.double(),
        Teacher(target.prototypes.double(), target.centre.double(), target.temperature), "pair",
    )  # fmt: skip
    assert out["loss"].dtype == image["loss"].dtype == torch.float32
    assert torch.equal(out["loss"], plain["loss"])
    assert float(out["loss"].detach()) == pytest.approx(float(wide["loss"].detach()), rel=1e-5)
    out["loss"].backward()
    assert student[0].grad is not None and student[0].grad.dtype == dtype


class Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_no_matrix_of_all_logits_is_made_or_kept() -> None:
    many, rows, chunk = 5000, 300, 16
    saved: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.numel())
        return t

    keys = [torch.arange(rows)] * 3
    student = [unit(rows, v, torch.float32).requires_grad_() for v in range(3)]
    teacher = [unit(rows, 9, torch.float32)]
    w = torch.randn(many, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = Teacher(w.detach(), torch.zeros(many), 0.05)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Largest() as largest:
        out = dino.nucleus_loss(
            student, teacher, keys, w, target, rois=rows, slots=1, chunk=chunk
        )  # fmt: skip
        out["loss"].backward()
        kept = max(saved)
        dino.sinkhorn_centre(teacher[0], w.detach(), 0.05, chunk=chunk)
    assert kept == many * D  # the gradient of the prototypes; all logits would be 300 x 5000
    assert largest.elements <= chunk * many
    plain = (student[1] @ w.T).log_softmax(1)
    assert plain.numel() > 10 * largest.elements


def test_without_a_match_the_loss_is_zero_and_every_gradient_is_there() -> None:
    net = nn.Linear(4, 4)
    head = DINOHead(4, K, hidden=8, bottleneck=D, norm_last=False)
    for keys in (
        [torch.zeros(0, dtype=torch.int64)] * 3,
        [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3, 15])],
    ):
        net.zero_grad(), head.zero_grad()  # type: ignore[func-returns-value]
        student = [head(net(torch.randn(len(k), 4))) for k in keys]
        teacher = [s.detach() for s in student[:2]]
        target = teacher_of(torch.float32)
        out = dino.nucleus_loss(
            student, teacher, keys, head.prototypes(), target, rois=2, slots=SLOTS
        )  # fmt: skip
        out["loss"].backward()
        assert float(out["loss"].detach()) == float(out["pairs"]) == 0
        assert float(out["empty_pairs"]) == 1 and float(out["kl"]) == 0
        for name, p in [*net.named_parameters(), *head.named_parameters()]:
            assert p.grad is not None and not p.grad.any(), name


def test_duplicates_and_equal_features_are_finite_and_sit_at_chance() -> None:
    """Equal logits cost ln K; a centre that has met equal features makes targets flat."""
    keys = nuclei(2)
    target = teacher_of(torch.float32)
    same = unit(1, 0, torch.float32)
    student = [same.repeat(len(k), 1).requires_grad_() for k in keys]
    teacher = [same.repeat(len(k), 1) for k in keys[:GLOBALS]]
    flat = unit(1, 4, torch.float32).repeat(K, 1).requires_grad_()
    out = dino.nucleus_loss(student, teacher, keys, flat, target, rois=ROIS, slots=SLOTS)
    assert float(out["loss"].detach()) == pytest.approx(dino.chance(K), rel=1e-6)
    assert dino.chance(65536) == pytest.approx(11.0904, abs=1e-4)
    out["loss"].backward()
    assert all(s.grad is not None and bool(s.grad.isfinite().all()) for s in student)
    centre = dino.Centre(K)
    for _ in range(400):
        centre.update(*dino.logit_sum(teacher[0], target.prototypes))
    met = Teacher(target.prototypes, centre.value, 0.04)
    out = dino.nucleus_loss(student, teacher, keys, flat, met, rois=ROIS, slots=SLOTS)
    assert float(out["entropy"]) == pytest.approx(math.log(K), rel=1e-6)
    assert float(out["kl"]) == pytest.approx(0, abs=1e-5)
    balanced = dino.sinkhorn_centre(teacher[0], target.prototypes, 0.04)
    p = dino.targets(teacher[0] @ target.prototypes.T, balanced, 0.04)
    torch.testing.assert_close(p, torch.full_like(p, 1 / K), rtol=1e-4, atol=0)


def test_the_image_loss_is_a_double_loop_over_views() -> None:
    views = [unit(7, v).requires_grad_() for v in range(4)]
    teacher = [unit(7, 20 + t) for t in range(2)]
    w, target = prototypes(1).requires_grad_(), teacher_of()
    pairs = []
    for t in range(2):
        for s in range(4):
            if s != t:
                p = dino.targets(teacher[t] @ target.prototypes.T, target.centre, 0.05)
                pairs.append(-(p * (views[s] @ w.T / 0.1).log_softmax(1)).sum(1).mean())
    expected = torch.stack(pairs).mean()
    out = dino.image_loss(views, teacher, w, target, chunk=8)
    assert len(pairs) == 6 and float(out["loss"].detach()) == pytest.approx(
        float(expected.detach()), rel=1e-6
    )
    assert float(out["kl"]) == pytest.approx(float(out["loss"].detach() - out["entropy"]), rel=1e-5)
    got = torch.autograd.grad(out["loss"], [*views, w])
    for ours, theirs in zip(got, torch.autograd.grad(expected, [*views, w]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_keys_that_break_the_contract_are_named() -> None:
    w, target = prototypes(1), teacher_of()
    rows = [unit(2, 0), unit(2, 1)]
    for wrong in ([3, 3], [4, 1], [0, ROIS * SLOTS], [-1, 2]):
        with pytest.raises(ValueError, match="keys of view 1"):
            dino.nucleus_loss(
                rows, rows[:1], [torch.tensor([0, 1]), torch.tensor(wrong)], w, target,
                rois=ROIS, slots=SLOTS,
            )  # fmt: skip
    with pytest.raises(ValueError, match="must be those of the keys"):
        dino.nucleus_loss(
            rows, rows[:1], [torch.tensor([0, 1]), torch.tensor([1])], w, target,
            rois=ROIS, slots=SLOTS,
        )  # fmt: skip
