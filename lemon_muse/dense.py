"""The encoder of MUSE: a dense map of a window, read at the nuclei in it.

A folder of this kind holds the whole network, encoder and decoder, so timm does not open it; the
encoder alone is exported by `lemon-muse export format=timm`.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lemon_muse import __version__
from lemon_muse.backbones.muse import MuseBackbone, MuseNet, ViTTaps, build_muse
from lemon_muse.backbones.sampling import sample
from lemon_muse.errors import UserError
from lemon_muse.frozen import FrozenEncoder

# The released weights state neither: views had 0.25 to 0.5 µm/px (MUSE paper, Table 5), and the
# published evaluation normalises as ImageNet (linear_knn_eval.py of alibaba-damo-academy/MUSE).
RELEASED_MPP, RELEASED_RANGE, RELEASED_SIZE = 0.5, (0.25, 0.5), 224
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CHECK_POINTS = 16


class DenseEncoder(FrozenEncoder):
    """Normalised windows to a class token each, a dense map, and features of nuclei.

    Attributes, beside those of `FrozenEncoder`:
        dim: channels of the map = width of a nucleus feature.
        cls_dim: width of the class token (ResNet: of the mean of the last map).
        image_size, mpp: window, px, and µm/px that it is probed with by default.
        mpp_range: finest and coarsest µm/px that it has seen.
        stride: px of the window per cell of the map.
        settings: what the network is built from.
    """

    kind = "muse"
    network: MuseNet

    def __init__(
        self,
        network: MuseNet,
        *,
        image_size: int,
        mpp: float,
        mpp_range: tuple[float, float],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        name: str = "encoder",
    ) -> None:
        super().__init__()
        self.network = network
        self.settings: MuseBackbone = network.settings
        self.dim, self.cls_dim, self.stride = network.map_dim, network.dim, network.stride
        self.image_size, self.mpp, self.name = image_size, float(mpp), name
        self.mpp_range = (float(mpp_range[0]), float(mpp_range[1]))
        self.mean, self.std = tuple(mean), tuple(std)
        self.patch_size = self.num_heads = None
        if isinstance(network.encoder, ViTTaps):
            self.patch_size = network.encoder.patch
            self.num_heads = int(network.encoder.encoder.blocks[0].attn.num_heads)
        self.feature = "map"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class tokens, float [B, cls_dim], of images float [B, 3, H, W]; no map is made.

        Raises:
            UserError: a ViT, and H or W is not a multiple of the patch.
        """
        return self.network.encoder(images)[0]

    def dense(self, images: torch.Tensor) -> torch.Tensor:
        """Maps, float [B, dim, H / stride, W / stride] (rounded up)."""
        return self.network(images)[1]

    def nuclei(
        self, images: torch.Tensor, points: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        """Features of nuclei, float [n, dim].

        Args:
            images: float [B, 3, H, W], normalised.
            points: float [n, 2], x and y in px of the image, pixel centres at +0.5.
            owner: int64 [n], the image that each point belongs to.
        """
        return self._read(self.dense(images), images, points, owner)

    def tokens(
        self, images: torch.Tensor, points: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        """As `nuclei`, but read from the last map of the encoder: what the decoder adds to."""
        return self._read(self.network.encoder(images)[1][-1], images, points, owner)

    def _read(
        self, maps: torch.Tensor, images: torch.Tensor, points: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        size = (images.shape[-2], images.shape[-1])
        return sample(maps, points, owner, size=size, convention=self.settings.convention)

    @property
    def image_encoder(self) -> nn.Module:
        """The timm ViT or ResNet without the decoder."""
        return self.network.encoder.encoder

    def fresh(self, *, seed: int) -> "DenseEncoder":
        """The same architecture with new weights, in evaluation mode."""
        other = copy.copy(self)
        # A shallow copy shares the table of submodules; the new network must not land in ours.
        other._modules = {**self._modules, "network": build_muse(self.settings, seed=seed)}
        return other.eval().requires_grad_(False)

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "settings": self.settings.model_dump(mode="json"),
            "image_size": self.image_size,
            "mpp": self.mpp,
            "mpp_range": list(self.mpp_range),
            "mean": list(self.mean),
            "std": list(self.std),
            "patch_size": self.patch_size,
            "num_heads": self.num_heads,
            "feature": self.feature,
        }

    def layout(self) -> dict[str, Any]:
        return {}

    def check_input(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        side = self.image_size
        return {
            "input": torch.randn(2, 3, side, side, generator=generator),
            "points": torch.rand(CHECK_POINTS, 2, generator=generator) * side,
            "owner": torch.arange(CHECK_POINTS) % 2,
        }

    def check_output(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images = given["input"]
        cls, maps = self.network(images)
        return {"output": self._read(maps, images, given["points"], given["owner"]), "cls": cls}

    def describe(self) -> list[str]:
        side = self.image_size
        low, high = self.mpp_range
        unit = f"multiples of {self.patch_size} px" if self.patch_size else "any"
        return [
            f"- input: RGB window of {side} × {side} px (other sides: {unit}) at {self.mpp} µm/px "
            f"(seen in pretraining: {low} to {high}); values in [0, 1], then mean "
            f"{list(self.mean)}, std {list(self.std)}",
            f"- output: a map of {self.dim} channels at 1/{self.stride} of the window's side, read "
            f"at nuclei; {self.cls_dim} features of the whole window",
            f"- network: {json.dumps(self.settings.model_dump(mode='json'))}",
            f"- content hash: {self.content_hash}; written by lemon_muse {__version__}",
            "",
            "```python",
            "import torch",
            "from lemon_muse.encoder import load",
            "",
            'encoder = load("THIS_FOLDER")',
            f"images = torch.randn(2, 3, {side}, {side})  # normalised windows",
            "points = torch.tensor([[30.5, 40.0], [100.0, 12.5], [7.0, 90.0]])  # x, y in px",
            "owner = torch.tensor([0, 0, 1])  # the window of each point",
            "with torch.inference_mode():",
            f"    features = encoder.nuclei(images, points, owner)  # [3, {self.dim}]",
            f"    windows = encoder(images)  # [2, {self.cls_dim}]",
            "```",
            "",
            "The encoder without its decoder, for timm: `encoder.image_encoder`, or as a folder "
            "`lemon-muse export run=THIS_FOLDER format=timm out=FOLDER`.",
            "",
        ]


def from_facts(facts: dict[str, Any], state: dict[str, torch.Tensor]) -> DenseEncoder:
    """The encoder of a folder, from `lemon_muse` of its config.json and its weights.

    Raises:
        KeyError, ValueError, RuntimeError: a fact is missing or wrong, weights that do not fit.
    """
    network = build_muse(MuseBackbone(**facts["settings"]), seed=0)
    network.load_state_dict(state)
    low, high = facts["mpp_range"]
    return DenseEncoder(
        network,
        image_size=facts["image_size"],
        mpp=facts["mpp"],
        mpp_range=(low, high),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        name=facts["name"],
    )


def from_released_file(
    path: Path, stored: dict[str, Any], *, pos_resample: bool = False
) -> DenseEncoder:
    """A released MUSE file (.pth), in evaluation mode, under the name of the file.

    Args:
        path: for the name.
        stored: what `torch.load` gave for it.
        pos_resample: a ViT's positions are resampled once, as the published evaluation does it
            (`muse_weights.from_released`); said in the name, for it is another function.

    Raises:
        UserError: not such a file.
    """
    from lemon_muse.backbones.muse_weights import from_released

    try:
        network = from_released(stored, pos_resample=pos_resample)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    vit = isinstance(network.encoder, ViTTaps)
    encoder = DenseEncoder(
        network,
        image_size=network.settings.image if vit else RELEASED_SIZE,
        mpp=RELEASED_MPP,
        mpp_range=RELEASED_RANGE,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        name=f"{path.stem}:pos_resample" if pos_resample and vit else path.stem,
    )
    return encoder.eval().requires_grad_(False)
