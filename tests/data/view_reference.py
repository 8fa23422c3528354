"""Crops to test with, and torchvision one image at a time: what batched views are held against."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from lemon_muse.data import geometry

STORED, WINDOW = 64, 40
UNIT = {"window": WINDOW, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
NORM = {"window": WINDOW, "mean": (0.6, 0.35, 0.55), "std": (0.25, 0.2, 0.19)}


def smooth_crops(n: int, *, low: int = 0, high: int = 255, seed: int = 0) -> torch.Tensor:
    """Coloured blobs, uint8 [n, 64, 64, 3] in low..high."""
    coarse = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=STORED, mode="bicubic").clamp(0, 1)
    return (low + fine * (high - low)).permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def real_crops(folder: Path, n: int) -> torch.Tensor:
    """Crops of BRCA-M2C nuclei (0.5 µm per pixel) at 0.25, uint8 [n, 64, 64, 3]."""
    found: list[np.ndarray] = []
    for path in sorted((folder / "brca-m2c" / "images").glob("*.png")):
        image = np.array(Image.open(path).convert("RGB"))
        image, scale = geometry.resample(image, source_mpp=0.5, mpp=0.25)
        label = folder / "brca-m2c" / "labels" / f"{path.stem}_gt_class_coords.txt"
        points = np.array([line.split()[:2] for line in label.read_text().splitlines() if line])
        points = (points.astype(float)[:, ::-1] + 0.5) * scale
        found.append(geometry.crop(image, points, size=STORED, edge="drop")[0][:16])
        if sum(map(len, found)) >= n:
            return torch.from_numpy(np.concatenate(found)[:n])
    pytest.skip(f"fewer than {n} nuclei in {folder / 'brca-m2c'}")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neutral(n: int) -> dict[str, torch.Tensor]:
    """Parameters that change nothing: the central window."""
    return {
        "theta": theta(0, (0, 0, WINDOW, WINDOW)).repeat(n, 1, 1),
        "jitter": torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(n, 1),
        "order": torch.arange(4).repeat(n, 1),
        "gray": torch.zeros(n),
        "sigma": torch.zeros(n),
        "erase": torch.zeros(n, 4),
    }


def theta(angle: float, box: Sequence[int], *, mirror: bool = False) -> torch.Tensor:
    """What `draw` gives for an angle (counter-clockwise) and a box (top, left, height, width) in
    the central window: view -> box -> turned crop, by three plain 3x3 matrices in pixels.
    """
    top, left, height, width = box
    x, y = left + width / 2 - WINDOW / 2, top + height / 2 - WINDOW / 2
    flip = np.diag([-1.0 if mirror else 1.0, 1.0, 1.0])
    zoom = np.array([[width / 2, 0, x], [0, height / 2, y], [0, 0, 1]])
    a = math.radians(angle)
    turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    whole = np.diag([2 / STORED, 2 / STORED, 1]) @ turn @ zoom @ flip
    return torch.tensor(whole[None, :2], dtype=torch.float32)


def reference(
    pixel: torch.Tensor,
    params: dict[str, torch.Tensor],
    *,
    angle: float = 0.0,
    box: Sequence[int] = (0, 0, WINDOW, WINDOW),
    mirror: bool = False,
    kernel: int = 13,
    mean: Sequence[float],
    std: Sequence[float],
) -> torch.Tensor:
    """One view by torchvision; `params` are one row whose theta is `theta(angle, box, mirror)`."""
    image = pixel.permute(2, 0, 1).float() / 255
    image = F.rotate(image, angle, F.InterpolationMode.BILINEAR)
    image = F.resized_crop(F.center_crop(image, [WINDOW, WINDOW]), *box, [WINDOW, WINDOW])
    image = F.horizontal_flip(image) if mirror else image
    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    for at in params["order"].tolist():
        image = steps[at](image, params["jitter"][at].item())
    if params["gray"]:
        image = F.rgb_to_grayscale(image, 3)
    if params["sigma"] > 0:
        image = F.gaussian_blur(image, [kernel] * 2, [params["sigma"].item()] * 2)
    image = F.normalize(image, list(mean), list(std))
    top, bottom, left, right = (int(v) for v in params["erase"])
    return F.erase(image, top, left, bottom - top, right - left, torch.zeros(3, 1, 1))


def rows(params: dict[str, torch.Tensor], at: slice) -> dict[str, torch.Tensor]:
    return {name: value[at] for name, value in params.items()}
