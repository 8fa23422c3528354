"""The steps that `augment` is made of: a batch of views, and one row of numbers for each."""

import functools
import math

import torch
from torch.nn import functional as F

TRIES = 10  # as torchvision: boxes that do not fit are drawn again, up to this often
LUMA = (0.299, 0.587, 0.114)
YIQ = ((0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # I and Q (NTSC), below LUMA


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


def grid_lines(theta: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What an output x and y add to the source position: [B, 2, 1, w] and [B, 2, w, 1].

    Their sum is `torch.nn.functional.affine_grid` (align_corners=False) as [B, 2, w, w].
    """
    line = torch.arange(1 - window, window, 2, device=theta.device) / window
    across = theta[:, :, :1] * line + theta[:, :, 2:]
    return across[:, :, None], (theta[:, :, 1:2] * line)[..., None]


def resample(
    pixels: torch.Tensor, across: torch.Tensor, down: torch.Tensor, *, padding: str
) -> torch.Tensor:
    """Bilinear samples of uint8 [B, S, S, 3] at `grid_lines`: float32 [B, 3, w, w] in 0..255."""
    # grid_sample reads both as they lie in memory, the grid with x and y apart and the image with
    # channels last; building the usual layouts would cost half as much as the sampling.
    grid = (across + down).permute(0, 2, 3, 1)
    image = pixels.float().permute(0, 3, 1, 2)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def recolour(view: torch.Tensor, pixel: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Colour jitter and grayscale: one 3x3 matrix and one summand per view, one clamp at the end.

    Args:
        view: float32 [B, 3, h, w] in 0..255.
        pixel: float32 [B, 3, 3], P of `colour_matrices`.
        mean: float32 [B, 3, 3], Q of `colour_matrices`.

    Returns:
        float32 [B, 3, h, w] in 0..1.
    """
    flat = view.flatten(2)
    summand = torch.bmm(mean / 255, flat.mean(2, keepdim=True))
    return torch.baddbmm(summand, pixel / 255, flat).clamp_(0, 1).view(view.shape)


def colour_matrices(
    jitter: torch.Tensor, order: torch.Tensor, gray: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices P and Q, [B, 3, 3], such that a pixel x of a view with mean m becomes P x + Q m.

    Contrast blends with the mean grey of the image *as it is when contrast comes*. The mean obeys
    the same matrices as the pixels, so it is a linear function of the mean before any operation.

    Args:
        jitter: float32 [B, 4], factors of brightness, contrast, saturation, and turns of hue.
        order: int64 [B, 4], which of the four comes first, second, ...
        gray: float32 [B], 1 where the view becomes grey.
    """
    eye, luma, *hue = _colour_constants(jitter.device)
    factor = jitter[:, :, None, None]
    angle = factor[:, 3] * (2 * math.pi)
    pixel = torch.stack(
        [
            factor[:, 0] * eye,
            factor[:, 1] * eye,
            luma + factor[:, 2] * (eye - luma),
            hue[0] + angle.cos() * hue[1] + angle.sin() * hue[2],
        ],
        1,
    )
    rows = torch.arange(len(jitter), device=jitter.device)
    p, q = eye.expand(len(jitter), 3, 3), torch.zeros_like(pixel[:, 0])
    for step in range(4):
        operation = order[:, step]
        matrix = pixel[rows, operation]
        of_mean = (operation == 1)[:, None, None] * (1 - factor[:, 1]) * luma
        # until contrast comes, once, q is 0 and the mean is p m
        q = torch.baddbmm(torch.bmm(matrix, q), of_mean, p)
        p = torch.bmm(matrix, p)
    last = torch.lerp(eye, luma, gray[:, None, None])
    return torch.bmm(last, p), torch.bmm(last, q)


@functools.cache
def _colour_constants(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Identity, luma, and the three parts of R(t) = Y + cos(t) C + sin(t) S, each [3, 3].

    R turns the I-Q plane of YIQ by t; for t > 0 red goes to yellow, as a hue does in HSV.
    """
    luma = torch.tensor([LUMA], dtype=torch.float64).expand(3, 3)
    eye = torch.eye(3, dtype=torch.float64)
    to_yiq = torch.tensor([LUMA, *YIQ], dtype=torch.float64)
    from_yiq = torch.linalg.inv(to_yiq)
    turn = from_yiq[:, 1:2] @ to_yiq[2:] - from_yiq[:, 2:] @ to_yiq[1:2]
    parts = (eye, luma, luma, eye - luma, turn)
    return tuple(part.float().to(device) for part in parts)


@functools.cache
def blur_basis(width: int, radius: int, device: torch.device) -> torch.Tensor:
    """Which tap of a kernel goes to which cell [to, from] of the banded matrix that filters a line.

    Returns:
        float32 [2 radius + 1, width * width]: 0, or 1, or more where reflected taps meet.
    """
    target = torch.arange(width).expand(2 * radius + 1, width)
    source = target + torch.arange(-radius, radius + 1)[:, None]
    period = max(2 * (width - 1), 1)  # a line and its mirror image
    source = source.remainder(period)
    source = torch.minimum(source, period - source)
    basis = torch.zeros(2 * radius + 1, width * width)
    return basis.scatter_add_(1, target * width + source, torch.ones(source.shape)).to(device)


def blur_kernels(sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """Gaussian taps that sum to one, float32 [B, 2 radius + 1], for sigmas [B] in pixels."""
    distance = torch.arange(-radius, radius + 1, device=sigma.device)
    # a sigma of 0 becomes so small that only the middle tap is left
    kernel = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def blur(
    view: torch.Tensor, kernels: torch.Tensor, basis: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Blur with reflected borders, as one banded matrix from either side.

    Args:
        view: float32 [B, 3, w, w].
        kernels: float32 [B, 2 radius + 1] of `blur_kernels`.
        basis: of `blur_basis`.
        dtype: in which the products are computed.

    Returns:
        [B, 3, w, w] of `dtype`.
    """
    width = view.shape[-1]
    matrix = (kernels @ basis).view(-1, width, width).to(dtype)
    lines = torch.bmm(view.to(dtype).flatten(1, 2), matrix.transpose(1, 2))
    return torch.matmul(matrix[:, None], lines.view(view.shape))


def keep_mask(box: torch.Tensor, side: int) -> torch.Tensor:
    """0 inside the rectangles [B, 4] (top, bottom, left, right), else 1: [B, 1, side, side]."""
    at = torch.arange(side, device=box.device)
    row = (at >= box[:, :1]) & (at < box[:, 1:2])
    column = (at >= box[:, 2:3]) & (at < box[:, 3:])
    return 1 - row[:, None, :, None].float() * column[:, None, None, :].float()


@functools.cache
def normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand, float32 [3, 1, 1], that normalise pixels in 0..1."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std} must be three numbers each, std above 0")
    factor = 1 / torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
    summand = -torch.tensor(mean, dtype=torch.float64).view(3, 1, 1) * factor
    return factor.float().to(device), summand.float().to(device)


def to_device(params: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """All parameters on the device, by one transfer that does not make the CPU wait."""
    if all(value.device == device for value in params.values()):
        return params
    count = len(params["theta"])
    packed = torch.cat([value.reshape(count, -1).float() for value in params.values()], 1)
    if device.type == "cuda":
        packed = packed.pin_memory()
    widths = [value[:1].numel() for value in params.values()]
    columns = packed.to(device, non_blocking=True).split(widths, 1)
    return {
        name: column.reshape(value.shape).to(value.dtype)
        for (name, value), column in zip(params.items(), columns, strict=True)
    }


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
