"""Features of points: bilinear reading of a dense map at nuclei, without a loop over images."""

from typing import Literal

import torch


def sample(
    maps: torch.Tensor,
    points: torch.Tensor,
    owner: torch.Tensor,
    *,
    size: tuple[int, int],
    convention: Literal["centre", "released"] = "centre",
) -> torch.Tensor:
    """Read `maps` at points given in pixels of the images.

    'centre': cell i of a map of w cells covers the pixels [i*W/w, (i+1)*W/w); its value stands at
    the middle. 'released': what the released MUSE code does, grid_sample at 2*x/W - 1 with aligned
    corners, which reads up to half a cell beside the point. A point beyond the outermost cell
    centres (or the image) gets the border's value.

    Args:
        maps: float [B, C, h, w], any memory format.
        points: float [n, 2], x and y in px of the image, pixel centres at +0.5.
        owner: int64 [n], the row of `maps` that each point belongs to; any order, any counts.
        size: height and width of the images, px.

    Returns:
        float32 [n, C] (float64 for float64 maps), also under autocast; differentiable in `maps`
        and `points`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if maps.dim() != 4 or points.shape != (len(owner), 2) or owner.dim() != 1:
        raise ValueError(
            f"maps [B, C, h, w], points [n, 2] and owner [n] are wanted, not "
            f"{tuple(maps.shape)}, {tuple(points.shape)} and {tuple(owner.shape)}"
        )
    dtype = torch.promote_types(maps.dtype, torch.float32)
    rows, cols = maps.shape[-2:]
    x = _position(points[:, 0].to(dtype), size[1], cols, convention)
    y = _position(points[:, 1].to(dtype), size[0], rows, convention)
    # Clamping the whole numbers too keeps a point that is NaN inside the map: its feature is NaN.
    left = x.detach().long().clamp_(0, cols - 1)
    top = y.detach().long().clamp_(0, rows - 1)
    right, bottom = (left + 1).clamp_(max=cols - 1), (top + 1).clamp_(max=rows - 1)
    dx, dy = x - left, y - top
    weight = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx], 1)
    upper, lower = (owner * rows + top) * cols, (owner * rows + bottom) * cols
    index = torch.stack([upper + left, upper + right, lower + left, lower + right], 1)
    cells = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    # One gather for the four neighbours, hence one scatter in the backward pass.
    near = cells.index_select(0, index.flatten()).view(*index.shape, cells.shape[1])
    return (near.to(dtype) * weight[..., None]).sum(1)


def _position(
    points: torch.Tensor, side: int, cells: int, convention: Literal["centre", "released"]
) -> torch.Tensor:
    """Where a coordinate in px lies between the cell centres 0 … cells - 1, float [n]."""
    if convention == "centre":
        place = points * (cells / side) - 0.5
    else:
        place = points * ((cells - 1) / side)
    return place.clamp(0, cells - 1)
