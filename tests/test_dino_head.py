"""DINO's head, centre, Sinkhorn and schedules against torch's own weight norm and plain loops."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lemon_muse import dino, ema, schedules
from lemon_muse.heads import DINOHead
from tests.test_dino import ROIS, SLOTS, D, K, nuclei, prototypes, unit


def test_the_head_and_the_targets_are_fp32_under_autocast() -> None:
    head = DINOHead(16, K, hidden=32, bottleneck=D, norm_last=False)
    with torch.autocast("cpu", torch.bfloat16):
        bottleneck = head(torch.randn(9, 16, generator=torch.Generator().manual_seed(0)))
        logits = head.logits(bottleneck)
        p = dino.targets(logits, torch.zeros(K), 0.04)
        centre = dino.sinkhorn_centre(bottleneck, head.prototypes(), 0.04)
    assert {t.dtype for t in (bottleneck, logits, p, centre)} == {torch.float32}
    torch.testing.assert_close(bottleneck.norm(dim=1), torch.ones(9), rtol=0, atol=1e-6)
    torch.testing.assert_close(p.sum(1), torch.ones(9), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, bottleneck @ head.prototypes().T, rtol=0, atol=0)


def test_the_weight_norm_is_torchs() -> None:
    head = DINOHead(4, K, hidden=8, bottleneck=D, norm_last=False)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    theirs = nn.Linear(D, K, bias=False)
    theirs.weight.data.copy_(head.last_layer.weight_v.data)
    theirs = nn.utils.parametrizations.weight_norm(theirs, dim=0)
    theirs.parametrizations.weight.original0.data.copy_(head.last_layer.weight_g.data)
    x = unit(6, 0, torch.float32)
    ours, reference = head.logits(x), theirs(x)
    torch.testing.assert_close(ours, reference)
    ours.square().sum().backward()
    reference.square().sum().backward()
    pair = theirs.parametrizations.weight
    torch.testing.assert_close(head.last_layer.weight_g.grad, pair.original0.grad)
    torch.testing.assert_close(head.last_layer.weight_v.grad, pair.original1.grad)


def test_the_head_is_the_references_in_names_and_values() -> None:
    """A state dict in the layout of facebookresearch/dino fits, and gives what its layers give."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, D)
    )  # fmt: skip
    v, g = torch.randn(K, D), torch.rand(K, 1) + 0.5
    state = {f"mlp.{name}": value for name, value in mlp.state_dict().items()}
    head = DINOHead(4, K, hidden=16, bottleneck=D, norm_last=True)
    head.load_state_dict({**state, "last_layer.weight_v": v, "last_layer.weight_g": g})
    x = torch.randn(5, 4)
    expected = F.normalize(mlp(x), dim=1) @ (g * v / v.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head.logits(head(x)), expected)
    head.logits(head(x)).sum().backward()
    assert head.last_layer.weight_g.grad is None  # frozen
    twin = ema.momentum_copy(head)  # after a forward and backward pass
    torch.testing.assert_close(twin.logits(twin(x)), expected)
    fresh = DINOHead(384, 4096, norm_last=True)
    assert copy.deepcopy(fresh).prototypes().norm(dim=1).allclose(torch.ones(4096))
    assert [m.weight.std().item() for m in fresh.mlp[::2]] == pytest.approx([0.02] * 3, rel=0.02)
    assert len(DINOHead(4, K, layers=1, norm_last=True).mlp) == 1


def test_the_last_layer_is_left_alone_at_first() -> None:
    head = DINOHead(4, K, hidden=8, bottleneck=D, norm_last=False)
    optimiser = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.4)
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    for step, moves in ((2, False), (3, True)):
        head.logits(head(torch.randn(3, 4))).square().sum().backward()
        dino.cancel_last_layer_gradient(head, step, frozen_steps=3)
        optimiser.step()
        optimiser.zero_grad()
        for name, p in head.named_parameters():
            assert torch.equal(p, before[name]) == (name.startswith("last_layer") and not moves)


def test_the_centre_is_the_running_weighted_mean() -> None:
    keys, w = nuclei(3)[0], prototypes(2, torch.float32)
    y = unit(len(keys), 5, torch.float32)
    centre, expected = dino.Centre(K), np.zeros(K)
    per_roi = [y[keys // SLOTS == roi] @ w.T for roi in range(ROIS)]
    means = [logits.mean(0).numpy() for logits in per_roi if len(logits)]
    for _ in range(3):
        weights = dino.nucleus_weights(keys, slots=SLOTS)
        centre.update(*dino.logit_sum(y, w, weights))
        expected = 0.9 * expected + 0.1 * np.mean(means, axis=0)  # every roi counts the same
        centre.update(*dino.logit_sum(y[:0], w))  # nothing anywhere: stays
    np.testing.assert_allclose(centre.value.numpy(), expected, rtol=1e-5, atol=1e-7)
    all_alike = dino.nucleus_weights(keys, slots=SLOTS, reduction="nucleus")
    assert torch.equal(all_alike, torch.ones(len(keys)))
    assert centre.state_dict().keys() == {"value"}


def plain_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    q = np.exp(logits / temperature)
    for _ in range(iterations):
        for k in range(q.shape[1]):
            q[:, k] /= q[:, k].sum() * q.shape[1]
        for i in range(q.shape[0]):
            q[i] /= q[i].sum()
    return q


def test_sinkhorn_is_the_plain_one() -> None:
    y, w = unit(50, 0), prototypes(1)
    logits = y @ w.T
    for chunk in (7, 1024):
        centre = dino.sinkhorn_centre(y.float(), w.float(), 0.05, chunk=chunk)
        p = dino.targets(logits, centre, 0.05)
        np.testing.assert_allclose(
            p.numpy(), plain_sinkhorn(logits.numpy(), 0.05, 3), rtol=1e-4, atol=1e-9
        )
    centre = dino.sinkhorn_centre(y, w, 0.05, iterations=2000)
    p = dino.targets(logits, centre, 0.05)
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=torch.float64))
    columns = p.sum(0)
    torch.testing.assert_close(columns, torch.full_like(columns, 50 / K), rtol=1e-3, atol=0)


def test_sinkhorn_weights_are_repeated_rows_and_long_prototypes_stay_finite() -> None:
    y, w = unit(20, 0, torch.float32), prototypes(1, torch.float32)
    repeats = torch.arange(20) % 4  # rows of weight 0 too
    weighted = dino.sinkhorn_centre(y, w, 0.05, weights=repeats.float(), iterations=4)
    repeated = dino.sinkhorn_centre(y.repeat_interleave(repeats, 0), w, 0.05, iterations=4)
    torch.testing.assert_close(weighted, repeated, rtol=1e-4, atol=1e-5)
    long = 8 * w  # exp(8 * 1.3 / 0.04) is past fp32
    p = dino.targets(y @ long.T, dino.sinkhorn_centre(y, long, 0.04), 0.04)
    expected = plain_sinkhorn((y @ long.T).double().numpy(), 0.04, 3)
    np.testing.assert_allclose(p.numpy(), expected, rtol=1e-3, atol=1e-7)
    assert not dino.sinkhorn_centre(y[:0], w, 0.05).any()


def test_schedules_of_dino() -> None:
    temperature = [
        schedules.linear_warmup(s, warmup=30, start=0.04, end=0.07) for s in (0, 10, 30, 90)
    ]
    assert temperature == pytest.approx([0.04, 0.05, 0.07, 0.07])
    np.testing.assert_allclose(
        [schedules.linear_warmup(s, warmup=29, start=0.04, end=0.07) for s in range(30)],
        np.linspace(0.04, 0.07, 30),
    )
    assert schedules.linear_warmup(0, warmup=0, start=0.04, end=0.07) == 0.07
    decay = [schedules.cosine(s, 100, start=0.04, end=0.4) for s in (0, 50, 100)]
    assert decay == pytest.approx([0.04, 0.22, 0.4])
