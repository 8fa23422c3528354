"""DINOv2 against plain computations: losses, views, teacher, heads, what has a gradient."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import DropPath
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from lemon_muse import dino
from lemon_muse.config import load
from lemon_muse.encoder import load as load_encoder
from lemon_muse.errors import UserError
from lemon_muse.heads import DINOHead
from lemon_muse.methods.dinov2 import Dinov2
from lemon_muse.methods.dinov2_config import Dinov2Config
from lemon_muse.recipe import Train
from lemon_muse.recipe_dinov2 import Dinov2Train
from lemon_muse.stop import Stop
from tests.methods.dinov2_small import Plain, a_batch, method_of, open_loop, sinkhorn


def stir(method: Dinov2) -> None:
    """A teacher, a mask token and centres of their own, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        method.mask_token.normal_(0, 0.5, generator=generator)
        for centre in method.centres.values():
            centre.value.normal_(0, 0.2, generator=generator)  # type: ignore[operator, union-attr]
        for p in method.teacher.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 * float(p.abs().mean()))


# Losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["method={locals: 0, spread: kde}"],
        ["method={shared_head: true, masks: random, spread_weight: 0.7}"],
        ["method={spread: none, image_weight: 0.3, patch_weight: 2}"],
    ],
    ids=["default", "kde", "shared head", "no spread"],
)
def test_the_loss_is_the_sum_of_plain_loops(
    more: list[str], centring: str, crop_shards: Path, tmp_path: Path
) -> None:
    loop = open_loop(crop_shards, tmp_path, *more, f"method.centring={centring}")
    method, s = method_of(loop), method_of(loop).settings
    method.train()
    stir(method)
    batch, step = a_batch(loop), 3
    plain = Plain(method, batch)
    out = method(batch, step)
    # The teacher's temperature after half of the six steps of its warm-up.
    temperature = 0.04 + 0.03 * 3 / 6
    centres = {
        kind: sinkhorn(plain.teacher_rows(kind), temperature)
        if centring == "sinkhorn"
        else method.centres[kind].value
        for kind in ("image", "patch")
    }
    image = plain.image_loss(centres["image"], temperature)  # type: ignore[arg-type]
    patch = plain.patch_loss(centres["patch"], temperature)  # type: ignore[arg-type]
    torch.testing.assert_close(out["loss_image"], image.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["loss_patch"], patch.detach(), rtol=1e-4, atol=1e-5)
    total = s.image_weight * image + s.patch_weight * patch
    if s.spread != "none":
        weight = {"koleo": 0.1, "kde": 0.05}[s.spread] if s.spread_weight is None else 0.7
        spread = plain.spread(s.spread, 5.0 if s.spread == "kde" else 1e-4)
        torch.testing.assert_close(out["spread"], spread.detach(), rtol=1e-4, atol=1e-5)
        total = total + weight * spread
    assert ("spread" in out) == (s.spread != "none")
    torch.testing.assert_close(out["loss"], total, rtol=1e-4, atol=1e-5)
    parameters = [p for p in [method.mask_token, *method.student.parameters()] if p.requires_grad]
    ours = torch.autograd.grad(out["loss"], parameters)
    theirs = torch.autograd.grad(total, parameters)
    for own, other in zip(ours, theirs, strict=True):
        bound = 1e-5 + 2e-3 * float(other.abs().max())
        torch.testing.assert_close(own, other, rtol=0, atol=bound)


def test_losses_are_fp32_in_bf16(crop_shards: Path, tmp_path: Path) -> None:
    loop = open_loop(crop_shards, tmp_path, "precision=bf16")
    with torch.autocast("cpu", torch.bfloat16):
        out = method_of(loop)(a_batch(loop), 0)
    kinds = {v.dtype for k, v in out.items() if k != "features"}
    assert kinds == {torch.float32} and out["loss"].isfinite()


def test_equal_logits_give_the_chance_level(crop_shards: Path, tmp_path: Path) -> None:
    loop = open_loop(crop_shards, tmp_path, "method.spread=none")
    method = method_of(loop)
    with torch.no_grad():
        for kind in ("image", "patch"):
            method.student[kind].last_layer.weight_v.fill_(1.0)  # type: ignore[union-attr, operator]
    loss = float(method(a_batch(loop), 0)["loss"].detach())
    assert method.chance() == pytest.approx(math.log(40) + 0.5 * math.log(30))
    assert loss == pytest.approx(method.chance(), rel=1e-4)


# Views and masks --------------------------------------------------------------------------------


def test_a_local_view_is_a_crop_of_anywhere_in_the_window(
    crop_shards: Path, tmp_path: Path
) -> None:
    """Without colour and rotation it is a resized crop of the central window."""
    plain = "view={rotate: false, jitter: 0, gray: 0, blur: [0, 0], erase: 0, hflip: 0}"
    words = [plain, "method.local_blur=0", "method.local_scale=[0.1, 0.5]", "normalise=imagenet"]
    loop = open_loop(crop_shards, tmp_path, *words)
    method, batch = method_of(loop), a_batch(loop)
    views = method.views.make(batch)
    assert [v.shape[-1] for v in views] == [24, 24, 16, 16]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loop.setting.mean, loop.setting.std))
    corners = []
    for view, row in zip(views[2:], batch["views"][2:4], strict=True):
        for i, image in enumerate(view):
            theta = row["theta"][i] * 16  # of crops of 32 px, from their middle
            width, height = 2 * float(theta[0, 0]), 2 * float(theta[1, 1])
            left, top = (float(theta[a, 2]) + 16 - d / 2 for a, d in ((0, width), (1, height)))
            assert 0.0999 <= width * height / 24**2 <= 0.5001
            corners.append((left, top, left + width, top + height))
            stored = batch["pixels"][i].permute(2, 0, 1).float() / 255
            # Crops are not rounded to whole pixels: read them off an enlarged picture.
            grid = [left + (k + 0.5) * width / 16 - 0.5 for k in range(16)]
            whole = tv.resize(stored, [32 * 8, 32 * 8], antialias=False)
            x = [min(255, round((g + 0.5) * 8 - 0.5)) for g in grid]
            y = [min(255, round((top + (k + 0.5) * height / 16) * 8 - 0.5)) for k in range(16)]
            expected = whole[:, y][:, :, x]
            assert (image * std + mean - expected).abs().mean() < 0.02
    found = torch.tensor(corners)
    assert found.min() >= 4 - 1e-4 and found.max() <= 28 + 1e-4  # the central 24 px, all of them
    assert found[:, 0].min() < 5.5 and found[:, 2].max() > 26.5


def test_a_local_view_beyond_the_stored_crop_is_mirrored(crop_shards: Path, tmp_path: Path) -> None:
    """As global ones are: moved by up to 4 px and turned, both reach beyond crops of 32 px."""
    plain = "view={shift: 4, jitter: 0, gray: 0, blur: [0, 0], erase: 0}"
    loop = open_loop(crop_shards, tmp_path, plain, "method.local_blur=0", "method.locals=8")
    method, batch = method_of(loop), a_batch(loop)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (loop.setting.mean, loop.setting.std))
    stored, beyond = batch["pixels"].permute(0, 3, 1, 2).float() / 255, 0
    for view, row in zip(method.views.make(batch), batch["views"], strict=False):
        grid = F.affine_grid(row["theta"], list(view.shape), align_corners=False)
        found = [
            F.grid_sample(stored, grid, padding_mode=mode, align_corners=False)
            for mode in ("reflection", "border")
        ]
        torch.testing.assert_close(view * std + mean, found[0], rtol=0, atol=1e-4)
        beyond += view.shape[-1] == 16 and bool((found[0] - found[1]).abs().max() > 0.05)
    assert beyond > 0


def test_local_views_lie_anywhere_also_where_global_ones_are_centred(
    crop_shards: Path, tmp_path: Path
) -> None:
    loop = open_loop(crop_shards, tmp_path, "view={policy: size, shift: 0, hflip: 0}")
    rows = method_of(loop).draw(200, torch.Generator().manual_seed(0))
    apart = [(row["theta"][:, :, 2] * 16).norm(dim=1).max() for row in rows[:4]]
    assert max(apart[:2]) < 1e-5 and min(apart[2:]) > 5


def test_masks_come_last_and_views_do_not_depend_on_them(crop_shards: Path, tmp_path: Path) -> None:
    def drawn(*words: str) -> list[dict[str, torch.Tensor]]:
        method = method_of(open_loop(crop_shards, tmp_path, *words))
        return method.draw(64, torch.Generator().manual_seed(7))

    rows, again, plain = drawn(), drawn("method.masks=random"), drawn("method.patch_weight=0")
    assert len(rows) == len(again) == 5 and len(plain) == 4
    assert rows[-1].keys() == {"mask"} and rows[-1]["mask"].shape == (64, 2, 9)
    # Half of all global views of the global batch, not of each sample or rank.
    assert int(rows[-1]["mask"].any(2).sum()) == 64
    assert len(set(rows[-1]["mask"].any(2).sum(1).tolist())) == 3
    assert not torch.equal(rows[-1]["mask"], again[-1]["mask"])
    none = drawn("method.locals=0")
    for row, other in zip(rows[:4], again[:4], strict=True):
        assert all(torch.equal(row[k], other[k]) for k in row)
    for row, other in zip(rows[:2], none[:2], strict=True):
        assert all(torch.equal(row[k], other[k]) for k in row)


def test_a_step_has_its_masks_from_seed_and_step(crop_shards: Path, tmp_path: Path) -> None:
    loop, other = (open_loop(crop_shards, tmp_path, f"seed={seed}") for seed in (0, 1))
    at = {(w, s): a_batch(w, s)["views"][-1]["mask"] for w in (loop, other) for s in (0, 5)}
    assert torch.equal(at[loop, 5], a_batch(loop, 5)["views"][-1]["mask"])
    assert not torch.equal(at[loop, 0], at[loop, 5])
    assert not torch.equal(at[loop, 5], at[other, 5])


def test_global_scale_replaces_that_of_the_view(crop_shards: Path, tmp_path: Path) -> None:
    loop = open_loop(crop_shards, tmp_path, "method.global_scale=[0.5, 0.6]", "view.rotate=false")
    for row in method_of(loop).draw(100, torch.Generator())[:2]:
        area = row["theta"][:, 0, 0] * row["theta"][:, 1, 1] * (32 / 24) ** 2
        assert area.abs().min() >= 0.4999 and area.abs().max() <= 0.6001


# Networks ---------------------------------------------------------------------------------------


def test_the_teacher_is_the_student_at_step_0(crop_shards: Path, tmp_path: Path) -> None:
    method = method_of(open_loop(crop_shards, tmp_path))
    student, teacher = method.student.state_dict(), method.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert not [k for k in student if not torch.equal(student[k], teacher[k])]
    assert not any(p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize(
    ("more", "untrained"),
    [
        ([], set()),
        (["method.locals=0"], set()),
        (["method.spread=kde"], set()),
        (["method.shared_head=true"], set()),
        (["method.patch_weight=0"], {"mask_token", "student.patch"}),
        (["method.mask_share=0"], {"mask_token", "student.patch"}),
        (["method.image_weight=0"], {"student.image"}),
        (["method={image_weight: 0, shared_head: true}"], set()),
        (["method={patch_weight: 0, shared_head: true}"], {"mask_token"}),
        (["backbone={freeze_patch: true, sincos: true}"], {"pos_embed", "patch_embed"}),
    ],
    ids=lambda value: " ".join(sorted(value)) or "none",
)
def test_every_trained_parameter_gets_a_gradient(
    more: list[str], untrained: set[str], crop_shards: Path, tmp_path: Path
) -> None:
    """DDP waits for those that get none."""
    loop = open_loop(crop_shards, tmp_path, *more)
    method = method_of(loop).train()
    # Rows that are all masked or all seen: no rank may depend on its luck.
    for nothing in (False, True):
        method.zero_grad(set_to_none=True)
        batch = a_batch(loop)
        if nothing and "mask" in batch["views"][-1]:
            batch["views"][-1]["mask"][:] = False
        method(batch, 0)["loss"].backward()
        without = {n for n, p in method.named_parameters() if p.grad is None}
        frozen = {n for n, p in method.named_parameters() if not p.requires_grad}
        assert without == frozen
        ours = {n for n in frozen if not n.startswith("teacher.")}
        assert all(any(u in n for u in untrained) for n in ours)
        assert all(any(u in n for n in ours) for u in untrained)
    trained = {id(p) for g in method.param_groups() for p in g["params"]}
    assert trained == {id(p) for p in method.parameters() if p.requires_grad}


def test_only_the_student_drops(crop_shards: Path, tmp_path: Path) -> None:
    words = "backbone.args={depth: 2, embed_dim: 48, drop_path_rate: 0.5, proj_drop_rate: 0.2}"
    method = method_of(open_loop(crop_shards, tmp_path, words)).train()
    x = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert any(isinstance(m, DropPath) and m.drop_prob > 0 for m in method.student.modules())
    for net, drops in ((method.student["backbone"], True), (method.teacher["backbone"], False)):
        assert torch.equal(net(x)[0], net(x)[0]) != drops


def test_ema_centres_and_frozen_prototypes(crop_shards: Path, tmp_path: Path) -> None:
    words = ["method.centring=centre", "optim.warmup=0", "method.freeze_last=0.05"]
    loop = open_loop(crop_shards, tmp_path, *words)
    method = method_of(loop)
    for step in range(2):
        batch = a_batch(loop, step)
        start = copy.deepcopy(method)
        plain = Plain(start, batch)
        loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
        value = 1 - 0.008 * (1 + math.cos(math.pi * step / 20)) / 2
        for name, p in method.teacher.named_parameters():
            moved = value * start.teacher.get_parameter(name) + (1 - value) * (
                method.student.get_parameter(name)
            )
            torch.testing.assert_close(p.data, moved.data, rtol=0, atol=1e-6)
        for kind in ("image", "patch"):
            before, after = start.centres[kind].value, method.centres[kind].value
            moved = 0.9 * before + 0.1 * plain.teacher_rows(kind).mean(0)  # type: ignore[operator]
            torch.testing.assert_close(after, moved, rtol=1e-4, atol=1e-6)
            name = f"{kind}.last_layer.weight_v"
            same = torch.equal(
                method.student.get_parameter(name), start.student.get_parameter(name)
            )
            assert same == (step == 0)


def test_parts_of_a_step_move_a_centre_together(crop_shards: Path, tmp_path: Path) -> None:
    values = []
    for parts in (1, 2):
        loop = open_loop(
            crop_shards, tmp_path / str(parts), "method.centring=centre", f"accumulate={parts}"
        )
        loop._one_step(loop.method, loop.batches.batch_at(0), Stop())
        values.append(method_of(loop).centres["patch"].value)
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("export", ["teacher", "student"])
def test_what_is_exported_is_a_plain_timm_network(
    export: str, crop_shards: Path, tmp_path: Path
) -> None:
    loop = open_loop(crop_shards, tmp_path, f"method.export={export}", "method.momentum=0.9")
    stir(method_of(loop))
    folder = loop.export({})
    encoder = load_encoder(folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 24, 24)
    source = getattr(method_of(loop), export)["backbone"].eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), source(x)[0])
        torch.testing.assert_close(model(x), source(x)[0])
    assert not [k for k in encoder.network.state_dict() if "mask" in k]


def test_networks_for_compilation_are_what_is_called(crop_shards: Path, tmp_path: Path) -> None:
    loop = open_loop(crop_shards, tmp_path)
    called: set[int] = set()
    for net in method_of(loop).networks():
        net.register_forward_hook(lambda m, _i, _o: called.add(id(m)))
    method_of(loop)(a_batch(loop), 0)
    assert called == {id(n) for n in method_of(loop).networks()} and len(called) == 2


# Alarms, words, rates ---------------------------------------------------------------------------


def test_collapses_are_reported(crop_shards: Path, tmp_path: Path) -> None:
    method = method_of(open_loop(crop_shards, tmp_path))
    fine = {"entropy_image": 1.5, "kl_image": 1.0, "entropy_patch": 1.5, "kl_patch": 0.9}
    assert method.judge({"step": 19, **fine}) is None
    for kind, count in (("image", 40), ("patch", 30)):
        flat = {**fine, f"entropy_{kind}": math.log(count), f"kl_{kind}": 0.001}
        assert method.judge({"step": 1, **flat}) is None  # too early to say
        said = method.judge({"step": 10, **flat})
        assert said is not None and kind in said and "chance" in said
        said = method.judge({"step": 1, **fine, f"entropy_{kind}": 0.01, f"kl_{kind}": 0.01})
        assert said is not None and kind in said and "one-hot" in said
    assert method.judge({"step": 10, **fine, "entropy_patch": 0.0, "kl_patch": 0.0}) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["method.local_size=20"],
            "local_size=20 px cannot be cut into patches of 8 px .* take 16",
        ),
        (["method.local_size=32"], "local_size=32 px must be at most window=24"),
        (["method.local_size=15"], "local_size=15 px must be .* even or odd"),
        (
            ["backbone={name: deit_tiny_distilled_patch16_224, patch: 8}"],
            "need a plain ViT of timm",
        ),
        (["backbone.pool=avg"], "set backbone.pool=token"),
        (["method.local_scale=[0.3, 0.1]"], "give the smaller number first"),
        (["method.teacher_temperature=[0, 0.04]"], "is 0: input should be greater than 0"),
        (["method={image_weight: 0, mask_share: 0}"], "nothing would be learnt"),
    ],
)
def test_words_that_do_not_fit(
    words: list[str], said: str, crop_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        open_loop(crop_shards, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_without_local_views_their_size_does_not_matter(crop_shards: Path, tmp_path: Path) -> None:
    loop = open_loop(crop_shards, tmp_path, "method.locals=0", "method.local_size=999")
    assert len(method_of(loop).views.views) == 2


def test_the_defaults_are_the_references(tmp_path: Path) -> None:
    cfg = load(Train, ["data=x", "method={name: dinov2}"])
    assert isinstance(cfg, Dinov2Train)
    assert not cfg.backbone.freeze_patch and not cfg.backbone.sincos
    assert cfg.method.weight_of_spread == 0.1
    assert Dinov2Config(spread="kde").weight_of_spread == 0.05
    assert Dinov2Config(spread="none", spread_weight=3.0).weight_of_spread == 0
    optim = cfg.optim
    # The root rule: four times the batch, twice the rate; the peak comes after a tenth of the run.
    assert optim.rate(100, 1000, 1024) == pytest.approx(2e-4)
    assert optim.rate(100, 1000, 4096) == pytest.approx(4e-4)
    assert optim.rate(50, 1000, 4096) == pytest.approx(2e-4)
    assert optim.decay(0, 1000) == pytest.approx(0.04) and optim.decay(1000, 1000) == pytest.approx(
        0.4
    )


def test_heads_are_apart_unless_shared(crop_shards: Path, tmp_path: Path) -> None:
    for shared, names in (("false", {"image", "patch"}), ("true", {"image"})):
        method = method_of(open_loop(crop_shards, tmp_path, f"method.shared_head={shared}"))
        assert {k for k, m in method.student.items() if isinstance(m, DINOHead)} == names
        centre = method.centres["patch"]
        assert isinstance(centre, dino.Centre)
        assert len(centre.value) == (40 if shared == "true" else 30)
