"""Uniform numbers to the parameters of views, with the distributions of torchvision."""

import math
from collections.abc import Sequence

import torch

TRIES = 10  # as torchvision: boxes that do not fit are drawn again, up to this often


def draw_colour(
    u: torch.Tensor,
    order: torch.Tensor,
    *,
    strength: Sequence[float],
    jitter: float,
    gray: float,
    blur: float,
    blur_sigma: tuple[float, float],
) -> dict[str, torch.Tensor]:
    """Parameters of colour jitter, grayscale and blur, as torchvision draws them.

    Args:
        u: uniform numbers [8, n].
        order: int64 [n, 4], which of the four colour operations comes first, second, ...
        strength: of brightness, contrast and saturation (factors in 1 ± this), and hue (turns).
        jitter: probability of colour jitter.
        gray: probability of grayscale.
        blur: probability of blur.
        blur_sigma: least and largest sigma, pixels.

    Returns:
        `jitter` float32 [n, 4], `order` as given, `gray` float32 [n] (0 or 1) and `sigma` float32
        [n] (pixels, 0 for no blur).
    """
    neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
    width = torch.tensor(strength)
    low = torch.maximum(neutral - width, torch.tensor([0.0, 0.0, 0.0, -1.0]))
    factor = low + u[:4].T * (neutral + width - low)
    sigma = blur_sigma[0] + u[6] * (blur_sigma[1] - blur_sigma[0])
    return {
        "jitter": torch.where((u[4] < jitter)[:, None], factor, neutral),
        "order": order,
        "gray": (u[5] < gray).float(),
        "sigma": torch.where(u[7] < blur, sigma, 0.0),
    }


def draw_hed(u: torch.Tensor, *, probability: float, width: float) -> torch.Tensor:
    """Factors 1 ± width of hematoxylin and eosin, then summands ± width: float32 [n, 4].

    Args:
        u: uniform numbers [5, n].
        probability: of views that are changed; the others have 1, 1, 0, 0.
        width: of the factors, and of the summands in optical density.
    """
    neutral = torch.tensor([1.0, 1.0, 0.0, 0.0])
    return torch.where((u[0] < probability)[:, None], neutral + width * (2 * u[1:].T - 1), neutral)


def draw_crop_sizes(
    u: torch.Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Width and height of torchvision's RandomResizedCrop box, each [n], fractions of the side.

    Args:
        u: uniform numbers [20, n].
        scale: least and largest area, fraction of the square.
        ratio: least and largest width / height; its logarithm is uniform.
    """
    area, aspect = _area_and_ratio(u, scale, ratio)
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    fits = (width <= 1) & (height <= 1)
    # Where no try fits: the largest central box whose ratio is allowed.
    clamped = min(max(1.0, ratio[0]), ratio[1])
    width = _first(width, fits, otherwise=min(1.0, clamped))
    height = _first(height, fits, otherwise=min(1.0, 1 / clamped))
    return width, height


def draw_rectangles(
    u: torch.Tensor,
    place: torch.Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    side: int,
) -> torch.Tensor:
    """Top, bottom, left and right of torchvision's RandomErasing rectangle, float32 [n, 4].

    Args:
        u: uniform numbers [20, n].
        place: uniform numbers [2, n].
        scale: least and largest area, fraction of the square.
        ratio: least and largest height / width; its logarithm is uniform.
        side: of the square, pixels.

    Returns:
        Whole numbers of pixels; four zeros where no try fits.
    """
    area, aspect = _area_and_ratio(u, scale, ratio)
    height = (area * aspect).sqrt().mul(side).round()
    width = (area / aspect).sqrt().mul(side).round()
    fits = (width < side) & (height < side)
    height, width = _first(height, fits, otherwise=0.0), _first(width, fits, otherwise=0.0)
    top = (place[0] * (side - height + 1)).floor()
    left = (place[1] * (side - width + 1)).floor()
    box = torch.stack([top, top + height, left, left + width], 1)
    return box * (height > 0)[:, None]


def _area_and_ratio(
    u: torch.Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    area = scale[0] + u[:TRIES] * (scale[1] - scale[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    return area, torch.exp(low + u[TRIES : 2 * TRIES] * (high - low))


def _first(values: torch.Tensor, good: torch.Tensor, *, otherwise: float) -> torch.Tensor:
    """The first good one of values [TRIES, n], or `otherwise`: [n]."""
    at = good.to(torch.uint8).argmax(0, keepdim=True)
    return torch.where(good.any(0), values.gather(0, at)[0], otherwise)
