"""Views of another stain, against numpy and scikit-image, one image at a time."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from skimage.color import combine_stains, rgb_from_hed
from sklearn.mixture import GaussianMixture

from lemon_muse.data import augment, stain, stain_views
from lemon_muse.data.augment import ViewConfig
from lemon_muse.data.stain_views import CUT, Mixture, Stains
from lemon_muse.errors import UserError
from tests.data.view_reference import STORED, UNIT, WINDOW, generator, neutral, rows, smooth_crops

PLAIN = {"hflip": 0, "jitter": 0, "blur": (0, 0), "erase": 0, "rotate": False}
PLAIN |= {"scale": (1, 1), "ratio": (1, 1)}


def known_stains(n: int, seed: int = 0) -> np.ndarray:
    """Strength times vector, float64 [n, 2, 3]: hematoxylin and eosin of n slides."""
    rng = np.random.default_rng(seed)
    vectors = np.array([(0.62, 0.68, 0.35), (0.15, 0.92, 0.35)]) + rng.normal(0, 0.03, (n, 2, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors * np.exp(rng.normal(0.3, 0.25, (n, 2, 1)))


def slides_of(stains: np.ndarray) -> dict[str, dict[str, Any]]:
    """What an index says of slides with these stains."""
    strength = np.linalg.norm(stains, axis=-1)
    return {
        f"slide{i:02d}": {
            "count": 5,
            "stain": {"vectors": (w / s[:, None]).tolist(), "strength": s.tolist()},
        }
        for i, (w, s) in enumerate(zip(stains, strength, strict=True))
    }


def tissue(amounts: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Uint8 [..., 3] by scikit-image: amounts [..., 2] of the rows of w [2, 3]."""
    third = np.cross(w[0], w[1])
    full = np.concatenate([amounts, np.zeros_like(amounts[..., :1])], -1)
    # scikit-image's unit of density is -ln(1e-6)
    light = combine_stains(full / -np.log(1e-6), np.stack([*w, third]))
    return np.rint(256 * light - 1).clip(0, 255).astype(np.uint8)


def restained(
    pixels: np.ndarray, own: np.ndarray, new: np.ndarray, hed: np.ndarray | None = None
) -> np.ndarray:
    """One image uint8 [h, w, 3] in another stain and with Tellez' jitter: float [h, w, 3]."""
    h_factor, e_factor, h_more, e_more = (1, 1, 0, 0) if hed is None else hed
    density = -np.log((pixels.reshape(-1, 3).astype(float) + 1) / 256)
    amount, *_ = np.linalg.lstsq(own.T, density.T, rcond=None)
    rest = density - amount.T @ own
    strength = np.linalg.norm(new, axis=1)
    h = (amount[0] * strength[0]) * h_factor + h_more
    e = (amount[1] * strength[1]) * e_factor + e_more
    density = rest + np.outer(h, new[0] / strength[0]) + np.outer(e, new[1] / strength[1])
    return (256 * np.exp(-density) - 1).clip(0, 255).reshape(pixels.shape)


def middle(pixels: torch.Tensor) -> np.ndarray:
    rim = (STORED - WINDOW) // 2
    return pixels[:, rim:-rim, rim:-rim].numpy()


def made(pixels: torch.Tensor, params: dict[str, torch.Tensor], change: Any) -> np.ndarray:
    """Views in 0..255, float [n, w, w, 3]."""
    views = augment.apply(pixels, params, ViewConfig(), stain=change, **UNIT)
    return 255 * views.permute(0, 2, 3, 1).numpy()


# A view of another stain -------------------------------------------------------------------------


def test_a_synthetic_image_of_known_stains_becomes_that_of_another_slide() -> None:
    stains = known_stains(8)
    rng = np.random.default_rng(1)
    amounts = rng.uniform(0, 1, (8, STORED, STORED, 2)) * (rng.random((8, STORED, STORED, 1)) < 0.8)
    pixels = torch.from_numpy(
        np.stack([tissue(a, w) for a, w in zip(amounts, stains, strict=True)])
    )
    target = np.roll(stains, 1, 0)
    params = {**neutral(8), "stain": torch.from_numpy(target).float(), "restain": torch.ones(8)}
    change = Stains(slides_of(stains), seed=0).change(params, torch.arange(8))
    ours = made(pixels, params, change)
    for i in range(8):
        wanted = middle(torch.from_numpy(tissue(amounts[i], target[i]))[None])[0]
        off = np.abs(ours[i] - wanted)
        # Whole grey levels of the dark source cost more levels where the target is paler.
        assert off.mean() < 1.5 and np.abs(ours[i] - middle(pixels)[i]).mean() > 4 * off.mean()
    assert (ours[amounts[:, 12:-12, 12:-12].sum(-1) == 0] > 254.9).all(), "glass stays glass"


def test_stains_that_macenko_measures_bring_one_image_to_the_other() -> None:
    pair = known_stains(2, seed=3) * np.array([1.0, 1.8])[:, None, None]
    rng = np.random.default_rng(2)
    amounts = rng.gamma(2, 0.3, (400, 400, 2)) * rng.integers(0, 2, (400, 400, 2))
    images = [tissue(amounts, w) for w in pair]
    told = {
        str(i): {"count": 1, "stain": stain.describe(im.reshape(-1, 3))}
        for i, im in enumerate(images)
    }
    stains = Stains(told, seed=0)
    params = {**neutral(1), "stain": stains.own[1:], "restain": torch.ones(1)}
    first, second = (torch.from_numpy(im[:STORED, :STORED])[None] for im in images)
    ours = made(first, params, stains.change(params, torch.tensor([0])))
    apart = np.abs(middle(first).astype(int) - middle(second)).mean()
    off = np.abs(ours - middle(second)).mean()
    assert off < 0.15 * apart and apart > 25, (off, apart)


@pytest.mark.parametrize("policy", ["a1+gmm1", "a1+gmm10", "a1+hed"])
def test_views_equal_a_reference_image_by_image(policy: str) -> None:
    n, known = 30, known_stains(14)
    slides = slides_of(known)
    slides["slide03"]["stain"] = {"vectors": None, "strength": None}
    slides["slide07"] = {"count": 5, "stain": None}
    stains, none = Stains(slides, seed=0), (3, 7)
    both = {"policy": policy, "hed": 0.7, "hed_range": 0.3} if policy != "a1+hed" else {}
    config = ViewConfig.model_validate(
        {"policy": policy, **PLAIN, **both, "restain": 0.8 * bool(both)}
    )
    mixture = stains.mixture(config.gaussians) if both else None
    params = augment.draw(
        config, n, stored=STORED, window=WINDOW, generator=generator(), stains=mixture
    )
    slide = torch.arange(n) % 14
    change = stains.change(params, slide)
    assert change is not None
    pixels = smooth_crops(n, low=20)
    ours = made(pixels, params, change)
    same = 0
    for i, (image, number) in enumerate(zip(middle(pixels), slide.tolist(), strict=True)):
        own = rgb_from_hed[:2] / np.linalg.norm(rgb_from_hed[:2], axis=1, keepdims=True)
        own = own if number in none else known[number]
        swap = bool(both) and number not in none and bool(params["restain"][i])
        new = params["stain"][i].double().numpy() if swap else own
        wanted = restained(image, own, new, params["hed"][i].numpy())
        assert np.abs(ours[i] - wanted).max() < 0.02
        same += np.abs(wanted - image).max() < 0.01
    assert same < n / 2


def test_the_own_stain_changes_nothing() -> None:
    stains = Stains(slides_of(known_stains(5)), seed=0)
    params = {**neutral(5), "stain": stains.own, "restain": torch.ones(5)}
    matrix, summand = stains.change(params, torch.arange(5))  # type: ignore[misc]
    assert (matrix - torch.eye(3)).abs().max() < 1e-6 and not summand.any()
    pixels = smooth_crops(5)
    assert np.abs(made(pixels, params, (matrix, summand)) - middle(pixels)).max() < 2e-3
    assert stains.change(neutral(5), torch.arange(5)) is None


def test_what_the_stains_do_not_explain_stays() -> None:
    known = known_stains(2)
    stains = Stains(slides_of(known), seed=0)
    params = {"stain": stains.own[1:], "restain": torch.ones(1)}
    matrix, _ = stains.change(params, torch.tensor([0]))  # type: ignore[misc]
    across = np.cross(known[0, 0], known[0, 1])
    assert np.allclose(across @ matrix[0].double().numpy(), across, atol=1e-6)
    assert np.allclose(known[0] @ matrix[0].double().numpy(), known[1], atol=1e-5)


# Gaussians over slides ---------------------------------------------------------------------------


def test_points_and_stains() -> None:
    known = known_stains(50)
    points = stain_views.point_of(known)
    again = stain_views.stain_of(torch.from_numpy(points))
    assert np.allclose(again.numpy(), known)
    w = known[0, 1] / np.linalg.norm(known[0, 1])
    assert np.tan(points[0, 2]) == pytest.approx(w[0] / w[1])
    assert np.sin(points[0, 3]) == pytest.approx(w[2])
    assert points[0, 4] == pytest.approx(0.5 * np.log((known[0, 0] ** 2).sum()))


def drawn_points(mixture: Mixture, n: int) -> np.ndarray:
    u = torch.rand(7, n, generator=generator())
    return stain_views.point_of(mixture.draw(u).double().numpy())


def test_one_gaussian_has_the_moments_of_the_slides() -> None:
    points = stain_views.point_of(known_stains(200))
    points[:, 5] += 0.8 * (points[:, 4] - points[:, 4].mean())  # correlated strengths
    found = drawn_points(stain_views.fit(points, 1, seed=0), 100_000)
    wanted, spread = np.cov(points.T, bias=True), points.std(0)
    assert np.abs((found.mean(0) - points.mean(0)) / spread).max() < 0.02
    # 5 % more variance by shrinkage, 2.7 % less by the cut
    scaled = (np.cov(found.T) - wanted) / np.outer(spread, spread)
    assert np.abs(scaled).max() < 0.05
    assert np.corrcoef(found.T)[4, 5] > 0.5
    few = stain_views.fit(points[:11], 1, seed=0)
    assert not few.factors[0].tril(-1).any(), "11 slides say nothing of 15 correlations"


def test_several_gaussians_have_the_moments_of_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0.7, 0.3, 0.3, 0.5, 0.4, 0.0]]) + rng.normal(0, 0.3, (3, 6))
    which = rng.choice(3, 600, p=(0.5, 0.3, 0.2))
    points = centres[which] + rng.normal(0, 0.02, (600, 6)) * rng.uniform(0.5, 2, 6)
    model = GaussianMixture(3, random_state=1, n_init=3).fit(points)
    theirs, _ = model.sample(100_000)
    found = drawn_points(stain_views.fit(points, 3, seed=0), 100_000)
    spread = points.std(0)
    assert np.abs((found.mean(0) - theirs.mean(0)) / spread).max() < 0.03
    scaled = (np.cov(found.T) - np.cov(theirs.T)) / np.outer(spread, spread)
    assert np.abs(scaled).max() < 0.08
    nearest = np.linalg.norm(found[:, None] - centres, axis=2).argmin(1)
    assert np.abs(np.bincount(nearest) / 100_000 - np.bincount(which) / 600).max() < 0.01


def test_no_draw_lies_far_out() -> None:
    points = stain_views.point_of(known_stains(100))
    mixture = stain_views.fit(points, 1, seed=0)
    u = torch.rand(7, 50_000, generator=generator())
    u[1:, 0], u[1:, 1] = 0, 1 - 2**-24  # the least and the largest that there are
    far = stain_views.point_of(mixture.draw(u).double().numpy()) - mixture.means[0].numpy()
    normal = np.linalg.solve(mixture.factors[0].numpy(), far.T)
    assert normal.max() == pytest.approx(CUT, abs=1e-2) and normal[:, 0].max() < -2.9
    assert normal.std() == pytest.approx(0.9866, abs=0.01)  # of a normal cut off at 3


def test_equal_slides_can_be_fitted() -> None:
    points = np.repeat(stain_views.point_of(known_stains(1)), 12, 0)
    found = drawn_points(stain_views.fit(points, 10, seed=0), 1000)
    assert np.abs(found - points[0]).max() < 0.02


def test_another_process_draws_the_same() -> None:
    """Ranks fit for themselves."""
    code = (
        "import json, sys, torch; from lemon_muse.data.stain_views import Stains; "
        "m = Stains(json.load(sys.stdin), seed=5).mixture(10); "
        "print(m.draw(torch.rand(7, 99, generator=torch.Generator().manual_seed(1))).tolist())"
    )
    slides = slides_of(known_stains(40))
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(slides),
        capture_output=True,
        text=True,
        check=True,
    )
    mixture = Stains(slides, seed=5).mixture(10)
    here = mixture.draw(torch.rand(7, 99, generator=generator(1)))
    assert torch.equal(torch.tensor(json.loads(done.stdout)), here)
    other = Stains(slides_of(known_stains(40)), seed=6).mixture(1)
    assert len(other.weights) == 1 and len(mixture.weights) == 10


def test_slides_of_which_a_run_reads_no_nucleus_have_no_part_in_the_fit() -> None:
    known, seed = known_stains(20), 2**40 + 7  # seeds may be as large as torch's
    slides = slides_of(known)
    for name in list(slides)[:8]:
        slides[name]["count"] = 0
    part, alone = Stains(slides, seed=seed), Stains(slides_of(known[8:]), seed=seed)
    assert np.array_equal(part.points, alone.points)
    u = torch.rand(7, 50, generator=generator())
    assert torch.equal(part.mixture(1).draw(u), alone.mixture(1).draw(u))
    with pytest.raises(UserError, match=r"have 12 \(of 12 slides\)"):
        part.mixture(13)


# The contract -----------------------------------------------------------------------------------


def policies() -> Iterator[tuple[ViewConfig, Mixture | None]]:
    stains = Stains(slides_of(known_stains(12)), seed=0)
    for policy in ("a1", "a1+gmm1", "a1+gmm10", "a1+hed"):
        config = ViewConfig.model_validate({"policy": policy})
        yield config, stains.mixture(config.gaussians) if config.restain else None


def test_policies_leave_the_other_numbers_as_they_were() -> None:
    drawn, states = [], []
    for config, mixture in policies():
        g = generator()
        drawn.append(
            augment.draw(config, 40, stored=STORED, window=WINDOW, generator=g, stains=mixture)
        )
        states.append(g.get_state())
        assert config.gray == 0
    for params, state in zip(drawn, states, strict=True):
        assert torch.equal(state, states[0])
        assert all(torch.equal(params[key], value) for key, value in drawn[0].items())
    extra = [set(params) - set(drawn[0]) for params in drawn]
    assert extra == [set(), {"stain", "restain"}, {"stain", "restain"}, {"hed"}]


@pytest.mark.parametrize("given", [{"gaussians": 5}, {"policy": "mild", "hed_range": 0.2}])
def test_a_number_that_nothing_uses_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no effect"):
        ViewConfig.model_validate(given)
    # a policy that is switched off, and saved settings, which hold every field
    off = ViewConfig.model_validate({"policy": "a1+gmm10", "restain": 0})
    for config in (off, ViewConfig(), ViewConfig(hed=0.5, hed_range=0.2)):
        assert ViewConfig.model_validate(config.model_dump()) == config


def test_hed_has_the_distribution_of_the_light_jitter() -> None:
    config = ViewConfig(policy="a1+hed", hed=0.6)
    hed = augment.draw(config, 4000, stored=STORED, window=WINDOW, generator=generator())["hed"]
    on = hed[:, 0] != 1
    assert abs(on.float().mean() - 0.6) < 0.03
    assert (hed[~on] == torch.tensor([1.0, 1, 0, 0])).all()
    off = (hed[on] - torch.tensor([1.0, 1, 0, 0])).double()
    assert 0.0499 < off.abs().max() <= 0.05 + 1e-6 and off.mean(0).abs().max() < 0.002
    assert (off.std(0) - 0.05 / 3**0.5).abs().max() < 0.001
    assert (torch.corrcoef(off.T) - torch.eye(4)).abs().max() < 0.06


@pytest.mark.parametrize("window", [40, 37])
def test_a_row_of_the_batch_is_the_row_alone(window: int) -> None:
    """So ranks, which cut the batch, make the views that one rank would make."""
    n, stored = 70, 64 if window == 40 else 63
    stains = Stains(slides_of(known_stains(12)), seed=0)
    config = ViewConfig(policy="a1+gmm1", hed=0.5)
    pixels = smooth_crops(n)[:, :stored, :stored].contiguous()
    params = augment.draw(
        config,
        n,
        stored=stored,
        window=window,
        generator=generator(),
        stains=stains.mixture(1),
    )
    slide, norm = torch.arange(n) * 5 % 12, {**UNIT, "window": window}
    whole = augment.apply(pixels, params, config, stain=stains.change(params, slide), **norm)
    for at in (slice(0, 35), slice(35, 70), slice(3, 4), slice(31, 64)):
        here = rows(params, at)
        change = stains.change(here, slide[at])
        assert torch.equal(augment.apply(pixels[at], here, config, stain=change, **norm), whole[at])


def test_what_is_missing_is_said() -> None:
    known = known_stains(12)
    with pytest.raises(ValueError, match="stains of the slides"):
        augment.draw(ViewConfig(policy="a1+gmm1"), 4, stored=64, window=40, generator=generator())
    config = ViewConfig(policy="a1+hed")
    params = augment.draw(config, 4, stored=64, window=40, generator=generator())
    with pytest.raises(ValueError, match="give stain="):
        augment.apply(smooth_crops(4), params, config, **UNIT)
    few = Stains(slides_of(known[:9]), seed=0)
    with pytest.raises(UserError, match=r"gaussians=10 needs 10 slides.*have 9.*gaussians=9 or"):
        few.mixture(10)
    one = slides_of(known[:3])
    one["slide00"]["stain"] = None
    one["slide01"]["stain"]["vectors"] = None
    with pytest.raises(UserError, match=r"needs 2 slides.*have 1 \(of 3 slides\); use view.policy"):
        Stains(one, seed=0).mixture(1)
    old = {name: {"count": 5} for name in "abc"}
    with pytest.raises(UserError, match=r"hold no stains.*prep.*a1\+hed"):
        Stains(old, seed=0).mixture(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_makes_the_same_views() -> None:
    stains = Stains(slides_of(known_stains(12)), seed=0)
    config = ViewConfig(policy="a1+gmm1", hed=0.5)
    pixels, slide = smooth_crops(96), torch.arange(96) % 12
    params = augment.draw(
        config, 96, stored=STORED, window=WINDOW, generator=generator(), stains=stains.mixture(1)
    )
    change = stains.change(params, slide)
    here = augment.apply(pixels, params, config, stain=change, **UNIT)
    there = augment.apply(pixels.cuda(), params, config, stain=change, **UNIT)
    assert (there.cpu() - here).abs().max() < 2e-3
