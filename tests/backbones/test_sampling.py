"""Features of points: against grid_sample, against a plain loop, and a map whose value is x."""

import math

import pytest
import torch
from torch.nn import functional as F

from lemon_muse.backbones.muse_decoder import resize
from lemon_muse.backbones.sampling import sample


def ragged(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A map of 12 x 20 cells for images of 48 x 80 px, points in mixed order; image 1 has none."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(4, 3, 12, 20, generator=generator)
    owner = torch.tensor([3, 0, 2, 3, 3, 0, 2, 3, 3, 3, 0, 3])
    points = torch.rand(12, 2, generator=generator) * torch.tensor([80.0, 48.0])
    points[:4] = torch.tensor([[0, 0], [80, 48], [80, 0], [0.5, 47.5]])
    return maps, points, owner


@pytest.mark.parametrize("convention", ["centre", "released"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_grid_sample_of_each_image(convention: str, layout: torch.memory_format) -> None:
    maps, points, owner = ragged()
    found = sample(
        maps.to(memory_format=layout), points, owner, size=(48, 80), convention=convention
    )
    for b in range(4):
        grid = 2 * points[owner == b] / torch.tensor([80.0, 48.0]) - 1
        wanted = F.grid_sample(
            maps[b : b + 1],
            grid[None, None],
            padding_mode="border",
            align_corners=convention == "released",
        )
        assert torch.allclose(found[owner == b], wanted[0, :, 0].T, atol=1e-5)


def test_equals_a_plain_loop() -> None:
    maps, points, owner = ragged(1)
    points[4] = torch.tensor([-30.0, 500.0])  # beyond the image: the border
    found = sample(maps, points, owner, size=(48, 80))
    for row, ((x, y), b) in enumerate(zip(points.tolist(), owner.tolist(), strict=True)):
        # Cells are 4 px: the centre of cell (r, c) is at (4 c + 2, 4 r + 2).
        total = torch.zeros(3)
        c, r = math.floor((x - 2) / 4), math.floor((y - 2) / 4)
        for cc, rr in ((c, r), (c + 1, r), (c, r + 1), (c + 1, r + 1)):
            weight = (1 - abs((x - 2) / 4 - cc)) * (1 - abs((y - 2) / 4 - rr))
            total += weight * maps[b, :, min(max(rr, 0), 11), min(max(cc, 0), 19)]
        assert torch.allclose(found[row], total, atol=1e-4 if row == 4 else 1e-5)


@pytest.mark.parametrize("convention", ["centre", "released"])
def test_gradients(convention: str) -> None:
    maps, points, owner = ragged(2)
    maps = maps.double().requires_grad_()
    points = points[5:].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, p: sample(m, p, owner[5:], size=(48, 80), convention=convention),
        (maps, points),
    )


def test_no_points_keep_the_graph() -> None:
    maps = ragged()[0].requires_grad_()
    found = sample(maps, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), size=(48, 80))
    assert found.shape == (0, 3)
    found.sum().backward()
    assert maps.grad is not None and maps.grad.abs().sum() == 0


def test_float32_under_autocast() -> None:
    """Of a bf16 map the cells are bf16, but not the weights between them."""
    maps, points, owner = ragged(3)
    low = maps.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(low, points, owner, size=(48, 80))
    wanted = sample(low.float(), points, owner, size=(48, 80))
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_a_point_that_is_nan_gives_nan_and_harms_no_other() -> None:
    maps, points, owner = ragged()
    wanted = sample(maps, points, owner, size=(48, 80))
    points[5, 0] = torch.nan
    found = sample(maps, points, owner, size=(48, 80))
    assert found[5].isnan().all()
    assert torch.equal(found[torch.arange(12) != 5], wanted[torch.arange(12) != 5])


@pytest.mark.parametrize(
    ("resampled", "read", "worst"),
    [("centre", "centre", 1e-3), ("released", "released", 8.1), ("released", "centre", 6.2)],
)
def test_where_a_feature_really_comes_from(resampled: str, read: str, worst: float) -> None:
    """Tokens that hold their own x, brought to stride 4, read at x: the error is in px.

    Only resampling and reading by pixel centres together put a feature where its nucleus is.
    """
    tokens = (torch.arange(14.0) * 16 + 8).expand(1, 1, 14, 14)
    maps = resize(tokens, (56, 56), resampled)  # type: ignore[arg-type]
    x = torch.linspace(10, 214, 100)  # beyond the outermost token centres there is only the border
    points = torch.stack([x, x], 1)
    found = sample(
        maps, points, torch.zeros(100, dtype=torch.int64), size=(224, 224), convention=read
    )
    error = (found[:, 0] - x).abs().max()
    assert worst * 0.8 < error < worst or (worst < 0.01 and error < worst)


@pytest.mark.parametrize(
    ("maps", "points", "owner"),
    [((2, 3, 4), (5, 2), (5,)), ((2, 3, 4, 4), (5, 3), (5,)), ((2, 3, 4, 4), (5, 2), (4,))],
)
def test_shapes_that_do_not_fit(maps: tuple, points: tuple, owner: tuple) -> None:
    with pytest.raises(ValueError, match="are wanted"):
        sample(
            torch.zeros(maps),
            torch.zeros(points),
            torch.zeros(owner, dtype=torch.int64),
            size=(16, 16),
        )
