"""Batched views: settings, geometry and the contract, against torchvision one image at a time."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as F

from lemon_muse import config as settings
from lemon_muse.data import augment
from lemon_muse.data.augment import ViewConfig
from lemon_muse.errors import UserError
from tests.data.view_reference import (
    NORM,
    STORED,
    UNIT,
    WINDOW,
    generator,
    neutral,
    real_crops,
    reference,
    rows,
    smooth_crops,
    theta,
)

# Settings ---------------------------------------------------------------------------------------


def test_a_policy_fills_only_what_is_not_given() -> None:
    assert ViewConfig(policy="a1+gray") == ViewConfig()
    assert ViewConfig(policy="a1").gray == 0
    mixed = settings.load(ViewConfig, ["policy=a1", "gray=0.1"])
    assert mixed.gray == 0.1 and mixed.rotate
    assert settings.load(ViewConfig, ["policy=a0"]).scale == (0.08, 1.0)
    for policy in augment.POLICIES:
        config = ViewConfig.model_validate({"policy": policy})
        assert ViewConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    "word",
    ["policy=a2", "gray=1.5", "scale=[0.5, 0.2]", "scale=[0, 1]", "hue=0.7", "erase_scale=[0, 2]"],
)
def test_a_wrong_value_is_one_sentence(word: str) -> None:
    with pytest.raises(UserError, match=word.split("=")[0]):
        settings.load(ViewConfig, [word])


# Geometry ---------------------------------------------------------------------------------------


def test_prepare_is_centre_crop_and_normalise() -> None:
    pixels = smooth_crops(5)
    planes = F.center_crop(pixels.permute(0, 3, 1, 2), [WINDOW, WINDOW]).float() / 255
    wanted = F.normalize(planes, list(NORM["mean"]), list(NORM["std"]))
    assert torch.allclose(augment.prepare(pixels, **NORM), wanted, atol=2e-6)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_flips_and_quarter_turns_are_exact(turns: int, mirror: bool) -> None:
    pixels, params = smooth_crops(3), neutral(3)
    box = (0, 0, WINDOW, WINDOW)
    params["theta"] = theta(90 * turns, box, mirror=mirror).repeat(3, 1, 1)
    wanted = torch.rot90(augment.prepare(pixels, **UNIT), turns, (2, 3))
    wanted = wanted.flip(3) if mirror else wanted
    assert (augment.apply(pixels, params, ViewConfig(), **UNIT) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("stored", [40, 50, 64])
def test_no_augmentation_is_prepare(stored: int) -> None:
    off = {"rotate": False, "scale": (1, 1), "ratio": (1, 1), "hflip": 0, "jitter": 0}
    config = ViewConfig.model_validate({**off, "gray": 0, "blur": (0, 0), "erase": 0})
    pixels = smooth_crops(4)[:, :stored, :stored].contiguous()
    params = augment.draw(config, 4, stored=stored, window=WINDOW, generator=generator())
    difference = augment.apply(pixels, params, config, **NORM) - augment.prepare(pixels, **NORM)
    assert difference.abs().max() < 1e-4


def test_rotation_alone_equals_torchvision() -> None:
    pixels, params = smooth_crops(8), neutral(8)
    angles = [3.0, 30.0, 45.0, 77.0, 123.0, 200.0, 270.5, 359.0]
    params["theta"] = torch.cat([theta(angle, (0, 0, WINDOW, WINDOW)) for angle in angles])
    ours = augment.apply(pixels, params, ViewConfig(), **UNIT)
    for i, angle in enumerate(angles):
        turned = F.rotate(pixels[i].permute(2, 0, 1) / 255, angle, F.InterpolationMode.BILINEAR)
        assert (ours[i] - F.center_crop(turned, [WINDOW, WINDOW])).abs().max() < 1e-4


def test_resized_crop_alone_equals_torchvision_but_for_the_rim() -> None:
    boxes = [(0, 0, 40, 40), (3, 5, 30, 25), (10, 2, 20, 27), (0, 12, 40, 28)]
    pixels, params = smooth_crops(4), neutral(4)
    params["theta"] = torch.cat([theta(0, box, mirror=True) for box in boxes])
    ours = augment.apply(pixels, params, ViewConfig(rotate=False), **UNIT)
    centre = F.center_crop(pixels.permute(0, 3, 1, 2) / 255, [WINDOW, WINDOW])
    for i, box in enumerate(boxes):
        wanted = F.resized_crop(centre[i], *box, [WINDOW, WINDOW]).flip(2)
        # At the rim torchvision repeats the box's last pixel; here the crop goes on.
        assert (ours[i] - wanted)[:, 1:-1, 1:-1].abs().max() < 1e-4


def test_rotation_and_crop_stay_near_the_two_step_chain(shared_data: Path) -> None:
    n = 200
    pixels, params = real_crops(shared_data, n), neutral(n)
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    theirs = []
    for i in range(n):
        angle = random.uniform(0, 360)
        box = v1.RandomResizedCrop.get_params(torch.empty(3, 40, 40), [0.32, 1.0], [3 / 4, 4 / 3])
        mirror = bool(random.integers(2))
        params["theta"][i] = theta(angle, box, mirror=mirror)[0]
        row = {name: value[i] for name, value in params.items()}
        plain = {"mean": UNIT["mean"], "std": UNIT["std"]}
        theirs.append(reference(pixels[i], row, angle=angle, box=box, mirror=mirror, **plain))
    ours = augment.apply(pixels, params, ViewConfig(), **UNIT)
    # measured: 0.6 grey levels
    assert 255 * (ours - torch.stack(theirs)).abs().mean() < 1


def test_drawn_geometry_has_the_distribution_of_torchvision() -> None:
    n, config = 4000, ViewConfig(hflip=0.25, scale=(0.2, 0.9))
    params = augment.draw(config, n, stored=STORED, window=WINDOW, generator=generator())
    pixels = params["theta"].double() * STORED / 2
    width, height = 2 * pixels[:, :, 0].norm(dim=1), 2 * pixels[:, :, 1].norm(dim=1)
    # undo the rotation, which the second column holds even where the view is mirrored
    angle = torch.atan2(-pixels[:, 0, 1], pixels[:, 1, 1])
    x = angle.cos() * pixels[:, 0, 2] + angle.sin() * pixels[:, 1, 2]
    y = angle.cos() * pixels[:, 1, 2] - angle.sin() * pixels[:, 0, 2]
    assert (x.abs() + width / 2).max() <= WINDOW / 2 + 1e-4
    assert (y.abs() + height / 2).max() <= WINDOW / 2 + 1e-4
    mirrored = (torch.linalg.det(pixels[:, :, :2]) < 0).double().mean()
    assert abs(mirrored - 0.25) < 0.03
    torch.manual_seed(0)
    large = torch.empty(1, 1000, 1000)  # so large that rounding to whole pixels does not matter
    boxes = torch.tensor(
        [v1.RandomResizedCrop.get_params(large, [0.2, 0.9], [3 / 4, 4 / 3]) for _ in range(n)]
    )
    top, left, tall, wide = (boxes / 1000).double().T
    cuts = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.double)
    turn = (angle / (2 * math.pi)).remainder(1)
    for name, ours, theirs in (
        ("area", width * height / WINDOW**2, tall * wide),
        ("ratio", (width / height).log(), (wide / tall).log()),
        ("x", x / WINDOW, left + wide / 2 - 0.5),
        ("y", y / WINDOW, top + tall / 2 - 0.5),
        ("angle", turn, torch.linspace(0, 1, n, dtype=torch.double)),
    ):
        assert (ours.quantile(cuts) - theirs.quantile(cuts)).abs().max() < 0.035, name


def test_shift_and_flips_without_rotation() -> None:
    config = ViewConfig(rotate=False, scale=(1, 1), ratio=(1, 1), shift=3.0, vflip=0.25)
    params = augment.draw(config, 2000, stored=STORED, window=WINDOW, generator=generator())
    moved = params["theta"][:, :, 2] * STORED / 2
    assert 2.9 < moved.abs().max() <= 3 and moved.mean(0).abs().max() < 0.15
    linear = params["theta"][:, :, :2]
    assert torch.allclose(linear.abs(), (torch.eye(2) * WINDOW / STORED).expand_as(linear))
    mirrored, upside_down = linear[:, 0, 0] < 0, linear[:, 1, 1] < 0
    assert abs(mirrored.float().mean() - 0.5) < 0.04
    assert abs(upside_down.float().mean() - 0.25) < 0.04
    assert abs((mirrored & upside_down).float().mean() - 0.125) < 0.03


@pytest.mark.parametrize(
    ("stored", "rotate", "shift"), [(40, True, 2), (40, False, 0), (48, True, 0), (64, True, 2)]
)
def test_no_view_has_a_fill_colour(stored: int, rotate: bool, shift: float) -> None:
    pixels = torch.full((64, stored, stored, 3), 200, dtype=torch.uint8)
    config = ViewConfig(jitter=0, gray=0, erase=0, rotate=rotate, shift=shift)
    params = augment.draw(config, 64, stored=stored, window=WINDOW, generator=generator())
    views = augment.apply(pixels, params, config, **UNIT)
    assert (views - 200 / 255).abs().max() < 1e-5


def test_crops_without_a_margin_are_continued_by_reflection() -> None:
    config = ViewConfig(scale=(1, 1), ratio=(1, 1), blur=(0, 0))
    small = smooth_crops(20)[:, :WINDOW, :WINDOW].contiguous()
    rim = (STORED - WINDOW) // 2
    large = np.pad(small.numpy(), ((0, 0), (rim, rim), (rim, rim), (0, 0)), mode="symmetric")
    views = []
    for pixels in (small, torch.from_numpy(large)):
        params = augment.draw(
            config, 20, stored=pixels.shape[1], window=WINDOW, generator=generator()
        )
        views.append(augment.apply(pixels, params, config, **UNIT))
    assert (views[0] - views[1]).abs().max() < 1e-3


# The contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", [0, 1])
def test_a_slice_of_the_batch_is_the_batch_of_the_slice(dtype: torch.dtype, view: int) -> None:
    n, config = 133, ViewConfig(blur=(1.0, 0.4))
    pixels = smooth_crops(n)
    params = augment.draw(config, n, stored=STORED, window=WINDOW, generator=generator(), view=view)
    whole = augment.apply(pixels, params, config, dtype=dtype, **NORM)
    for cut in (slice(0, 1), slice(1, 38), slice(31, 97), slice(38, 133), slice(132, 133)):
        part = augment.apply(pixels[cut], rows(params, cut), config, dtype=dtype, **NORM)
        assert torch.equal(part, whole[cut])


def test_draws_depend_on_the_generator_alone() -> None:
    def drawn(seed: int, **changes: float) -> dict[str, torch.Tensor]:
        config = ViewConfig.model_validate(changes)
        return augment.draw(config, 64, stored=STORED, window=WINDOW, generator=generator(seed))

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    less = drawn(1, erase=0.0)
    assert not less["erase"].any()
    assert all(torch.equal(first[name], less[name]) for name in first if name != "erase")


def test_autocast_and_an_empty_batch() -> None:
    pixels, config = smooth_crops(4), ViewConfig()
    params = augment.draw(config, 4, stored=STORED, window=WINDOW, generator=generator())
    plain = augment.apply(pixels, params, config, **NORM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.apply(pixels, params, config, **NORM), plain)
    none = augment.apply(pixels[:0], rows(params, slice(0, 0)), config, **NORM)
    assert none.shape == (0, 3, WINDOW, WINDOW)


def test_what_does_not_fit_is_an_error() -> None:
    pixels, config, params = smooth_crops(4), ViewConfig(), neutral(4)
    with pytest.raises(ValueError, match="does not fit"):
        augment.draw(config, 4, stored=32, window=WINDOW, generator=generator())
    with pytest.raises(ValueError, match="even"):
        augment.prepare(pixels[:, :63, :63], **UNIT)
    with pytest.raises(ValueError, match="uint8"):
        augment.apply(pixels.float(), params, config, **UNIT)
    with pytest.raises(ValueError, match="uint8"):
        augment.prepare(pixels.permute(0, 3, 1, 2), **UNIT)
    with pytest.raises(ValueError, match="parameters"):
        augment.apply(pixels[:3], params, config, **UNIT)
    with pytest.raises(ValueError, match="std"):
        augment.prepare(pixels, window=WINDOW, mean=(0, 0, 0), std=(1, 0, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 0.06)])
def test_a_gpu_makes_the_same_views(dtype: torch.dtype, bound: float) -> None:
    pixels, config = smooth_crops(100), ViewConfig(blur=(0.5, 0.5))
    params = augment.draw(config, 100, stored=STORED, window=WINDOW, generator=generator())
    here = augment.apply(pixels, params, config, **NORM)
    there = augment.apply(pixels.cuda(), params, config, dtype=dtype, **NORM)
    assert there.is_cuda and there.dtype == torch.float32
    assert (there.cpu() - here).abs().max() < bound


def test_centred_views_zoom_about_the_nucleus() -> None:
    """The middle of the view is the middle of the crop; zoom in and out are equally likely."""
    config = ViewConfig(centred=True, scale=(0.5, 2.0), ratio=(0.8, 1.25), shift=0.0, rotate=False)
    params = augment.draw(config, 4000, stored=64, window=40, generator=torch.Generator())
    theta = params["theta"]
    assert not theta[:, :, 2].any()
    width, height = theta[:, 0, 0].abs() * 64 / 40, theta[:, 1, 1].abs() * 64 / 40
    area = (width * height).log2()
    assert -1 <= float(area.min()) < -0.98 and 0.98 < float(area.max()) <= 1
    assert abs(float(area.mean())) < 0.03
    assert (
        float((width / height).min()) >= 0.8 - 1e-5 and float((width / height).max()) <= 1.25 + 1e-5
    )
    with pytest.raises(ValueError, match="fraction of an area"):
        ViewConfig(scale=(0.5, 2.0))


@pytest.mark.parametrize("changes", [{}, {"centred": True, "scale": (0.4, 1.6), "shift": 4.0}])
def test_views_from_crops_of_the_stored_size_need_no_pixel_outside(changes: dict) -> None:
    config = ViewConfig(**changes)
    stored = augment.stored_size(config, 40)
    assert stored % 16 == 0
    drawn = augment.draw(config, 5000, stored=stored, window=40, generator=torch.Generator())
    theta = drawn["theta"]
    corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)])
    assert float((theta @ corners.T).abs().max()) <= 1
