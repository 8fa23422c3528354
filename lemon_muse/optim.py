"""Optimiser settings and construction (timm's factory makes the optimiser itself)."""

from typing import Any, Literal

import torch
from pydantic import Field

from lemon_muse.config import Config
from lemon_muse.schedules import cosine, warmup_cosine


class Optim(Config):
    """Optimiser and learning rate."""

    name: Literal["adamw", "lars", "sgd"] = Field("adamw", description="optimiser")
    lr: float = Field(
        1.5e-4,
        gt=0,
        description="peak learning rate for a global batch of 256; scaled by batch/256",
    )
    end_lr: float = Field(0.0, ge=0, description="learning rate at the last step, scaled likewise")
    warmup: float = Field(
        0.133,
        ge=0,
        lt=1,
        description="share of the steps with linearly rising rate (20 of 150 epochs)",
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, on every tensor")
    end_weight_decay: float | None = Field(
        None, ge=0, description="weight decay at the last step, along a cosine; none = constant"
    )
    decay_norms: bool = Field(
        True, description="also decay biases and norm gains, as the MoCo v3 reference does"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1; momentum of LARS and SGD")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW beta 2")
    clip: float = Field(0.0, ge=0, description="largest global gradient norm; 0 = no clipping")

    def rate(self, step: int, steps: int, batch: int) -> float:
        """Learning rate at a step."""
        scale = batch / 256
        return warmup_cosine(
            step,
            steps,
            warmup=round(self.warmup * steps),
            peak=self.lr * scale,
            end=self.end_lr * scale,
        )

    def decay(self, step: int, steps: int) -> float:
        """Weight decay at a step."""
        if self.end_weight_decay is None:
            return self.weight_decay
        return cosine(step, steps, start=self.weight_decay, end=self.end_weight_decay)


def clip(optimiser: torch.optim.Optimizer, limit: float) -> dict[str, float]:
    """Clip the global gradient norm to `limit` (0: not at all); what is to be logged."""
    if not limit:
        return {}
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return {"grad_norm": float(torch.nn.utils.clip_grad_norm_(parameters, limit))}


def build(groups: list[dict[str, Any]], settings: Optim) -> torch.optim.Optimizer:
    """The optimiser over `method.param_groups()`."""
    decayed = []
    for group in groups:
        wide = [p for p in group["params"] if p.ndim > 1 or settings.decay_norms]
        thin = [p for p in group["params"] if not (p.ndim > 1 or settings.decay_norms)]
        rest = {k: v for k, v in group.items() if k != "params"}
        decayed.append({**rest, "params": wide, "weight_decay": settings.weight_decay})
        if thin:
            decayed.append({**rest, "params": thin, "weight_decay": 0.0})
    if settings.name == "adamw":
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(decayed, lr=settings.lr, betas=betas, foreach=True)
    if settings.name == "sgd":
        return torch.optim.SGD(decayed, lr=settings.lr, momentum=settings.beta1)
    from timm.optim import Lars

    return Lars(decayed, lr=settings.lr, momentum=settings.beta1)
