"""Resampled windows of ROIs, against torch, Pillow and plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lemon_muse.data import geometry
from lemon_muse.data import roi_resample as R
from lemon_muse.data.roi_resample import Windows

SIZES = (96, 208, 224, 512, 112, 37)


def rois(count: int, side: int, *, noise: int = 0) -> torch.Tensor:
    """Smooth colours, with noise of up to ± `noise` grey levels: uint8 [count, side, side, 3]."""
    g = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, 3, 9, 9, generator=g)
    fine = F.interpolate(coarse, size=side, mode="bicubic", align_corners=False) * 255
    fine += (torch.rand(fine.shape, generator=g) * 2 - 1) * noise
    return fine.clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def windows(
    corner: list[list[float]], extent: list[float], turn: list[int] | None = None
) -> Windows:
    return Windows(
        torch.tensor(corner),
        torch.tensor(extent),
        torch.tensor(turn or [0] * len(extent)),
        max(extent),
    )


def random_windows(count: int, side: int, size: int) -> Windows:
    """Anywhere, extents from half to twice the view as far as they fit, all turns."""
    g = torch.Generator().manual_seed(size)
    extent = (size * 4 ** (torch.rand(count, generator=g) - 0.5)).clamp(max=side)
    corner = torch.rand(count, 2, generator=g) * (side - extent)[:, None]
    return Windows(corner, extent, torch.arange(count) % 8, min(2.0 * size, side))


def dense(pixels: torch.Tensor, where: Windows, size: int) -> torch.Tensor:
    """What runs on a device, here on the CPU."""
    out = torch.empty(len(pixels), 3, size, size)
    R._by_matrices(pixels, where, out)
    return out


@pytest.mark.parametrize("size", SIZES)
def test_whole_rois_equal_torch(size: int) -> None:
    """Finer and coarser than the view, odd factors, the ROI's border included."""
    for side in (size, size * 2, round(size * 1.37), round(size * 0.6)):
        pixels = rois(1, side, noise=60)
        where = windows([[0.0, 0.0]], [float(side)])
        planes = pixels.permute(0, 3, 1, 2).float()
        wanted = F.interpolate(planes, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        for ours in (R.resample(pixels, where, size=size), dense(pixels, where, size)):
            assert (ours - wanted).abs().max() < 0.02


@pytest.mark.parametrize(("window", "size"), [(48, 32), (60, 60), (40, 80), (72, 37)])
def test_whole_pixel_windows_are_parts_of_torch(window: int, size: int) -> None:
    """A window that is one cell of the ROI's 3 x 3 equals this part of the resampled ROI."""
    pixels = rois(4, 3 * window, noise=60)
    cells = [[0, 0], [1, 0], [1, 1], [2, 1]]
    where = windows([[x * window, y * window] for x, y in cells], [float(window)] * 4)
    planes = pixels.permute(0, 3, 1, 2).float()
    whole = F.interpolate(planes, (3 * size, 3 * size), mode="bicubic", antialias=True)
    for ours in (R.resample(pixels, where, size=size), dense(pixels, where, size)):
        for i, (x, y) in enumerate(cells):
            part = whole[i, :, y * size : (y + 1) * size, x * size : (x + 1) * size]
            assert (ours[i] - part.clamp(0, 255)).abs().max() < 0.02


@pytest.mark.parametrize("size", SIZES)
def test_fractional_windows_and_all_turns_equal_pillow(size: int) -> None:
    side, count = size * 5 // 4, 8
    # Between the axes Pillow rounds to whole grey levels and clips: keep away from black and white.
    pixels = (rois(count, side, noise=60) // 2) + 64
    where = random_windows(count, side, size)
    ours = R.resample(pixels, where, size=size)
    assert (ours - dense(pixels, where, size)).abs().max() < 1e-3
    for i in range(count):
        (x, y), extent = where.corner[i].tolist(), float(where.extent[i])
        box = (x, y, min(x + extent, side), min(y + extent, side))
        image = Image.fromarray(pixels[i].numpy())
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        wanted = np.asarray(image)
        if i & 4:
            wanted = wanted.transpose(1, 0, 2)
        if i & 1:
            wanted = wanted[:, ::-1]
        if i & 2:
            wanted = wanted[::-1]
        assert np.abs(ours[i].permute(1, 2, 0).round().numpy() - wanted).max() <= 1


def test_a_view_equals_a_plain_loop_over_its_pixels() -> None:
    """The definition, tap by tap, in float64."""
    pixels, size = rois(2, 50, noise=100), 16
    where = windows([[0.3, 11.71], [7.25, 1.0]], [41.7, 12.9], [6, 1])
    ours = R.resample(pixels, where, size=size)

    def cubic(t: float) -> float:
        t = abs(t)
        if t < 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    for i in range(2):
        (x0, y0), extent = where.corner[i].tolist(), float(where.extent[i])
        step, wide = extent / size, max(extent / size, 1)
        image = pixels[i].double().numpy()
        for vy, vx in ((0, 0), (3, 15), (15, 2), (8, 8)):
            bx, by = vx + 0.5, vy + 0.5
            if where.turn[i] & 2:
                by = size - by
            if where.turn[i] & 1:
                bx = size - bx
            if where.turn[i] & 4:
                bx, by = by, bx
            wx = [cubic((c + 0.5 - x0 - bx * step) / wide) for c in range(50)]
            wy = [cubic((c + 0.5 - y0 - by * step) / wide) for c in range(50)]
            value = np.einsum("y,x,yxc->c", wy, wx, image) / sum(wx) / sum(wy)
            assert np.abs(ours[i, :, vy, vx].numpy() - value.clip(0, 255)).max() < 0.01


def test_a_part_of_the_batch_is_the_batch_of_the_part() -> None:
    pixels, where = rois(17, 150, noise=50), random_windows(17, 150, 96)
    whole = R.resample(pixels, where, size=96)
    for at in (slice(0, 1), slice(3, 11), slice(11, 17)):
        assert torch.equal(R.resample(pixels[at], where.rows(at), size=96), whole[at])
    assert R.resample(pixels[:0], where.rows(slice(0, 0)), size=96).shape == (0, 3, 96, 96)


def test_moved_points_are_where_their_pixel_went() -> None:
    """A bright pixel at an odd place, in whole-pixel windows without scaling, under all turns."""
    side, size = 40, 24
    for turn in range(8):
        pixels = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        pixels[0, 13, 21] = 255
        where = windows([[9.0, 4.0]], [float(size)], [turn])
        y, x = (R.resample(pixels, where, size=size)[0, 0] > 128).nonzero()[0].tolist()
        moved = R.move(torch.tensor([[[21.5, 13.5], [torch.nan, 1]]]), where, size=size)
        assert moved[0, 0].tolist() == [x + 0.5, y + 0.5]
        assert moved[0, 1].isnan().any()


def test_a_view_of_tissue_is_what_evaluation_reads(shared_data: Path) -> None:
    """The same pixels as `geometry.resample` of the whole image, then a cut."""
    path = sorted((shared_data / "brca-m2c" / "images").glob("*.png"))[0]
    image = np.array(Image.open(path).convert("RGB"))[:448, :448]
    wanted, _ = geometry.resample(image, source_mpp=0.5, mpp=0.25)
    where = windows([[100.0, 212.0]], [112.0])
    ours = R.resample(torch.from_numpy(image)[None], where, size=224)[0].permute(1, 2, 0)
    cut = wanted[424 : 424 + 224, 200 : 200 + 224]
    assert np.abs(ours.numpy() - cut).max() < 0.51, "rounded there to whole grey levels"
