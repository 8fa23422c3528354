"""Multiply-accumulates against hand counts and against published figures."""

import logging
from typing import Any

import pytest
import timm
import torch
from torch import nn

from eval.cost import cost
from eval.samplers import Words, choose
from lemon_muse.backbones.muse import MuseBackbone, build_muse
from lemon_muse.dense import DenseEncoder
from lemon_muse.encoder import Encoder
from tests.eval.standins import TinyEncoder, dense_encoder

COLOURS: dict[str, Any] = {"mean": (0.6, 0.4, 0.55), "std": (0.2, 0.2, 0.15)}


def vit(side: int, patch: int) -> Encoder:
    arguments = {"img_size": side, "patch_size": patch}
    network = timm.create_model("vit_small_patch16_224", num_classes=0, **arguments)
    return Encoder(network, architecture="vit_small_patch16_224", arguments=arguments,
                   image_size=side, mpp=0.25, name="vits", **COLOURS)  # fmt: skip


def by_hand(side: int, patch: int, *, attention: bool = True) -> float:
    """MACs of a ViT-S: patches, and in each block q, k, v, output, two products, the MLP (4 x)."""
    width, depth, patches = 384, 12, (side // patch) ** 2
    tokens = patches + 1
    block = tokens * (3 + 1 + 2 * 4) * width**2 + (2 * tokens**2 * width if attention else 0)
    return patches * patch**2 * 3 * width + depth * block


def test_vit_small_8_at_40_px() -> None:
    encoder = vit(40, 8)
    found = cost(encoder, choose(encoder))
    assert found["gmacs"] == pytest.approx(by_hand(40, 8) / 1e9, rel=1e-5)
    # LEMON's figure leaves the two products of attention out, about 1 % at 26 tokens.
    assert by_hand(40, 8, attention=False) / 1e9 == pytest.approx(0.554, abs=5e-4)
    assert found["gmacs"] == pytest.approx(0.554, rel=0.02)
    assert found["parameters"] == pytest.approx(21.4e6, rel=0.005)
    assert found["gmacs_of"] == "nucleus"


def test_tokens_and_class_token_of_another_window() -> None:
    encoder = vit(40, 8)
    for sampler, unit in (("tokens", "window"), ("cls", "nucleus")):
        found = cost(encoder, choose(encoder, Words(sampler, window=64)))  # type: ignore[arg-type]
        assert found["gmacs"] == pytest.approx(by_hand(64, 8) / 1e9, rel=1e-5)
        assert found["gmacs_of"] == unit
    # The encoder given is as it was.
    assert tuple(encoder.network.patch_embed.img_size) == (40, 40)  # type: ignore[union-attr]


def test_a_window_that_is_enlarged_costs_what_the_network_sees() -> None:
    encoder = vit(96, 16)
    look = choose(encoder, Words("crop", window=40, mpp=0.25, resize=True))
    assert cost(encoder, look)["gmacs"] == pytest.approx(by_hand(96, 16) / 1e9, rel=1e-5)


def test_muse_with_and_without_its_decoder() -> None:
    """17.3 GFLOP for ViT-S/16 with decoder at 224 px, of which the decoder 8.1 (reference)."""
    network = build_muse(MuseBackbone(name="vit_small", patch=16, heads=6, image=224), seed=0)
    encoder = DenseEncoder(network, image_size=224, mpp=0.5, mpp_range=(0.25, 0.5), name="muse",
                           **COLOURS)  # fmt: skip
    maps = cost(encoder, choose(encoder))
    cls = cost(encoder, choose(encoder, Words("cls")))
    assert (maps["gmacs_of"], cls["gmacs_of"]) == ("window", "nucleus")
    assert 2 * maps["gmacs"] == pytest.approx(17.3, abs=0.05)  # type: ignore[operator]
    assert 2 * (maps["gmacs"] - cls["gmacs"]) == pytest.approx(8.1, abs=0.05)  # type: ignore[operator]
    assert cls["gmacs"] == pytest.approx(by_hand(224, 16) / 1e9, rel=1e-3)
    assert maps["parameters"] == pytest.approx(31.07e6, rel=1e-3)
    assert cls["parameters"] == pytest.approx(21.67e6, rel=1e-3)


def test_convolutions() -> None:
    """torchvision states 1.81 GMAC and 11.7 M parameters for ResNet-18; the classifier is away."""
    network = timm.create_model("resnet18", num_classes=0)
    encoder = Encoder(network, architecture="resnet18", arguments={}, image_size=224, mpp=0.5,
                      name="r18", **COLOURS)  # fmt: skip
    found = cost(encoder, choose(encoder))
    assert found["gmacs"] == pytest.approx(1.814, abs=0.002)
    assert found["parameters"] == 11_689_512 - 512 * 1000 - 1000


def test_nothing_changes_and_chance_is_not_touched() -> None:
    encoder = dense_encoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    cost(encoder, choose(encoder))
    assert torch.equal(torch.rand(1), first)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


class Broken(TinyEncoder):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("needs a licence\nand more")


class Uncounted(TinyEncoder):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 5).flatten(1)


@pytest.mark.parametrize(
    ("kind", "says"), [(Broken, "needs a licence"), (Uncounted, "nothing that can be counted")]
)
def test_exotic_networks_leave_it_out(
    kind: type[TinyEncoder], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = kind()
    with caplog.at_level(logging.WARNING):
        found = cost(encoder, choose(encoder))
    assert found == {"parameters": 75 * 16 + 16}
    assert says in caplog.text and "and more" not in caplog.text


def test_half_precision() -> None:
    encoder = TinyEncoder().to(torch.bfloat16)
    assert cost(encoder, choose(encoder))["gmacs"] == pytest.approx(75 * 16 / 1e9)
