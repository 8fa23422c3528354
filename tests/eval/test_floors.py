"""Floors against plain loops; what is fitted must not see val or test."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from eval.floors import floor_features, majority_scores, random_encoder
from lemon_muse.backbones.vit import prepare_moco_vit
from lemon_muse.data.table import Table
from lemon_muse.encoder import Encoder


def table_of(folder: Path, *, test_grey: int = 0) -> Table:
    """Two train, one val and one test image of noise; `test_grey` replaces the test image."""
    columns: dict[str, list[object]] = {k: [] for k in ("image", "x", "y", "split")}
    for number, split in enumerate(("train", "train", "val", "test")):
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 255, (96, 96, 3), np.uint8)
        if split == "test" and test_grey:
            pixels[:] = test_grey
        path = folder / f"{number}-{test_grey}.png"
        Image.fromarray(pixels).save(path)
        for x, y in generator.uniform(40, 56, (30, 2)):
            for name, value in zip(columns, (str(path), x, y, split), strict=True):
                columns[name].append(value)
    n = len(columns["x"])
    return Table(
        image=np.array(columns["image"], str),
        x=np.array(columns["x"], float),
        y=np.array(columns["y"], float),
        mpp=np.full(n, 0.25),
        label=np.arange(n) % 3,
        patient=np.array(columns["image"], str),
        slide=np.array(columns["image"], str),
        split=np.array(columns["split"], str),
        classes=("a", "b", "c"),
    )


def test_colour_equals_mean_and_std_standardised_on_train(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    found = floor_features("colour", table, size=32, mpp=0.25)
    plain = []
    for crop in table.crops(32, 0.25):
        flat = crop.reshape(-1, 3) / 255
        plain.append([*flat.mean(0), *flat.std(0)])
    values = np.array(plain)
    train = values[:60]
    np.testing.assert_allclose(found, (values - train.mean(0)) / train.std(0), atol=5e-3)


def test_histogram_equals_numpys(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    found = floor_features("histogram", table, size=32, mpp=0.25)
    assert found.shape == (120, 96)
    crop = table.crops(32, 0.25, np.array([70]))[0]
    expected = []
    for part in (crop, crop[8:24, 8:24]):
        for channel in range(3):
            counts = np.histogram(part[..., channel], bins=16, range=(0, 256))[0]
            expected.append(np.sqrt(counts / counts.sum()))
    np.testing.assert_allclose(found[70], np.concatenate(expected), rtol=1e-6)


def test_pixel_pca_equals_an_exact_svd_of_train_pixels(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    found = floor_features("pixel_pca", table, size=8, mpp=0.25)
    pixels = table.crops(8, 0.25).reshape(120, -1) / 255
    mean = pixels[:60].mean(0)
    axes = np.linalg.svd(pixels[:60] - mean, full_matrices=False)[2]
    expected = (pixels - mean) @ axes.T
    # Signs are free; the last axis of 60 centred rows is empty.
    np.testing.assert_allclose(np.abs(found[:, :50]), np.abs(expected[:, :50]), atol=5e-3)


def test_large_windows_are_shrunk_by_whole_blocks(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    big = floor_features("pixel_pca", table, size=80, mpp=0.25)
    pixels = table.crops(80, 0.25).astype(float)
    small = pixels.reshape(120, 40, 2, 40, 2, 3).mean((2, 4)).reshape(120, -1) / 255
    distance = np.linalg.norm(small[60] - small[90])
    kept = np.linalg.norm(big[60] - big[90])
    assert big.shape == (120, 60)
    # A projection shortens; the fitted rows keep their distances exactly.
    assert kept <= distance + 0.05
    assert np.linalg.norm(big[0] - big[30]) == pytest.approx(
        np.linalg.norm(small[0] - small[30]), rel=5e-3
    )


@pytest.mark.parametrize("name", ["colour", "histogram", "pixel_pca"])
def test_a_floor_does_not_see_the_test_images(tmp_path: Path, name: str) -> None:
    first = floor_features(name, table_of(tmp_path), size=16, mpp=0.25)
    second = floor_features(name, table_of(tmp_path, test_grey=9), size=16, mpp=0.25)
    np.testing.assert_array_equal(first[:90], second[:90])
    assert np.abs(first[90:] - second[90:]).max() > 0.1


def test_majority_always_says_the_commonest_class() -> None:
    scores = majority_scores(np.array([2, 2, 0]), 4, classes=4)
    np.testing.assert_allclose(scores, np.tile([1 / 3, 0, 2 / 3, 0], (4, 1)), rtol=1e-6)


@pytest.mark.parametrize("sincos", [False, True])
def test_the_random_encoder_is_what_training_starts_from(sincos: bool) -> None:
    arguments: dict[str, Any] = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2}
    arguments["num_heads"] = 4

    def built(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
        prepare_moco_vit(network, freeze_patch=True, sincos=sincos)
        return network

    network = built(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "pos_embed" or not sincos:
                parameter.add_(0.1)
    trained = Encoder(
        network,
        architecture="vit_tiny_patch16_224",
        arguments=arguments,
        image_size=40,
        mpp=0.25,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    state = torch.get_rng_state()
    fresh = random_encoder(trained, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    expected = built(11).state_dict()
    for name, value in fresh.network.state_dict().items():  # type: ignore[union-attr, operator]
        assert torch.equal(value, expected[name]), name
    assert not fresh.training
    assert fresh.image_size == 40 and fresh.mpp == 0.25
