"""The alarms fire on the collapses they name, and keep quiet on a healthy cloud."""

import numpy as np
import pytest
import torch

from lemon_muse import collapse

G = torch.Generator().manual_seed(0)
HEALTHY = torch.randn(512, 64, generator=G)


def judge(features: torch.Tensor, **changes: float) -> str | None:
    told = {"loss": 3.0, "chance": 6.0, "step": 500, "steps": 1000, "dim": 64, **changes}
    return collapse.diagnose(collapse.measure(features), **told)  # type: ignore[arg-type]


def test_healthy_features() -> None:
    health = collapse.measure(HEALTHY)
    assert health["feature_std"] == pytest.approx(1, abs=0.05)
    assert health["effective_rank"] > 50
    assert judge(HEALTHY) is None


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (torch.ones(512, 64) + 1e-4 * HEALTHY, "uniform collapse"),
        (
            torch.eye(64)[torch.randint(0, 1, (512,))] * HEALTHY.abs() * 9 + 0.01 * HEALTHY,
            "collapse",
        ),
        (HEALTHY[:, :1] @ torch.randn(1, 64, generator=G), "dimensional collapse"),
    ],
)
def test_collapsed_features(features: torch.Tensor, name: str) -> None:
    said = judge(features)
    assert said is not None and name in said


def test_a_loss_at_chance_is_only_judged_after_a_tenth() -> None:
    assert judge(HEALTHY, loss=6.01, step=50) is None
    said = judge(HEALTHY, loss=6.01, step=500)
    assert said is not None and "chance level" in said


def test_effective_rank_and_uniformity_equal_plain_formulas() -> None:
    x = HEALTHY[:40, :8].double().numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.svd(unit - unit.mean(0), compute_uv=False)
    p = values / values.sum()
    pairs = [
        np.exp(-2 * np.sum((a - b) ** 2))
        for i, a in enumerate(unit)
        for j, b in enumerate(unit)
        if i != j
    ]
    health = collapse.measure(HEALTHY[:40, :8])
    assert health["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert health["uniformity"] == pytest.approx(np.log(np.mean(pairs)), rel=1e-3)
