"""What the loop asks of a method, and what a method is told when it is built."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lemon_muse.config import Config


class MethodConfig(Config):
    """Base of the settings of a method."""

    name: str


@dataclass(frozen=True)
class Setting:
    """What a method needs to know of the run.

    `batch` is the global batch of one forward pass (all ranks, one accumulation part); `stored` is
    the side of a crop (or ROI) in the shards, `window` the side of what the network sees, in px at
    `mpp`. `view` and `backbone` are settings of the kinds that the method takes. `slides` is what
    the index says of each slide, by sorted name, with a `count` of 0 for those that the run's
    `subset` leaves out; None where a run is opened without its shards.
    """

    steps: int
    batch: int
    stored: int
    window: int
    mpp: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    seed: int
    view: Any
    backbone: Any
    slides: dict[str, dict[str, Any]] | None = None


class Method(nn.Module, ABC):
    """A self-supervised method.

    `reads` says what a batch holds beside `views` (what `draw` gave, cut to b rows): 'crops' is
    {'pixels': uint8 [b, S, S, 3]}; 'rois' adds {'points': float32 [b, n, 2], 'counts': int64 [b]},
    nuclei in px of the ROI, NaN past the count.
    """

    reads: Literal["crops", "rois"] = "crops"

    @property
    def wants_slides(self) -> bool:
        """Whether batches of crops must hold `slide`, int64 [b]: places in `Setting.slides`."""
        return False

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """Augmentation parameters of `count` samples (the *global* batch), a dict a view, on CPU.

        The loop cuts out each rank's rows, so that K ranks see the views that one rank would see.
        """

    @abstractmethod
    def forward(self, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        """One pass over a batch (see `reads`).

        Returns `loss` (scalar, with gradient), `features` ([b, dim], detached: for the collapse
        monitors) and further scalars to be logged, each to be averaged over ranks.
        """

    def networks(self) -> list[nn.Module]:
        """What torch.compile is worth for; by default every timm network."""
        return [m for m in self.modules() if m is not self and hasattr(m, "forward_features")]

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser; only tensors that need a gradient."""

    def before_step(self, step: int) -> None:
        """Called between clipping and the optimiser step (frozen layers)."""

    @abstractmethod
    def after_step(self, step: int) -> dict[str, float]:
        """Called once after each optimiser step (EMA, centres); returns scalars to be logged."""

    @abstractmethod
    def encoder(self) -> Any:
        """What is exported, an `Encoder` or a `DenseEncoder`: shares its weights with the method
        until it is saved.
        """

    @abstractmethod
    def chance(self) -> float:
        """The loss of a network that has learnt nothing (all features equal)."""

    def judge(self, logged: dict[str, float]) -> str | None:
        """A sentence when the scalars of `forward` show a collapse of the method's own kind."""
        return None
