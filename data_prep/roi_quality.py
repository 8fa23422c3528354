"""What pixels say against a ROI: glass, marker ink, or out of focus.

All is measured on blocks of 8 µm. Strokes of a marker are far wider than that, whereas the colours
of single nuclei and erythrocytes, which can come close to ink, are mixed with their surroundings.
Sharpness compares the contrast within 2 µm with that within 8 µm, both of luminance: stain and
exposure cancel out, and averages over 1 µm carry little sensor noise and few JPEG artefacts, which
hide the blur from a Laplacian of single pixels.

The thresholds were set on the images of BRCA-M2C and generated tissue, blurred and inked; they ask
for clear cases only. Blue-green dye of surgical margins counts as ink.
"""

import numpy as np
from PIL import Image

from lemon_muse.errors import UserError

MPP = 1.0  # µm per pixel of what is measured
CELL, BLOCK = 4, 8  # px at MPP: a pixel of the tissue mask; a block
TISSUE = 0.1  # least share of tissue
SHARP = 0.16  # least sharpness
COARSE = 0.75  # µm per pixel above which a slide has little contrast within 2 µm, even in focus
INK = 0.02  # largest share of ink
FEW = 16  # blocks of tissue below which there is no sharpness
FLOOR = 0.1  # grey levels²: contrast that a flat image may have
# Means over a block, grey levels. Largest values of 320,000 blocks of H&E without ink: 4, 56, 103;
# smallest brightest channel of grey ones: 131.
GREEN, BLUE, RED, BLACK, GREY = 15.0, 62.0, 108.0, 105.0, 30.0

REASONS = ("pen", "background", "blurred")


def judge(image: np.ndarray, mpp: float) -> str:
    """'' for a good ROI, else the first reason that holds: 'pen', 'background' or 'blurred'.

    Args and errors as `measure`.
    """
    values = measure(image, mpp)
    if values["pen"] > INK:
        return "pen"
    if values["tissue"] < TISSUE:
        return "background"
    return "blurred" if values["sharpness"] < SHARP else ""  # NaN is not blurred


def measure(image: np.ndarray, mpp: float) -> dict[str, float]:
    """The numbers behind `judge`.

    Args:
        image: uint8 [H, W, 3], RGB.
        mpp: µm per pixel.

    Returns:
        'tissue' and 'pen': shares of the image, 0 to 1; 'sharpness': contrast within 2 µm over
        contrast within 8 µm, both variances of luminance, on tissue; 0.3 to 3 in focus, about
        0.12 after a Gaussian blur of 2 µm; NaN where there is hardly any tissue or mpp > 0.75.

    Raises:
        UserError: the image is smaller than 8 x 8 µm.
    """
    small = _small(image, mpp)
    ink = _ink(np.asarray(small.reduce(BLOCK), np.float32))
    tissue = _tissue(np.asarray(small.reduce(CELL))) * ~ink
    sharpness = float("nan")
    if mpp <= COARSE:
        light = _cut(np.asarray(small.convert("F")))[tissue == 1]  # luminance [n, BLOCK, BLOCK]
        if len(light) >= FEW:
            fine, coarse = _contrast(light), _contrast(_means(_means(light)))
            sharpness = (fine + FLOOR) / (coarse + FLOOR)
    return {"tissue": float(tissue.mean()), "pen": float(ink.mean()), "sharpness": sharpness}


def _small(image: np.ndarray, mpp: float) -> Image.Image:
    """The image at `MPP` without the rest that is no whole block.

    Raises:
        UserError: there is no whole block.
    """
    high, wide = image.shape[:2]
    scale = min(1.0, mpp / MPP)
    columns, rows = (max(1, round(side * scale)) for side in (wide, high))
    if min(rows, columns) < BLOCK:
        raise UserError(
            f"a ROI of {wide} x {high} px at {mpp:g} µm per pixel is too small to be judged; give "
            f"at least {BLOCK} x {BLOCK} µm."
        )
    box = Image.Resampling.BOX  # whole factors first, which is several times faster
    small = Image.fromarray(image).resize((columns, rows), box, reducing_gap=1.0)
    return small.crop((0, 0, columns // BLOCK * BLOCK, rows // BLOCK * BLOCK))


def _ink(means: np.ndarray) -> np.ndarray:
    """Blocks of a colour that H&E does not have, bool [rows, columns], of mean RGB."""
    red, green, blue = np.moveaxis(means, -1, 0)
    high, low = means.max(-1), means.min(-1)
    marks = green - red > GREEN
    marks |= blue - red + (green - red) / 2 > BLUE  # hematoxylin is violet: red above green
    marks |= red - np.maximum(green, blue) > RED
    marks |= (high < BLACK) & (high - low < GREY)
    return marks


def _tissue(cells: np.ndarray) -> np.ndarray:
    """Share of tissue in each block, float64 [rows, columns], of mean RGB of its cells."""
    from data_prep.detector import tissue_mask

    mask, n = tissue_mask(cells), BLOCK // CELL
    return mask.reshape(mask.shape[0] // n, n, mask.shape[1] // n, n).mean((1, 3))


def _cut(light: np.ndarray) -> np.ndarray:
    """[rows * BLOCK, columns * BLOCK] as [rows, columns, BLOCK, BLOCK]."""
    rows, columns = (side // BLOCK for side in light.shape)
    return light.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)


def _means(light: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 px of float [n, even, even]."""
    rows = light[:, ::2] + light[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) / 4


def _contrast(light: np.ndarray) -> float:
    """Mean variance within 2 x 2 px of float [n, even, even]."""
    return float(np.mean(_means(light**2) - _means(light) ** 2))
