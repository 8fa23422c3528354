"""What every frozen encoder has: facts, a content hash, a check pair and a model card."""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import nn


class FrozenEncoder(nn.Module, ABC):
    """What both kinds of encoders have, and what is written into a folder.

    Attributes:
        network: the module whose weights are saved.
        dim: width of the features of a nucleus.
        image_size: side of the window, px.
        mpp: µm per pixel of the window.
        patch_size, num_heads: of a ViT; None for other networks.
        mean, std: normalisation of pixels in [0, 1].
        feature: what the feature is ('token', 'avg', …: timm's pooling; 'map').
        name: for tables.
    """

    kind: str
    network: nn.Module
    dim: int
    image_size: int
    mpp: float
    patch_size: int | None
    num_heads: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    feature: str
    name: str

    @property
    def content_hash(self) -> str:
        """16 hex digits over the weights and the facts that change features."""
        digest = hashlib.sha256()
        digest.update(json.dumps(self.facts(), sort_keys=True).encode())
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).tobytes())
        return digest.hexdigest()[:16]

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What changes features beside the weights; plain values."""

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """What `config.json` holds beside our facts."""

    def check_input(self) -> dict[str, torch.Tensor]:
        """A fixed input, named tensors on the CPU."""
        generator = torch.Generator().manual_seed(0)
        size = (2, 3, self.image_size, self.image_size)
        return {"input": torch.randn(size, generator=generator)}

    def check_output(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the encoder makes of a check input, named tensors."""
        return {"output": self(given["input"])}

    @abstractmethod
    def describe(self) -> list[str]:
        """Lines of the model card: what goes in and comes out, and how to use it."""

    @torch.inference_mode()
    def check_pair(self) -> dict[str, torch.Tensor]:
        """Check input and output, float32 on the CPU, in evaluation mode."""
        given = self.check_input()
        parameter = next(self.parameters())
        moved = {
            k: v.to(parameter.device, parameter.dtype if v.is_floating_point() else v.dtype)
            for k, v in given.items()
        }
        was_training = self.training
        self.eval()
        try:
            output = self.check_output(moved)
        finally:
            self.train(was_training)
        return {**given, **{k: v.float().cpu().contiguous() for k, v in output.items()}}


def card_text(encoder: FrozenEncoder, card: dict[str, Any]) -> str:
    """The model card: README.md of the folder."""
    lines = [
        "---",
        f"library_name: {'timm' if encoder.kind == 'crop' else 'lemon_muse'}",
        "tags: [pathology, histology, nucleus, self-supervised]",
        "---",
        f"# {encoder.name}",
        "",
        "A nucleus encoder for H&E, pretrained without labels by lemon_muse.",
        "",
        *encoder.describe(),
    ]
    for title, body in card.items():
        text = body if isinstance(body, str) else f"```json\n{json.dumps(body, indent=1)}\n```"
        lines += [f"## {title}", "", text, ""]
    return "\n".join(lines)
