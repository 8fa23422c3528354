"""What the loop asks of a method, and what a method is told when it is built."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lemon_muse.backbones import Backbone
from lemon_muse.data.augment import ViewConfig
from lemon_muse.encoder import Encoder


@dataclass(frozen=True)
class Setting:
    """What a method needs to know of the run.

    `batch` is the global batch of one forward pass (all ranks, one accumulation part); `stored` is
    the side of a crop in the shards, `window` the side of what the network sees, in px at `mpp`.
    """

    steps: int
    batch: int
    stored: int
    window: int
    mpp: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    seed: int
    view: ViewConfig
    backbone: Backbone


class Method(nn.Module, ABC):
    """A self-supervised method."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """Augmentation parameters of `count` crops (the *global* batch), a dict a view, on CPU.

        The loop cuts out each rank's rows, so that K ranks see the views that one rank would see.
        """

    @abstractmethod
    def forward(self, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        """One pass over {'pixels': uint8 [b, S, S, 3], 'views': what `draw` gave, cut to b rows}.

        Returns `loss` (scalar, with gradient), `features` ([b, dim], detached: for the collapse
        monitors) and further scalars to be logged.
        """

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser; only tensors that need a gradient."""

    @abstractmethod
    def after_step(self, step: int) -> dict[str, float]:
        """Called once after each optimiser step (EMA, centres); returns scalars to be logged."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """What is exported: shares its weights with the method until it is saved."""

    @abstractmethod
    def chance(self) -> float:
        """The loss of a network that has learnt nothing (all features equal)."""
