"""An encoder whose network is not built by timm from recorded arguments."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from eval.encoders.words import first_line
from lemon_muse.errors import UserError
from lemon_muse.frozen import FrozenEncoder

# (network, images float [B, 3, H, W]) -> patch tokens float [B, rows * cols, D]
PatchTokens = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class ForeignEncoder(FrozenEncoder):
    """Any network from normalised windows, float [B, 3, S, S], to features, float [B, dim].

    It serves for evaluation; its folder is not written.

    Args:
        network: in evaluation mode from here on; tried once on a black window.
        origin: what tells it apart beside its weights; enters the content hash.
        image_size, mpp, mean, std, name: see `FrozenEncoder`.
        patch_tokens: for sampler=tokens, where the network is no timm ViT.
        build: makes the same network untrained, from the global random generator; without it
            `fresh` draws every weight anew.

    Raises:
        UserError: the network fails on a window of `image_size`, or does not give [B, dim].
    """

    kind = "foreign"

    def __init__(
        self,
        network: nn.Module,
        *,
        origin: dict[str, str],
        image_size: int,
        mpp: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        name: str,
        patch_tokens: PatchTokens | None = None,
        build: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.origin, self.patch_tokens, self.build = dict(origin), patch_tokens, build
        self.image_size, self.mpp, self.name = image_size, float(mpp), name
        self.mean, self.std, self.feature = tuple(mean), tuple(std), "foreign"
        # Of a timm ViT: its windows must be multiples of the patch. Others see to it themselves.
        side = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        self.patch_size = int(side[0]) if isinstance(side, tuple) else None
        self.num_heads = None
        self.dim = self._width()
        self.eval()

    @torch.no_grad()
    def _width(self) -> int:
        shape = (1, 3, self.image_size, self.image_size)
        try:
            found = self.network(torch.zeros(shape))
        except Exception as error:  # whatever a network raises
            raise UserError(
                f"{self.name}: the network fails on float32 {list(shape)} with "
                f"{type(error).__name__} ({first_line(error)})."
            ) from error
        if not isinstance(found, torch.Tensor) or found.dim() != 2 or len(found) != 1:
            what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise UserError(
                f"{self.name}: the network gives {what} for {list(shape)}; it must give one "
                f"feature a window, [B, D]."
            )
        return int(found.shape[1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def fresh(self, *, seed: int) -> "ForeignEncoder":
        """The same architecture with random weights, in evaluation mode."""
        other = copy.copy(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build() if self.build else redrawn(self.network)
        # A shallow copy shares the table of submodules; the new network must not land in ours.
        other._modules = {**self._modules, "network": network}
        return other.eval().requires_grad_(False)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "origin": self.origin,
            "image_size": self.image_size,
            "mpp": self.mpp,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def layout(self) -> dict[str, Any]:
        return {}

    def describe(self) -> list[str]:
        return [
            f"- input: RGB window of {self.image_size} × {self.image_size} px at {self.mpp} µm/px; "
            f"values in [0, 1], then mean {list(self.mean)}, std {list(self.std)}",
            f"- output: {self.dim} features",
            f"- network: {self.origin}",
            f"- content hash: {self.content_hash}",
        ]


def redrawn(network: nn.Module) -> nn.Module:
    """A copy with every weight drawn anew from the global generator.

    Layers that can reset themselves do so; what is left (class token, positions, …) is drawn from
    a normal distribution with its own mean and deviation, so that nothing learnt stays but scale.
    """
    network = copy.deepcopy(network)
    done: set[int] = set()
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            done |= {id(p) for p in module.parameters(recurse=False)}
    with torch.no_grad():
        for parameter in network.parameters():
            if id(parameter) not in done and parameter.is_floating_point():
                mean, std = parameter.mean(), parameter.std(correction=0)
                parameter.copy_(torch.randn(parameter.shape) * std.cpu() + mean.cpu())
    return network
