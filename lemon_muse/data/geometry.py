"""What a crop is: the one place that turns a nucleus and an mpp into pixels.

Coordinates are continuous, x right and y down, in pixels of the image they belong to; the centre of
the top-left pixel is at (0.5, 0.5). Preparation, training, evaluation and embedding all come here.
"""

import numpy as np
import torch
from torch.nn import functional as F

# Within this relative difference pixels are used as they are: resampling by 1 % would only blur.
MPP_TOLERANCE = 0.02


def resample(image: np.ndarray, *, source_mpp: float, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Bring an image to another resolution, once, with an antialiased bicubic filter.

    Args:
        image: uint8 [H, W, 3], RGB.
        source_mpp: µm per pixel of `image`.
        mpp: µm per pixel wanted.

    Returns:
        The image, uint8 [H', W', 3], and the exact scale float64 [2] (x, y) from old to new pixels.
    """
    scale = source_mpp / mpp
    height, width = image.shape[:2]
    if abs(scale - 1) <= MPP_TOLERANCE:
        return image, np.ones(2)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
    out = planes[0].permute(1, 2, 0).round_().clamp_(0, 255).to(torch.uint8).numpy()
    return np.ascontiguousarray(out), np.array([size[1] / width, size[0] / height])


def crop(
    image: np.ndarray, centres: np.ndarray, *, size: int, edge: str = "reflect"
) -> tuple[np.ndarray, np.ndarray]:
    """Square windows around points of an image that already has the wanted mpp.

    The window of a point covers [round(x - size/2), round(x - size/2) + size): the point lies
    within half a pixel of the window's middle, and no pixel is resampled.

    Args:
        image: uint8 [H, W, 3].
        centres: float [n, 2], x and y, each inside the image.
        size: side of the window in pixels.
        edge: 'reflect' mirrors the image beyond its border; 'drop' leaves such nuclei out.

    Returns:
        Pixels uint8 [m, size, size, 3] and the kept rows, int64 [m], of `centres`.
    """
    if edge not in ("reflect", "drop"):
        raise ValueError(f"edge must be 'reflect' or 'drop', not {edge!r}")
    height, width = image.shape[:2]
    corner = np.floor(np.asarray(centres, np.float64) - size / 2 + 0.5).astype(np.int64)
    inside = (corner >= 0).all(1) & (corner[:, 0] + size <= width) & (corner[:, 1] + size <= height)
    rows = np.flatnonzero(inside) if edge == "drop" else np.arange(len(corner))
    if not inside[rows].all():
        # 'symmetric' repeats the border pixel, so it works on images smaller than the window too.
        pad = size
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
        corner = corner + pad
    if not len(rows):  # the image may be smaller than the window
        return np.empty((0, size, size, 3), np.uint8), rows
    # One gather over a view of all windows: twice as fast as a loop over the nuclei.
    windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))  # type: ignore[call-overload]
    x, y = corner[rows].T
    return windows.transpose(0, 1, 3, 4, 2)[y, x], rows
