"""Windows that are resized for tile encoders, and tokens that a user's function makes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import v2

from eval import samplers
from eval.encoders.foreign import ForeignEncoder
from eval.readers import Resized
from eval.samplers import Look, Words, choose
from lemon_muse.data.table import Table
from lemon_muse.encoder import load
from lemon_muse.errors import UserError
from tests.eval.standins import TinyEncoder, dense_encoder, small_encoder

SETTINGS: dict[str, Any] = {"workers": 0, "device": "cpu", "batch": 64, "name": "x"}
LEMON = Words(window=40, mpp=0.25, resize=True)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """30 nuclei in an image of coloured noise that changes from pixel to pixel."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((200, 160), Image.Resampling.BICUBIC))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    n = 30
    x, y = rng.uniform(0, 200, n), rng.uniform(0, 160, n)
    names = np.full(n, str(tmp_path / "image.png"))
    said = np.full(n, "a")
    return Table(
        names, x, y, np.full(n, 0.25), np.zeros(n, np.int64), said, said, said, ("nucleus",)
    )


def features(encoder: Any, words: Words, table: Table) -> np.ndarray:
    return samplers.features_of(encoder, choose(encoder, words), table, **SETTINGS)


@pytest.mark.parametrize(("window", "side"), [(40, 112), (40, 96), (160, 96)])
def test_a_resized_window_is_torchvisions_transform_of_each_crop(
    table: Table, window: int, side: int
) -> None:
    encoder = TinyEncoder(image_size=side, mpp=0.5).eval()
    found = features(encoder, Words(window=window, mpp=0.25, resize=True), table)
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((side, side), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(encoder.mean, encoder.std),
        ]
    )
    for crop, got in zip(table.crops(window, 0.25), found, strict=True):
        with torch.inference_mode():
            wanted = encoder(transform(crop)[None])[0].numpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "side"), [(40, 224), (100, 64)])
def test_resized_pixels_are_pillows(table: Table, window: int, side: int) -> None:
    reader = Resized(TinyEncoder(image_size=side), window, 0.25, side=side)
    crops = table.crops(window, 0.25)
    found = reader.pixels(torch.from_numpy(crops).permute(0, 3, 1, 2) / 255).numpy()
    for crop, got in zip(crops, found, strict=True):
        image = Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC)
        apart = np.abs(np.asarray(image).astype(int) - got)
        # Pillow rounds between its two passes. Bilinear is 13 levels off; torch's bicubic without
        # antialiasing is another cubic, 7 levels off even when it enlarges.
        assert apart.max() <= 2 and apart.mean() < 0.3


def test_context_is_the_default_and_names_and_hashes_tell_them_apart(table: Table) -> None:
    encoder = TinyEncoder(image_size=112, mpp=0.5)
    own, resized, finer = (choose(encoder, w) for w in (Words(), LEMON, Words(mpp=0.25)))
    assert own == Look("crop", 112, None, 0.5, "", True) and own.tag == "" and own.side == 112
    assert resized == Look("crop", 40, None, 0.25, "", False, 112) and resized.side == 112
    assert resized.tag == ":resized@40px0.25" and finer.tag == "@112px0.25"
    said = {"sampler": "crop", "window": 40, "resize": 112, "mpp": 0.25, "content_hash": "c"}
    assert resized.facts("c") == said and "resize" not in finer.facts("c")
    other = choose(TinyEncoder(image_size=96, mpp=0.5), LEMON)
    assert len({look.hash("c") for look in (own, resized, finer, other)}) == 4
    # The window of the default holds the nucleus in its middle, with what is around it.
    found = features(encoder, Words(), table)
    crops = torch.from_numpy(table.crops(112, 0.5)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        wanted = encoder(v2.functional.normalize(crops, list(encoder.mean), list(encoder.std)))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
    # A window that has the side already is not resized.
    assert choose(encoder, Words(window=112, resize=True)) == own


def test_large_windows_go_through_in_small_batches(table: Table) -> None:
    encoder = TinyEncoder(image_size=224, mpp=0.5)
    features(encoder, LEMON, table)
    assert {len(images) for images in map(torch.empty, encoder.seen)} == {8, 6}
    assert {shape[1:] for shape in encoder.seen} == {(3, 224, 224)}


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("crop", {"resize": True}, "needs the window .* 40 px of small, as in window=40 mpp=0.25"),
        (
            "crop",
            {"resize": True, "window": 64, "sampler": "cls"},
            "goes with sampler=crop, not cl",
        ),
        ("dense", {"resize": True, "window": 64}, "goes with sampler=crop, not map"),
        ("crop", {"window": 64}, "64: sampler=crop takes .* add resize=true"),
        ("crop", {"resize": True, "window": 64, "valid": 40}, "valid=40 goes with sampler=map"),
    ],
)
def test_words_that_do_not_fit(kind: str, words: dict[str, Any], said: str, tmp_path: Path) -> None:
    encoder = dense_encoder() if kind == "dense" else load(small_encoder(tmp_path))
    with pytest.raises(UserError, match=said):
        choose(encoder, Words(**words))


def test_a_vit_takes_any_window_that_is_resized(table: Table, tmp_path: Path) -> None:
    """61 px are no multiple of the patch, and need not be."""
    encoder = load(small_encoder(tmp_path))
    assert features(encoder, Words(window=61, mpp=0.25, resize=True), table).shape == (30, 48)


def test_a_floor_has_no_resized_window() -> None:
    assert Words(resize=True).any and not Words(pos_resample=True).any


def vit_and_wrapped() -> tuple[Any, ForeignEncoder]:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, reg_tokens=2, **arguments).eval()

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = vit

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images)

    facts: dict[str, Any] = {"image_size": 32, "mpp": 0.25, "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def tokens(network: Any, images: torch.Tensor) -> torch.Tensor:
        return network.inner.forward_features(images)[:, 3:]

    plain = ForeignEncoder(vit, origin={}, name="plain", **facts)
    return plain, ForeignEncoder(Wrapped(), origin={}, name="w", patch_tokens=tokens, **facts)


@pytest.mark.parametrize("align", ["centre", "released"])
def test_tokens_of_a_function_are_those_of_the_vit_within(table: Table, align: Any) -> None:
    plain, wrapped = vit_and_wrapped()
    words = Words("tokens", align=align)
    found = features(wrapped, words, table)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, features(plain, words, table), atol=1e-6)
    # Random weights are read through the same function, not the old network.
    fresh = wrapped.fresh(seed=1)
    assert np.abs(features(fresh, words, table) - found).max() > 0.1


def test_tokens_with_a_class_token_are_refused(table: Table) -> None:
    _, wrapped = vit_and_wrapped()
    wrapped.patch_tokens = lambda network, images: network.inner.forward_features(images)
    with pytest.raises(UserError, match=r"gives \(\d+, 19, 48\) .*without class and register"):
        features(wrapped, Words("tokens"), table)
    wrapped.patch_tokens = None
    with pytest.raises(UserError, match="needs a ViT, and w is none"):
        choose(wrapped, Words("tokens"))
