"""Small stand-ins: networks with the Encoder contract, and a folder as BRCA-M2C publishes it."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from lemon_muse.backbones.muse import MuseBackbone, MuseNet, build_muse
from lemon_muse.dense import DenseEncoder
from lemon_muse.encoder import Encoder, save_encoder

NAMES = {
    "train": [
        "TCGA-A1-A0SA-01Z-00-DX1_100_200_180_200_1.0",
        "TCGA-A1-A0SA-01Z-00-DX2_5_6_180_200_1.0",
        "TCGA-A1-A0SB-01Z-00-DX1_5_6_180_200_1.0",
    ],
    "val": ["TCGA-A1-A0SC-01Z-00-DX1_5_6_180_200_1.0"],
    "test": ["TCGA-A1-A0SD-01Z-00-DX1_5_6_180_200_0.9872000000000001"],
}
EVERY = [name for names in NAMES.values() for name in names]


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


def write_brca(root: Path) -> Path:
    """A small data set: white images of 90 x 100 px with one dark pixel under each point."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for split, names in NAMES.items():
        (root / f"brca_ds_{split}.txt").write_text("".join(f"{n}.png\n" for n in names))
    for number, name in enumerate(EVERY):
        pixels = np.full((100, 90, 3), 255, np.uint8)
        lines = []
        for i in range(4):
            row, column = 10 + 25 * i, 80 - 20 * i - number
            pixels[row, column] = (10, 20, 30 + i)
            lines.append(f"{row} {column} {i % 3 + 1}\n")
        Image.fromarray(pixels).save(root / "images" / f"{name}.png")
        (root / "labels" / f"{name}_gt_class_coords.txt").write_text("".join(lines))
    return root


def labels_of(root: Path, name: str) -> Path:
    return root / "labels" / f"{name}_gt_class_coords.txt"


def dense_network(*, seed: int = 0, **changes: Any) -> MuseNet:
    """A MUSE network of two blocks of width 32 whose batch norm has seen something."""
    given: dict[str, Any] = {"name": "vit_tiny", "patch": 8, "heads": 1, "image": 64}
    settings = MuseBackbone(**{**given, "args": {"depth": 2, "embed_dim": 32}, **changes})
    network = build_muse(settings, seed=seed)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    # Stochastic depth draws from the global generator.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.train()(images)
    return network.eval()


def dense_encoder(*, seed: int = 0, called: str = "dense", **changes: Any) -> DenseEncoder:
    """A `DenseEncoder` of 64 px windows at 0.5 µm/px around `dense_network`."""
    encoder = DenseEncoder(
        dense_network(seed=seed, **changes),
        image_size=64,
        mpp=0.5,
        mpp_range=(0.25, 0.5),
        mean=(0.6, 0.4, 0.55),
        std=(0.2, 0.2, 0.15),
        name=called,
    )
    return encoder.eval().requires_grad_(False)
