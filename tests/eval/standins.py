"""A small network with the Encoder contract, for tests that need no pretrained one."""

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from lemon_muse.encoder import Encoder, save_encoder


class TinyEncoder(nn.Module):
    """Mean colours of a 5 x 5 grid through one linear layer: fast and not random."""

    def __init__(self, *, image_size: int = 40, mpp: float = 0.25, dim: int = 16, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.name, self.feature = "tiny", "avg"
        self.dim, self.image_size, self.mpp = dim, image_size, mpp
        self.patch_size, self.num_heads = None, None
        self.mean, self.std = (0.6, 0.4, 0.55), (0.2, 0.2, 0.15)
        self.layer = nn.Linear(75, dim)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(dim, 75, generator=generator))
        self.seen: list[tuple[int, ...]] = []

    @property
    def content_hash(self) -> str:
        raw = self.layer.weight.detach().numpy().tobytes()
        return hashlib.sha256(raw).hexdigest()[:16]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(images.shape))
        grid = nn.functional.adaptive_avg_pool2d(images, 5).flatten(1)
        return self.dropout(self.layer(grid))


def small_encoder(folder: Path, *, seed: int = 0, window: int = 40, name: str = "small") -> Path:
    """Write the folder of an untrained two-block ViT of width 48 and return it."""
    arguments: dict[str, Any] = {
        "img_size": window,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    encoder = Encoder(
        network,
        architecture="vit_tiny_patch16_224",
        arguments=arguments,
        image_size=window,
        mpp=0.25,
        mean=(0.6, 0.4, 0.55),
        std=(0.2, 0.2, 0.15),
        name=name,
    )
    return save_encoder(encoder, folder)
