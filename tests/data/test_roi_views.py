"""Views of ROIs: settings, colour and the contract, against torchvision and parts of the batch."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from lemon_muse import config as settings
from lemon_muse.data import roi_views
from lemon_muse.data.roi_views import RoiViewConfig
from lemon_muse.errors import UserError
from tests.data.roi_reference import (
    NORM,
    UNIT,
    cut,
    generator,
    neutral,
    nuclei,
    tissue,
)

# Settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    ["global_mpp=[0.5, 0.25]", "margin=30", "cap=0", "globals=0", "blur=[1, 0.1]", "turn=true"],
)
def test_a_wrong_value_is_one_sentence(word: str) -> None:
    with pytest.raises(UserError, match=word.split("=")[0]):
        settings.load(RoiViewConfig, [word])


def test_rois_that_are_too_small_are_refused_and_small_ones_are_shown_finer() -> None:
    cfg = RoiViewConfig(locals=1)
    roi_views.check(cfg, 112, 0.5)
    with pytest.raises(UserError, match=r"A global view of 224 px.*global_size at most 222"):
        roi_views.check(cfg, 111, 0.5)
    with pytest.raises(UserError, match=r"A local view of 96 px.*larger ROIs"):
        roi_views.check(RoiViewConfig(local_mpp=(2.0, 2.0)), 224, 0.25)
    points, counts = nuclei([50] * 64, 150)
    params = roi_views.draw(cfg, 64, generator())
    large, _, small = roi_views.place(cfg, params, points, counts, side=150, mpp=0.5)
    fits = params[0]["mpp"] <= 150 * 0.5 / 224
    assert 0 < fits.sum() < 64
    assert torch.allclose(large.mpp[fits], params[0]["mpp"][fits])
    assert torch.equal(large.extent[~fits], torch.full((int((~fits).sum()),), 150.0))
    assert torch.allclose(large.mpp[~fits], torch.tensor(150 * 0.5 / 224))
    assert not large.corner[~fits].any()
    assert torch.allclose(small.mpp, params[2]["mpp"]), "96 px at 0.5 fit anyway"


# Colour, blur, normalisation --------------------------------------------------------------------


@pytest.mark.parametrize("view", [0, 1, 2])
def test_a_view_equals_torchvision_after_the_resampling(view: int) -> None:
    cfg = RoiViewConfig(hue=0, brightness=0.2, contrast=0.2, blur=(1.0, 0.5, 0.5), locals=1)
    count, side = 6, 300
    pixels = (tissue(count, side) // 2) + 60  # away from black and white, where order matters
    points, counts = nuclei([20] * count, side)
    params = roi_views.draw(cfg, count, generator(1))
    found = roi_views.place(cfg, params, points, counts, side=side, mpp=0.25)
    ours = roi_views.apply(pixels, points, params, found, cfg, view, **NORM).images
    bare = roi_views.apply(pixels, points, neutral(params), found, cfg, view, **UNIT).images
    for i in range(count):
        image, row = bare[i], {name: value[i] for name, value in params[view].items()}
        brightness, contrast, saturation, _ = row["jitter"].tolist()
        steps = [
            lambda x, f=brightness: F.adjust_brightness(x, f),
            lambda x, f=contrast: F.adjust_contrast(x, f),
            lambda x, f=saturation: F.adjust_saturation(x, f),
            lambda x: x,
        ]
        for step in row["order"].tolist():
            image = steps[step](image)
        if row["gray"]:
            image = F.rgb_to_grayscale(image, 3)
        if row["sigma"] > 0:
            image = F.gaussian_blur(image, [13, 13], [float(row["sigma"])] * 2)
        wanted = F.normalize(image, list(NORM["mean"]), list(NORM["std"]))
        assert (ours[i] - wanted).abs().max() < 0.01


def test_probabilities_of_blur_and_turns() -> None:
    params = roi_views.draw(RoiViewConfig(), 3000, generator())
    shares = [float((row["sigma"] > 0).float().mean()) for row in params]
    for share, wanted in zip(shares, [1.0, 0.1, *[0.5] * 8], strict=True):
        assert abs(share - wanted) < 0.04
    for row in params:
        assert (torch.bincount(row["turn"], minlength=8) / 3000 - 1 / 8).abs().max() < 0.03
    straight = roi_views.draw(RoiViewConfig(turns=False), 100, generator())
    assert not any(row["turn"].any() for row in straight)


# The contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_makes_its_rows_of_the_global_batch(dtype: torch.dtype) -> None:
    cfg = RoiViewConfig(global_size=112, local_size=48, locals=2, cap=20)
    count, side = 13, 260
    pixels = tissue(count, side)
    points, counts = nuclei([90, 0, 4, 1, 33, 7, 200, 2, 3, 50, 60, 70, 80], side)
    params = roi_views.draw(cfg, count, generator(4))
    whole = roi_views.place(cfg, params, points, counts, side=side, mpp=0.25)
    for at in (slice(0, 1), slice(1, 6), slice(6, 13), slice(4, 4)):
        own = cut(params, at)
        # A rank pads to its own largest number of nuclei.
        room = max([int(n) for n in counts[at]] or [0])
        part = points[at, :room]
        found = roi_views.place(cfg, own, part, counts[at], side=side, mpp=0.25)
        for v in range(cfg.views):
            want = roi_views.apply(pixels, points, params, whole, cfg, v, dtype=dtype, **NORM)
            have = roi_views.apply(pixels[at], part, own, found, cfg, v, dtype=dtype, **NORM)
            assert torch.equal(have.images, want.images[at])
            assert torch.equal(have.points.nan_to_num(-1), want.points[at, :room].nan_to_num(-1))
            assert torch.equal(have.inside, want.inside[at, :room])
            assert not want.inside[at, room:].any()


def test_draws_depend_on_the_generator_alone() -> None:
    first, again, other = (
        roi_views.draw(RoiViewConfig(), 50, generator(seed)) for seed in (1, 1, 2)
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert all(not torch.equal(a[name], c[name]) for name in a if name not in ("gray", "sigma"))
    changed = RoiViewConfig(locals=9, gray=0.0, global_mpp=(0.25, 0.3))
    for a, b in zip(first, roi_views.draw(changed, 50, generator(1)), strict=False):
        for name in ("u_offset", "turn", "jitter", "order", "sigma"):
            assert torch.equal(a[name], b[name])
    assert torch.equal(first[0]["priority_seed"], again[0]["priority_seed"])


def test_autocast_changes_nothing() -> None:
    cfg = RoiViewConfig(global_size=64, local_size=32, locals=1)
    pixels = tissue(3, 150)
    points, counts = nuclei([9, 9, 9], 150)
    params = roi_views.draw(cfg, 3, generator())
    found = roi_views.place(cfg, params, points, counts, side=150, mpp=0.25)
    plain = roi_views.apply(pixels, points, params, found, cfg, 0, **NORM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = roi_views.apply(pixels, points, params, found, cfg, 0, **NORM)
    assert torch.equal(plain.images, cast.images) and torch.equal(plain.points, cast.points)


def test_what_does_not_fit_is_an_error() -> None:
    cfg = RoiViewConfig(locals=0)
    pixels = tissue(3, 450)
    points, counts = nuclei([2, 2, 2], 450)
    params = roi_views.draw(cfg, 3, generator())
    found = roi_views.place(cfg, params, points, counts, side=450, mpp=0.25)
    with pytest.raises(ValueError, match="uint8"):
        roi_views.apply(pixels.float(), points, params, found, cfg, 0, **UNIT)
    with pytest.raises(ValueError, match="uint8"):
        roi_views.apply(pixels[:2], points, params, found, cfg, 0, **UNIT)
    with pytest.raises(ValueError, match="2 ROIs need 2 views of 2 rows"):
        roi_views.apply(pixels[:2], points[:2], params, found, cfg, 0, **UNIT)
    with pytest.raises(ValueError, match="rows of parameters"):
        roi_views.place(cfg, params[:1], points, counts, side=450, mpp=0.25)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 0.06)])
def test_a_gpu_makes_the_same_views(dtype: torch.dtype, bound: float) -> None:
    cfg = RoiViewConfig(locals=2, cap=20)
    pixels = tissue(20, 500)
    points, counts = nuclei([9, 100, 0, 40] * 5, 500)
    params = roi_views.draw(cfg, 20, generator())
    here = roi_views.place(cfg, params, points, counts, side=500, mpp=0.25)
    there = roi_views.place(cfg, params, points.cuda(), counts.cuda(), side=500, mpp=0.25)
    for v in range(cfg.views):
        a = roi_views.apply(pixels, points, params, here, cfg, v, **NORM)
        b = roi_views.apply(
            pixels.cuda(), points.cuda(), params, there, cfg, v, dtype=dtype, **NORM
        )
        assert b.images.is_cuda and (b.images.cpu() - a.images).abs().max() < bound
        assert (b.points.cpu() - a.points).nan_to_num(0).abs().max() < 0.01
        assert (b.inside.cpu() != a.inside).float().mean() < 0.01, "rounding at the margin"
