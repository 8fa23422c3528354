"""The export in LEMON's layout: round trip, a reader written from the description, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from lemon_muse.backbones import Backbone, timm_arguments
from lemon_muse.encoder import Encoder
from lemon_muse.errors import RunError, UserError
from lemon_muse.export import lemon
from lemon_muse.released import open_released
from tests.test_released import forward

MEAN, STD = (0.6, 0.4, 0.55), (0.2, 0.19, 0.15)


def encoder_of(
    window: int = 40, mpp: float = 0.25, *, empty: bool = False, **settings: Any
) -> Encoder:
    """An encoder; an empty one has shapes but no weights, enough to be refused."""
    backbone = Backbone(**settings)
    architecture, arguments = timm_arguments(backbone, window)
    with torch.device("meta"):
        network: Any = timm.create_model(architecture, num_classes=0, **arguments)
    if not empty:
        network = network.to_empty(device="cpu")
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in network.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                value.copy_(centre + 0.05 * torch.randn(value.shape, generator=draw))
    return Encoder(
        network.eval(),
        architecture=architecture,
        arguments=arguments,
        image_size=window,
        mpp=mpp,
        mean=MEAN,
        std=STD,
        name="mine",
    )


@pytest.mark.parametrize("settings", [{}, {"patch": 4}])
def test_round_trip(settings: dict[str, Any], tmp_path: Path) -> None:
    source = encoder_of(**settings)
    assert lemon.write(source, tmp_path, {"Data": "slides"}) < 1e-6
    again = open_released(tmp_path / "lemon.pth.tar")
    assert isinstance(again, Encoder)
    assert (again.mean, again.std, again.mpp, again.image_size) == (MEAN, STD, 0.25, 40)
    assert (again.num_heads, again.patch_size, again.feature) == (
        12,
        settings.get("patch", 8),
        "token",
    )
    state = again.network.state_dict()
    assert state.keys() == source.network.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in source.network.state_dict().items())
    images = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        assert torch.equal(again(images), source(images))


def test_a_reader_of_its_own(tmp_path: Path) -> None:
    source = encoder_of()
    lemon.write(source, tmp_path, {})
    stored = torch.load(tmp_path / "lemon.pth.tar", weights_only=True)
    prefix = "module.base_encoder."
    assert stored["arch"] == "vit_small" and all(k.startswith(prefix) for k in stored["state_dict"])
    state = {k.removeprefix(prefix): v for k, v in stored["state_dict"].items()}
    assert len(state) == 150 and all(v.dtype == torch.float32 for v in state.values())
    assert not any(key.startswith("head") for key in state)
    images = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        got = source(images).double()
    torch.testing.assert_close(got, forward(state, images, heads=12), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "mean_std.json").read_text()) == {
        "mean": list(MEAN),
        "std": list(STD),
    }
    card = (tmp_path / "README.md").read_text()
    assert "`vits8(img_size=40, num_classes=0)`" in card and source.content_hash in card


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heads": 6}, "heads 6 instead of 12"),
        ({"window": 48}, "window 48 instead of 40"),
        ({"mpp": 0.5}, r"µm/px 0\.5 instead of 0\.25"),
        ({"pool": "avg"}, "feature avg instead of token"),
        ({"name": "vit_tiny", "heads": 12}, "width 192 with patch 8"),
        ({"patch": 10}, "width 384 with patch 10"),
        ({"args": {"depth": 2}}, "blocks 2 instead of 12"),
        ({"args": {"init_values": 0.1}}, "LayerScale"),
        ({"args": {"reg_tokens": 2}}, "register tokens"),
    ],
)
def test_refused_with_the_reason(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = encoder_of(**settings, empty=True)
    with pytest.raises(UserError, match=said) as caught:
        lemon.write(source, tmp_path / "out", {})
    assert "format=timm" in str(caught.value) and not (tmp_path / "out").exists()


def test_a_resnet_and_bad_weights(tmp_path: Path) -> None:
    resnet = Encoder(
        timm.create_model("resnet18", num_classes=0),
        architecture="resnet18",
        arguments={},
        image_size=40,
        mpp=0.25,
        mean=MEAN,
        std=STD,
    )
    with pytest.raises(UserError, match="it is for a ViT"):
        lemon.write(resnet, tmp_path / "out", {})
    bad = encoder_of()
    with torch.no_grad():
        bad.network.norm.bias[3] = float("inf")
    with pytest.raises(RunError, match=r"norm\.bias"):
        lemon.write(bad, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
