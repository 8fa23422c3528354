"""Is the network learning, or has it collapsed? Numbers, and a sentence on the likely cause."""

import math

import torch
from torch.nn import functional as F

MOST = 1024  # features looked at; more changes nothing but the time


@torch.no_grad()
def measure(features: torch.Tensor) -> dict[str, float]:
    """Health of a batch of features, float [n, d].

    Returns:
        feature_std: mean over channels of the std of the L2-normalised features, times sqrt(d):
            1 for an isotropic cloud, 0 when all features are equal.
        effective_rank: exp of the entropy of the normalised singular values of the centred features
            (RankMe, Garrido et al. 2023, on centred features): 1 to min(n, d).
        uniformity: log mean exp(-2 |a - b|^2) over pairs (Wang & Isola 2020): 0 when all are equal,
            about -4 for a uniform sphere.
        top_share: share of features whose strongest channel is the same one: 1 when one-hot.
    """
    x = features[:MOST].float()
    n, d = x.shape
    unit = F.normalize(x, dim=1)
    values = torch.linalg.svdvals(unit - unit.mean(0))
    share = values / values.sum().clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    squared = (2 - 2 * unit @ unit.T).clamp_min(0)
    off = ~torch.eye(n, dtype=torch.bool, device=x.device)
    uniformity = (-2 * squared[off]).logsumexp(0) - math.log(max(int(off.sum()), 1))
    top = torch.bincount((x - x.mean(0)).abs().argmax(1), minlength=d).max() / n
    return {
        "feature_std": float(unit.std(0).mean() * math.sqrt(d)),
        "effective_rank": float(entropy.exp()),
        "uniformity": float(uniformity),
        "top_share": float(top),
    }


def diagnose(
    health: dict[str, float], *, loss: float, chance: float, step: int, steps: int, dim: int
) -> str | None:
    """A sentence when something is wrong, else None.

    Thresholds are far from what healthy runs show; the loss is judged after a tenth of the run.
    """
    if health["feature_std"] < 0.01:
        return (
            f"uniform collapse: all features are nearly equal (feature_std "
            f"{health['feature_std']:.4f}); likely causes are a learning rate that is too high or "
            f"a teacher that is not the student at step 0. Lower optim.lr or set optim.clip=1."
        )
    if health["effective_rank"] < 2 and dim > 8:
        return (
            f"dimensional collapse: the features span {health['effective_rank']:.1f} of {dim} "
            f"dimensions. Use stronger colour augmentation (view.policy) or a lower optim.lr."
        )
    if health["top_share"] > 0.95:
        return (
            f"one-hot collapse: the same channel is the strongest in {health['top_share']:.0%} of "
            f"the features. Lower optim.lr, or raise method.temperature."
        )
    if step > 0.1 * steps and abs(loss - chance) < 0.01 * chance:
        return (
            f"the loss {loss:.3f} still is chance level {chance:.3f} after {step} steps: nothing "
            f"is learnt. Check optim.lr and optim.warmup, and that data= holds different nuclei."
        )
    return None
