"""Views that keep the size, the wider field, and the masked environment."""

import math

import numpy as np
import pytest
import torch
from skimage.measure import label, regionprops

from lemon_muse.backbones import Backbone
from lemon_muse.data import augment
from lemon_muse.data.augment import ViewConfig
from lemon_muse.errors import UserError
from lemon_muse.methods import context
from lemon_muse.methods.context import ContextConfig, ContextViews
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.crop_views import CropViews
from lemon_muse.methods.moco_v3 import MoCoV3, MoCoV3Config
from tests.methods.test_moco_v3 import plain_info_nce

SMALL = Backbone(name="vit_tiny", patch=8, heads=3, args={"depth": 1, "embed_dim": 24})
PLAIN = ViewConfig(
    rotate=False, scale=(1, 1), ratio=(1, 1), hflip=0, jitter=0, gray=0, blur=(0, 0), erase=0
)  # fmt: skip
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def told(view: ViewConfig = PLAIN, **changes: object) -> Setting:
    facts = {"steps": 10, "batch": 12, "stored": 128, "window": 40, "mpp": 0.25, "seed": 0}
    facts |= {**UNIT, "view": view, "backbone": SMALL}
    return Setting(**{**facts, **changes})  # type: ignore[arg-type]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, size: int = 128) -> torch.Tensor:
    return torch.randint(0, 256, (n, size, size, 3), generator=seeded(), dtype=torch.uint8)


def drawn(views: CropViews, pixels: torch.Tensor, seed: int = 0) -> dict:
    return {"pixels": pixels, "views": views.draw(len(pixels), seeded(seed))}


# Policy size ------------------------------------------------------------------------------------


def ellipses(n: int, size: int = 64) -> torch.Tensor:
    """Dark ellipses of axes 13 x 8 px, smooth edges, at any angle, on white."""
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    out = np.zeros((n, size, size))
    for i, angle in enumerate(np.linspace(0, np.pi, n)):
        u, v = (
            x * np.cos(angle) + y * np.sin(angle),
            y * np.cos(angle) - x * np.sin(angle),
        )
        out[i] = 1 / (1 + np.exp(-8 * (1 - np.hypot(u / 6.5, v / 4))))
    return torch.from_numpy(255 - 200 * out).to(torch.uint8)[..., None].repeat(1, 1, 1, 3)


def shapes(policy: str) -> np.ndarray:
    """Area and eccentricity [n, 2] of the ellipse in views of a policy, colours switched off."""
    view = ViewConfig(policy=policy, jitter=0, gray=0, erase=0, blur=(0, 0))  # type: ignore[arg-type]
    params = augment.draw(view, 60, stored=64, window=40, generator=seeded())
    made = augment.apply(ellipses(60), params, view, window=40, **UNIT)[:, 0].numpy()
    found = [regionprops(label(image < 155 / 255)) for image in made]
    assert all(len(regions) == 1 for regions in found) or policy != "size"
    return np.array([(r[0].area, r[0].eccentricity) for r in found])


def test_policy_size_keeps_area_and_eccentricity() -> None:
    kept, lemon = shapes("size"), shapes("a1+gray")
    truth = math.sqrt(1 - (4 / 6.5) ** 2)
    assert np.abs(kept[:, 0] / (np.pi * 6.5 * 4) - 1).max() < 0.06
    assert np.abs(kept[:, 1] - truth).max() < 0.05
    # what it mends: LEMON's views of the same ellipses differ in both
    assert lemon[:, 0].std() > 8 * kept[:, 0].std() and lemon[:, 1].std() > 4 * kept[:, 1].std()


def test_policy_size_moves_and_turns_inside_the_stored_crop() -> None:
    view = ViewConfig(policy="size")
    assert augment.reach(view, 40) <= 32 and augment.stored_size(view, 40) == 64
    theta = augment.draw(view, 2000, stored=64, window=40, generator=seeded())["theta"]
    linear = theta[:, :, :2].double() * 64 / 40
    # orthogonal up to float32: nothing is scaled in any direction
    turned = linear @ linear.transpose(1, 2)
    assert (turned - torch.eye(2, dtype=torch.double)).abs().max() < 1e-5
    moved = theta[:, :, 2] * 32
    assert 3.6 < float(moved.abs().max()) <= 3.7
    assert abs(float((torch.linalg.det(linear) < 0).double().mean()) - 0.5) < 0.05


# The wider field --------------------------------------------------------------------------------


@pytest.mark.parametrize("zoom", [1.5, 2.0, 2.5])
def test_the_wide_view_shows_the_field_asked(zoom: float) -> None:
    """Dots at known places of the stored crop lie at place / zoom in the view, however turned."""
    places = np.array([[0, 0], [26, 8], [-16, 20], [4, -28]], float)
    pixels = torch.full((8, 160, 160, 3), 255, dtype=torch.uint8)
    for x, y in places.astype(int) + 80:
        pixels[:, y - 2 : y + 2, x - 2 : x + 2] = 0
    turning = PLAIN.model_copy(update={"rotate": True})
    for view in (PLAIN, turning):
        views = ContextViews(
            ContextConfig(mode="positive", zoom=zoom, share=1), told(view, stored=160)
        )
        made = views.make(drawn(views, pixels))[1]
        for image in 1 - made[:, 0].numpy():
            dots = regionprops(label(image > 0.08), intensity_image=image)
            found = np.array([d.centroid_weighted[::-1] for d in dots]) + 0.5 - 20
            assert len(found) == 4
            for place in places if view is PLAIN else ():
                assert np.hypot(*(found - place / zoom).T).min() < 0.3
            radii = np.sort(np.hypot(*found.T))
            np.testing.assert_allclose(radii, np.sort(np.hypot(*places.T)) / zoom, atol=0.35)


def test_a_wide_view_of_zoom_two_is_the_mean_of_blocks() -> None:
    pixels = noise(5)
    views = ContextViews(ContextConfig(mode="positive", zoom=2, share=1), told())
    made = views.make(drawn(views, pixels))[1].numpy()
    for i in range(5):
        for c in range(3):
            field = pixels[i, 24:104, 24:104, c].double().numpy()
            blocks = field.reshape(40, 2, 40, 2).mean((1, 3))
            assert np.abs(255 * made[i, c] - blocks).max() <= 0.5 + 1e-3


def test_only_a_share_is_wide_and_the_rest_is_as_without() -> None:
    view, n = ViewConfig(), 400
    views = ContextViews(ContextConfig(mode="positive", share=0.3), told(view))
    plain = CropViews(told(view))
    with_, without = views.draw(n, seeded(3)), plain.draw(n, seeded(3))
    wide = with_[1]["wide"]
    assert abs(float(wide.float().mean()) - 0.3) < 0.06
    for row, other in zip(with_, without, strict=True):
        assert all(torch.equal(row[key], other[key]) for key in other if key != "theta")
    assert torch.equal(with_[0]["theta"], without[0]["theta"])
    assert torch.equal(with_[1]["theta"][~wide], without[1]["theta"][~wide])
    field = with_[1]["theta"][wide][:, :, :2].norm(dim=1) * 128 / 40
    assert torch.allclose(field, torch.full_like(field, 2.0), atol=1e-5)
    pixels = noise(12)
    first = {"pixels": pixels, "views": [{k: v[:12] for k, v in row.items()} for row in with_]}
    made = views.make(first)
    same = plain.make({**first, "views": [{k: v[:12] for k, v in r.items()} for r in without]})
    here = wide[:12]
    assert here.any() and not here.all()
    assert torch.equal(made[0], same[0]) and torch.equal(made[1][~here], same[1][~here])
    assert (made[1][here] - same[1][here]).abs().amax((1, 2, 3)).min() > 0.1


def test_rows_of_a_batch_are_the_batch_of_the_rows() -> None:
    for mode in ("positive", "environment"):
        views = ContextViews(ContextConfig(mode=mode), told(ViewConfig()))
        batch = drawn(views, noise(10))
        whole = views.make(batch)
        part = {"pixels": batch["pixels"][3:8]}
        part["views"] = [{k: v[3:8] for k, v in row.items()} for row in batch["views"]]
        assert all(torch.equal(a, b[3:8]) for a, b in zip(views.make(part), whole, strict=True))


# The masked environment -------------------------------------------------------------------------


def test_the_disc_has_the_mean_of_the_rest() -> None:
    pixels = noise(2, 24)
    made = context.masked(pixels, 5.0)
    for i in range(2):
        for c in range(3):
            rest = [
                int(pixels[i, y, x, c])
                for y in range(24)
                for x in range(24)
                if math.hypot(y - 11.5, x - 11.5) > 5
            ]
            for y in range(24):
                for x in range(24):
                    inside = math.hypot(y - 11.5, x - 11.5) <= 5
                    wanted = np.mean(rest) if inside else float(pixels[i, y, x, c])
                    assert abs(float(made[i, y, x, c]) - wanted) <= (0.5 if inside else 0)


def test_no_trace_of_the_nucleus_is_left_in_its_environment() -> None:
    """Whatever lies within the radius changes no bit of the view; what lies outside does."""
    setting = told(ViewConfig())
    views = ContextViews(ContextConfig(mode="environment", radius=5), setting)
    batch = drawn(views, noise(6))
    far = torch.from_numpy(np.hypot(*(np.mgrid[:128, :128] + 0.5 - 64)))
    other = 255 - batch["pixels"]
    inside = torch.where((far <= 20)[..., None], other, batch["pixels"])  # 5 µm at 0.25 µm/px
    ring = torch.where(((far > 20) & (far < 24))[..., None], other, batch["pixels"])
    third = views.make(batch)[2]
    assert torch.equal(views.make({**batch, "pixels": inside})[2], third)
    assert not torch.equal(views.make({**batch, "pixels": ring})[2], third)
    assert not torch.equal(views.make({**batch, "pixels": inside})[0], views.make(batch)[0])


def test_the_environment_loss_is_a_plain_loop() -> None:
    settings = MoCoV3Config(
        hidden=16, out_dim=8, context=ContextConfig(mode="environment", weight=0.5)
    )
    method = MoCoV3(settings, told(ViewConfig())).train()
    batch = drawn(method.views, noise(12))
    branch = method.environment
    assert branch is not None and len(batch["views"]) == 3
    out = method(batch, 0)
    with torch.no_grad():
        views = method.views.make(batch)
        around = branch.projector(branch.backbone(views[2])).numpy()
        total = 0.0
        for view in views[:2]:
            cell = branch.cell_predictor(branch.cell_projector(method.base["backbone"](view)))
            total += plain_info_nce(cell.numpy(), around, 0.2) / 2
            total += plain_info_nce(around, cell.numpy(), 0.2) / 2
        alone = MoCoV3(settings.model_copy(update={"context": ContextConfig()}), told(ViewConfig()))
        plain = alone.train()({**batch, "views": batch["views"][:2]}, 0)["loss"]
    assert float(out["loss_environment"]) == pytest.approx(total, rel=1e-4)
    assert float(out["loss"].detach()) == pytest.approx(float(plain) + 0.5 * total, rel=1e-4)
    assert method.chance() == pytest.approx(1.5 * 4 * 0.2 * math.log(12))
    out["loss"].backward()
    # the environment's own network learns, and nothing that trains is left without a gradient
    trained = {id(p) for group in method.param_groups() for p in group["params"]}
    assert {id(p) for p in method.parameters() if p.requires_grad} == trained
    assert not [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert set(method.encoder().network.state_dict()) == set(method.base["backbone"].state_dict())


@pytest.mark.parametrize(
    ("changes", "stored", "said"),
    [
        ({"mode": "positive", "zoom": 2}, 64, r"crops of 114 px .* but 64 px .* size=128'"),
        ({"mode": "environment", "zoom": 2.5}, 128, r"size=144'"),
        ({"mode": "environment", "radius": 10}, 128, r"masks the whole field of 20 µm"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict, stored: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ContextViews(ContextConfig(**changes), told(ViewConfig(), stored=stored))
    if changes.get("radius", 5) == 5:
        size = int(said.split("size=")[1].rstrip("'"))
        ContextViews(ContextConfig(**changes), told(ViewConfig(), stored=size))


@pytest.mark.parametrize("window", [39, 41])
def test_a_window_without_a_middle_is_refused_before_the_run_begins(window: int) -> None:
    with pytest.raises(UserError, match=r"crops of 128 px; use an even window=, as"):
        CropViews(told(window=window))
    CropViews(told(window=window, stored=127))
    with pytest.raises(UserError, match=r"crops of 127 px; use an odd window=, as 39 or 41"):
        CropViews(told(stored=127))


@pytest.mark.parametrize(
    "given",
    [
        {"zoom": 3},
        {"share": 0.2},
        {"mode": "positive", "radius": 4},
        {"mode": "environment", "share": 0.2},
    ],
)
def test_what_the_mode_does_not_use_is_refused(given: dict) -> None:
    with pytest.raises(ValueError, match="has no effect with mode="):
        ContextConfig.model_validate(given)


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "positive", "zoom": 3, "share": 0.2},
        {"mode": "environment", "zoom": 3, "radius": 4, "weight": 2},
        {},
    ],
)
def test_saved_surroundings_are_read_again(given: dict) -> None:
    config = ContextConfig.model_validate(given)
    assert ContextConfig.model_validate(config.model_dump()) == config
