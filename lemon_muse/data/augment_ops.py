"""The steps that `augment` is made of: a batch of views, and one row of numbers for each."""

import functools
import math

import torch
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
YIQ = ((0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # I and Q (NTSC), below LUMA
BLOCK = 32  # output lines of a blur that are made at once on the CPU, where views are large


def autocast_dtype(device: torch.device) -> torch.dtype:
    """What autocast computes in here; float32 where it is off."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


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


def restain(view: torch.Tensor, matrix: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
    """Change optical densities d = -ln((I + 1) / 256), rows of three, to d matrix + summand.

    Args:
        view: float32 [B, 3, h, w] in 0..255; is overwritten.
        matrix: float32 [B, 3, 3].
        summand: float32 [B, 3].

    Returns:
        float32 [B, 3, h, w] in 0..255.
    """
    # In logarithms l = ln(I + 1) = ln 256 - d it is l matrix + (1 - 1 matrix) ln 256 - summand.
    white = math.log(256) * (1 - matrix.sum(1)) - summand
    logs = view.flatten(2).add_(1).log_()
    levels = torch.baddbmm(white[..., None], matrix.transpose(1, 2), logs).exp_()
    return levels.sub_(1).clamp_(0, 255).view(view.shape)


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
    source = view.to(dtype).flatten(1, 2)
    if not view.is_cpu or width <= 2 * BLOCK:
        lines = torch.bmm(source, matrix.transpose(1, 2))
        return torch.matmul(matrix[:, None], lines.view(view.shape))
    # A band of the matrix is all that is not zero: 3 times as fast for views of 224 px (measured).
    lines, out = torch.empty_like(source), torch.empty_like(view, dtype=dtype)
    radius = kernels.shape[1] // 2
    for start in range(0, width, BLOCK):
        to = slice(start, start + BLOCK)
        of = slice(max(start - radius, 0), start + BLOCK + radius)
        lines[:, :, to] = torch.bmm(source[:, :, of], matrix[:, to, of].transpose(1, 2))
    for start in range(0, width, BLOCK):
        to = slice(start, start + BLOCK)
        of = slice(max(start - radius, 0), start + BLOCK + radius)
        out[:, :, to] = torch.matmul(matrix[:, None, to, of], lines.view(view.shape)[:, :, of])
    return out


def finish(
    view: torch.Tensor,
    out: torch.Tensor,
    *,
    colour: tuple[torch.Tensor, torch.Tensor],
    sigma: torch.Tensor,
    kernels: torch.Tensor,
    basis: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Colour, blur and normalise views: float32 [B, 3, w, w] in 0..255 -> `out`, float32.

    Args:
        view: resampled pixels.
        out: float32 [B, 3, w, w], is written.
        colour: rows of `colour_matrices`.
        sigma: float32 [B], of the blur; rows with 0 stay sharp.
        kernels: rows of `blur_kernels` of these sigmas.
        basis: of `blur_basis`.
        norm: of `normalisation`.
        dtype: in which the blur is computed.
    """
    view = recolour(view, *colour)
    blurred = sigma > 0
    if not view.is_cpu:
        # asking a device which rows these are would make the CPU wait for it
        soft = blur(view, kernels, basis, dtype)
        view = torch.where(blurred[:, None, None, None], soft.float(), view)
    elif blurred.all():
        view = blur(view, kernels, basis, dtype)
    elif blurred.any():
        view[blurred] = blur(view[blurred], kernels[blurred], basis, dtype).float()
    # two passes: addcmul does not vectorise over these shapes
    torch.mul(view, norm[0], out=out).add_(norm[1])


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
    """All parameters on the device, by one transfer that does not make the CPU wait.

    They travel as float32: whole numbers up to 2^24 arrive as they were.
    """
    if all(value.device == device for value in params.values()):
        return params
    count = len(next(iter(params.values())))
    widths = [math.prod(value.shape[1:]) for value in params.values()]
    parts = zip(params.values(), widths, strict=True)
    packed = torch.cat([value.reshape(count, width).float() for value, width in parts], 1)
    if device.type == "cuda":
        packed = packed.pin_memory()
    columns = packed.to(device, non_blocking=True).split(widths, 1)
    return {
        name: column.reshape(value.shape).to(value.dtype)
        for (name, value), column in zip(params.items(), columns, strict=True)
    }
