"""Batched views: colour, blur and erasing, against torchvision one image at a time."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as F

from lemon_muse.data import augment, augment_ops
from lemon_muse.data.augment import ViewConfig
from tests.data.view_reference import (
    NORM,
    STORED,
    UNIT,
    WINDOW,
    generator,
    neutral,
    real_crops,
    reference,
    smooth_crops,
    theta,
)

# Colour -----------------------------------------------------------------------------------------


def test_every_order_of_the_colour_operations_equals_torchvision() -> None:
    orders = list(itertools.permutations(range(4)))
    pixels, params = smooth_crops(24, low=90, high=150), neutral(24)
    params["order"] = torch.tensor(orders)
    params["jitter"] = 0.75 + 0.5 * torch.rand(24, 4, generator=generator())
    params["jitter"][:, 3] = 0
    params["gray"][::5] = 1
    ours = augment.apply(pixels, params, ViewConfig(), **UNIT)
    plain = {"mean": UNIT["mean"], "std": UNIT["std"]}
    for i in range(24):
        row = {name: value[i] for name, value in params.items()}
        assert (ours[i] - reference(pixels[i], row, **plain)).abs().max() < 2e-3


def test_colours_are_alike_in_distribution(shared_data: Path) -> None:
    pixels = real_crops(shared_data, 600)
    config = ViewConfig(rotate=False, scale=(1, 1), ratio=(1, 1), hflip=0, erase=0, blur=(0, 0))
    params = augment.draw(config, 600, stored=STORED, window=WINDOW, generator=generator())
    ours = augment.apply(pixels, params, config, **UNIT)
    plain = {"mean": UNIT["mean"], "std": UNIT["std"]}
    theirs = torch.stack(
        [
            reference(pixels[i], {name: value[i] for name, value in params.items()}, **plain)
            for i in range(600)
        ]
    )
    # measured: means to 0.002, standard deviations to 0.005
    assert (ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3))).abs().max() < 0.005
    assert (ours.std((0, 2, 3)) - theirs.std((0, 2, 3))).abs().max() < 0.01


@pytest.mark.parametrize("turns", [-0.1, 0.1])
def test_hue_turns_the_way_of_torchvision(turns: float) -> None:
    pixels = torch.zeros(3, STORED, STORED, 3, dtype=torch.uint8) + 100
    for channel in range(3):
        pixels[channel, :, :, channel] = 160
    params = neutral(3)
    params["jitter"][:, 3] = turns
    ours = augment.apply(pixels, params, ViewConfig(), **UNIT).mean((2, 3))
    theirs = F.adjust_hue(pixels.permute(0, 3, 1, 2) / 255, turns).mean((2, 3))
    assert (ours.argsort(1) == theirs.argsort(1)).all()
    assert (ours - theirs).abs().max() < 0.2


def test_drawn_colour_has_the_distribution_of_torchvision() -> None:
    n, config = 4000, ViewConfig()
    params = augment.draw(config, n, stored=STORED, window=WINDOW, generator=generator())
    torch.manual_seed(0)
    jitter = v1.ColorJitter(0.4, 0.4, 0.2, 0.1)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(n)
    ]
    changed = params["jitter"][:, 0] != 1
    assert abs(changed.double().mean() - 0.8) < 0.02
    cuts = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    for i in range(4):
        wanted = torch.tensor([row[1 + i] for row in theirs]).quantile(cuts)
        assert (params["jitter"][changed, i].quantile(cuts) - wanted).abs().max() < 0.03
    counts = torch.unique(params["order"], dim=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > n / 24 * 0.7
    assert abs(params["gray"].mean() - 0.2) < 0.02


# Blur and erasing -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.008)])
def test_blur_equals_torchvision(dtype: torch.dtype, bound: float) -> None:
    pixels, params = smooth_crops(6), neutral(6)
    params["sigma"] = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 0.0])
    ours = augment.apply(pixels, params, ViewConfig(), dtype=dtype, **UNIT)
    plain = augment.prepare(pixels, **UNIT)
    for i, sigma in enumerate(params["sigma"][:5].tolist()):
        wanted = F.gaussian_blur(plain[i], [13, 13], [sigma, sigma])
        assert (ours[i] - wanted).abs().max() < bound
    assert (ours[5] - plain[5]).abs().max() < 1e-5


def test_blur_with_a_kernel_wider_than_the_line() -> None:
    width, radius = 5, 9
    kernels = augment_ops.blur_kernels(torch.tensor([3.0]), radius)
    basis = augment_ops.blur_basis(width, radius, torch.device("cpu"))
    line = np.random.default_rng(0).random(width)
    padded = np.pad(line, radius, mode="reflect")
    wanted = np.convolve(padded, kernels[0].double().numpy(), mode="valid")
    ours = (kernels @ basis).view(width, width).double().numpy() @ line
    assert np.abs(ours - wanted).max() < 1e-6


def test_the_second_view_is_blurred_less_often() -> None:
    for view, probability in ((0, 1.0), (1, 0.1)):
        params = augment.draw(
            ViewConfig(), 4000, stored=STORED, window=WINDOW, generator=generator(), view=view
        )
        sigma = params["sigma"]
        assert abs((sigma > 0).float().mean() - probability) < 0.02
        assert sigma[sigma > 0].min() >= 0.1 and sigma.max() <= 2


def test_erased_rectangles() -> None:
    n, config = 3000, ViewConfig()
    params = augment.draw(config, n, stored=STORED, window=WINDOW, generator=generator())
    top, bottom, left, right = params["erase"].double().T
    there = bottom > top
    assert abs(there.double().mean() - 0.5) < 0.03
    assert top.min() == 0 and bottom.max() == WINDOW and left.min() == 0 and right.max() == WINDOW
    torch.manual_seed(0)
    image = torch.empty(3, WINDOW, WINDOW)
    boxes = torch.tensor(
        [v1.RandomErasing.get_params(image, (0.02, 0.3), (0.3, 3.3), [0.0])[:4] for _ in range(n)]
    ).double()
    cuts = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.double)
    for ours, theirs, scale in (
        ((bottom - top) * (right - left), boxes[:, 2] * boxes[:, 3], WINDOW**2),
        (bottom - top, boxes[:, 2], WINDOW),
        (top, boxes[:, 0], WINDOW),
        (left, boxes[:, 1], WINDOW),
    ):
        distance = (ours[there].quantile(cuts) - theirs.quantile(cuts)).abs().max()
        assert distance / scale < 0.06


def test_a_whole_view_equals_the_reference() -> None:
    n = 40
    config = ViewConfig(hue=0, brightness=0.2, contrast=0.2, rotate=True, scale=(1, 1))
    pixels = smooth_crops(n, low=90, high=150)
    params = augment.draw(config, n, stored=STORED, window=WINDOW, generator=generator())
    random = np.random.default_rng(0)
    angles = random.uniform(0, 360, n)
    box = (0, 0, WINDOW, WINDOW)
    params["theta"] = torch.cat([theta(a, box, mirror=i % 2 == 1) for i, a in enumerate(angles)])
    ours = augment.apply(pixels, params, config, **NORM)
    norm = {"mean": NORM["mean"], "std": NORM["std"]}
    for i in range(n):
        row = {name: value[i] for name, value in params.items()}
        wanted = reference(pixels[i], row, angle=angles[i], box=box, mirror=i % 2 == 1, **norm)
        assert (ours[i] - wanted).abs().max() < 5e-3
