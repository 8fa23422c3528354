"""Masks, the masked pass of a ViT and the loss of masked patches, each against something plain."""

import math

import numpy as np
import pytest
import timm
import torch
from scipy import ndimage
from torch.nn import functional as F

from lemon_muse.backbones import Backbone, build
from lemon_muse.errors import UserError
from lemon_muse.heads import DINOHead
from lemon_muse.masking import TokenViT, draw_masks, patch_loss
from lemon_muse.matching import Teacher

# Masks ------------------------------------------------------------------------------------------


def masks(count: int = 400, grid: tuple[int, int] = (5, 5), seed: int = 0, **more: object):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    return draw_masks(count, grid, generator, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["block", "random"])
@pytest.mark.parametrize("grid", [(5, 5), (2, 2), (3, 7)])
def test_half_of_the_images_are_masked_by_evenly_spread_ratios(
    kind: str, grid: tuple[int, int]
) -> None:
    found = masks(400, grid, kind=kind)
    patches = grid[0] * grid[1]
    assert found.shape == (400, patches) and found.dtype == torch.bool
    counts = found.sum(1)
    assert int((counts > 0).sum()) == 200
    # DINOv2's ratios: one of each of 200 equal steps between 0.1 and 0.5.
    edges = np.linspace(0.1, 0.5, 201)
    lowest = np.maximum(1, np.floor(edges[:-1] * patches + 1e-6))
    highest = np.maximum(1, np.floor(edges[1:] * patches + 1e-6))
    ordered = np.sort(counts[counts > 0].numpy())
    assert (ordered >= lowest).all() and (ordered <= highest).all()


def test_which_images_and_patches_is_chance() -> None:
    found = masks(4000)
    first, second = found.any(1).view(2, 2000).float().mean(1)
    assert abs(float(first - second)) < 0.06
    alone = masks(4000, kind="random").float().mean(0)
    assert float(alone.max() - alone.min()) < 0.05  # every patch alike


def test_masks_are_a_function_of_the_generator() -> None:
    assert torch.equal(masks(seed=3), masks(seed=3))
    assert not torch.equal(masks(seed=3), masks(seed=4))
    # What is drawn afterwards does not depend on how masks are made.
    after = []
    for more in ({}, {"kind": "random"}, {"ratio": (0.3, 0.3)}):
        generator = torch.Generator().manual_seed(1)
        draw_masks(20, (5, 5), generator, **more)  # type: ignore[arg-type]
        after.append(torch.rand(3, generator=generator))
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])


def test_blocks_hang_together() -> None:
    def pieces(kind: str) -> float:
        found = masks(400, (8, 8), kind=kind, ratio=(0.3, 0.4))
        return float(np.mean([ndimage.label(m.view(8, 8).numpy())[1] for m in found if m.any()]))

    assert pieces("block") < 0.6 * pieces("random")


@pytest.mark.parametrize(("share", "images"), [(0.0, 0), (1.0, 7), (0.3, 2)])
def test_the_share_of_masked_images(share: float, images: int) -> None:
    assert int(masks(7, share=share).any(1).sum()) == images
    assert bool(masks(7, share=1.0, ratio=(1.0, 1.0)).all())


# The pass ---------------------------------------------------------------------------------------

SMALL = {"depth": 2, "embed_dim": 48}
NETS = {
    "as LEMON": Backbone(name="vit_tiny", patch=8, heads=3, args=SMALL),
    "learnt positions": Backbone(name="vit_tiny", patch=8, heads=3, sincos=False, args=SMALL),
    "registers": Backbone(
        name="vit_small_patch14_reg4_dinov2", patch=8, heads=3, args={**SMALL, "init_values": 0.1}
    ),
}


def network(settings: Backbone) -> TokenViT:
    vit = build(settings, 40, seed=0)
    with torch.no_grad():  # class token and biases that are not nearly 0
        for p in vit.parameters():
            if p.ndim == 1 or p.shape[1] == 1:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    return TokenViT(vit).eval()


def images(n: int = 3, side: int = 40) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("masked", [False, True])
def test_without_a_masked_patch_it_is_timms_network(name: str, masked: bool) -> None:
    net, x = network(NETS[name]), images()
    nothing = torch.zeros(3, 25, dtype=torch.bool) if masked else None
    with torch.no_grad():
        cls, patches = net(x, nothing, torch.full((48,), 9.0))
        whole = net.vit.forward_features(x)
        torch.testing.assert_close(cls, whole[:, 0])
        torch.testing.assert_close(patches, whole[:, net.vit.num_prefix_tokens :])
        torch.testing.assert_close(cls, net.vit(x))  # what is exported


@pytest.mark.parametrize("name", NETS)
def test_masked_patches_are_the_token_and_keep_their_positions(name: str) -> None:
    net, x = network(NETS[name]), images()
    mask = masks(3, share=1.0)
    token = torch.randn(48, generator=torch.Generator().manual_seed(3)).requires_grad_()
    cls, patches = net(x, mask, token)

    def replace(_module: object, _inputs: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        for b in range(3):
            for n in mask[b].nonzero()[:, 0].tolist():
                out[b, n] = token.detach()
        return out

    hook = net.vit.patch_embed.register_forward_hook(replace)
    whole = net.vit.forward_features(x)
    hook.remove()
    torch.testing.assert_close(cls, whole[:, 0])
    torch.testing.assert_close(patches, whole[:, net.vit.num_prefix_tokens :])
    (cls.sum() + patches.sum()).backward()
    assert token.grad is not None and token.grad.abs().max() > 0
    # What lies under a mask is not seen.
    hidden = mask.view(3, 1, 5, 1, 5, 1).expand(3, 3, 5, 8, 5, 8).reshape(3, 3, 40, 40)
    again = net(torch.where(hidden, 7.0, x), mask, token)
    torch.testing.assert_close(again[1], patches)


def test_an_unmasked_batch_gives_the_token_a_gradient_of_zero() -> None:
    """Not a missing one: other ranks would wait for it."""
    net, token = network(NETS["as LEMON"]), torch.zeros(48, requires_grad=True)
    net(images(), torch.zeros(3, 25, dtype=torch.bool), token)[0].sum().backward()
    assert token.grad is not None and not token.grad.any()


@pytest.mark.parametrize("name", NETS)
def test_a_small_view_has_the_positions_of_the_whole_window(name: str) -> None:
    """As timm's network of 24 px with the table resampled by torch's bicubic."""
    net, x = network(NETS[name]), images(side=24)
    other = timm.create_model(
        "vit_small_patch14_reg4_dinov2" if name == "registers" else "vit_tiny_patch16_224",
        num_classes=0, img_size=24, patch_size=8, num_heads=3, global_pool="token",
        **NETS[name].args,
    ).eval()  # fmt: skip
    state = dict(net.vit.state_dict())
    table = state["pos_embed"]
    leading, grid = table[:, :-25], table[:, -25:].reshape(1, 5, 5, 48).permute(0, 3, 1, 2)
    moved = F.interpolate(grid, (3, 3), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([leading, moved.flatten(2).transpose(1, 2)], 1)
    other.load_state_dict(state)
    with torch.no_grad():
        cls, patches = net(x)
        torch.testing.assert_close(cls, other(x))
        assert patches.shape == (3, 9, 48)


def test_the_middle_patch_of_a_small_view_lies_in_the_middle() -> None:
    """A table that is a ramp stays one: corner cells move inwards, the middle stays."""
    net = network(NETS["as LEMON"])
    ramp = torch.arange(25.0).view(1, 25, 1).expand(1, 25, 48) % 5  # the column
    net.vit.pos_embed.data[:, 1:] = ramp
    found = net._with_positions(torch.zeros(1, 9, 48), (3, 3))[0, 1:, 0].detach().view(3, 3)
    # Cells of a third of the window: middles at 5/6, 5/2 and 25/6 of its five columns.
    assert float(found[1, 1]) == pytest.approx(2.0, abs=1e-5)
    assert float(found[0, 0]) == pytest.approx(5 / 6 - 0.5, abs=0.1)
    assert torch.allclose(found[0] + found[0].flip(0), torch.full((3,), 4.0), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Backbone(name="resnet18"), "plain ViT of timm, not a ResNet"),
        (Backbone(patch=8, pool="avg", args=SMALL), "set backbone.pool=token"),
        (Backbone(args={**SMALL, "patch_drop_rate": 0.5}, heads=3), "not hold patch_drop_rate"),
        (Backbone(args={**SMALL, "fc_norm": True}, heads=3), "not hold fc_norm"),
        (Backbone(args={**SMALL, "pos_embed": "none"}, heads=3, sincos=False), "or has none"),
    ],
)
def test_networks_that_do_not_fit(settings: Backbone, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TokenViT(build(settings.model_copy(update={"heads": 3}), 40, seed=0))


# The loss ---------------------------------------------------------------------------------------

K, D, T, T_TEACHER = 23, 6, 0.1, 0.05


class Scene:
    """Six images of nine patches: two without a mask, one with a single masked patch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.mask = torch.rand(6, 9, generator=generator) < 0.4
        self.mask[1] = self.mask[4] = False
        self.mask[5] = torch.arange(9) == 3
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        m = int(self.mask.sum())
        self.student = F.normalize(draw(m, D), dim=1).requires_grad_()
        self.teacher = F.normalize(draw(m, D), dim=1)
        self.prototypes = draw(K, D).requires_grad_()
        self.target = Teacher(draw(K, D), 0.1 * draw(K), T_TEACHER)

    def loss(self, chunk: int = 1024) -> dict[str, torch.Tensor]:
        return patch_loss(
            self.student, self.teacher, self.mask, self.prototypes, self.target,
            temperature=T, chunk=chunk,
        )  # fmt: skip

    def plain(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Patch by patch: the loss, and each masked image's cross-entropy and entropy."""
        crosses, entropies, row = [], [], 0
        for image in self.mask:
            cross, entropy = [], []
            for _ in range(int(image.sum())):
                logits = self.target.prototypes @ self.teacher[row] - self.target.centre
                p = (logits / T_TEACHER).softmax(0)
                q = (self.prototypes @ self.student[row] / T).log_softmax(0)
                cross.append(-(p * q).sum())
                entropy.append(-(p * p.log()).sum())
                row += 1
            if cross:
                crosses.append(torch.stack(cross).mean())
                entropies.append(torch.stack(entropy).mean())
        return torch.stack(crosses).sum() / len(self.mask), crosses, entropies


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_the_loss_is_the_mean_of_images_of_the_mean_of_patches(chunk: int) -> None:
    scene = Scene()
    expected, crosses, entropies = scene.plain()
    grads = torch.autograd.grad(expected, [scene.student, scene.prototypes])
    found = scene.loss(chunk)
    torch.testing.assert_close(found["loss"], expected)
    assert len(crosses) == 4
    entropy = torch.stack(entropies).mean()
    torch.testing.assert_close(found["entropy"], entropy.detach())
    torch.testing.assert_close(found["kl"], (torch.stack(crosses).mean() - entropy).detach())
    ours = torch.autograd.grad(found["loss"], [scene.student, scene.prototypes])
    for own, theirs in zip(ours, grads, strict=True):
        torch.testing.assert_close(own, theirs)


def test_nothing_masked_is_zero_with_gradients_of_zero() -> None:
    head = DINOHead(5, K, hidden=8, bottleneck=D, norm_last=False)
    x = torch.zeros(0, 5, requires_grad=True)
    empty = torch.zeros(4, 9, dtype=torch.bool)
    target = Teacher(torch.randn(K, D), torch.zeros(K), T_TEACHER)
    found = patch_loss(head(x), torch.zeros(0, D), empty, head.prototypes(), target)
    assert float(found["loss"].detach()) == float(found["kl"]) == 0
    found["loss"].backward()
    assert x.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_equal_logits_are_chance_and_stay_fp32() -> None:
    scene = Scene()
    equal = torch.ones(K, D, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = patch_loss(
            scene.student.float().bfloat16(), scene.teacher.float().bfloat16(), scene.mask,
            equal.float(), scene.target,
        )  # fmt: skip
    assert found["loss"].dtype == torch.float32
    # Four of six images are masked.
    assert float(found["loss"].detach()) == pytest.approx(math.log(K) * 4 / 6, rel=1e-5)


def test_rows_that_do_not_fit_the_mask() -> None:
    scene = Scene()
    with pytest.raises(ValueError, match="patches are masked, but there are"):
        patch_loss(scene.student[1:], scene.teacher, scene.mask, scene.prototypes, scene.target)
