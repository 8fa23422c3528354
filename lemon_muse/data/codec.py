"""How the pixels of a block are stored: raw, or a JPEG sheet."""

import io

import numpy as np
from PIL import Image

CELLS_A_ROW = 16  # of a JPEG sheet


def encode(pixels: np.ndarray, encoding: str, quality: int) -> tuple[str, bytes]:
    """File ending and payload of a block's pixels, uint8 [N, S, S, 3]."""
    buffer = io.BytesIO()
    if encoding == "raw":
        np.save(buffer, pixels, allow_pickle=False)
        return "pixels.npy", buffer.getvalue()
    count, size = pixels.shape[:2]
    rows = -(-count // CELLS_A_ROW)
    cells = np.zeros((rows * CELLS_A_ROW, size, size, 3), np.uint8)
    cells[:count] = pixels
    sheet = cells.reshape(rows, CELLS_A_ROW, size, size, 3).swapaxes(1, 2)
    sheet = sheet.reshape(rows * size, CELLS_A_ROW * size, 3)
    Image.fromarray(sheet).save(buffer, "JPEG", quality=quality, subsampling=0)
    return "sheet.jpg", buffer.getvalue()


def decode(payload: np.ndarray, encoding: str, count: int, size: int) -> np.ndarray:
    """Pixels uint8 [count, size, size, 3] of a payload, uint8 [bytes], that `encode` made.

    Raw pixels are a view of the payload.
    """
    if encoding == "raw":
        return payload[-count * size * size * 3 :].reshape(count, size, size, 3)
    sheet = np.asarray(Image.open(io.BytesIO(payload.tobytes())).convert("RGB"))
    rows = sheet.shape[0] // size
    cells = sheet.reshape(rows, size, CELLS_A_ROW, size, 3).swapaxes(1, 2)
    return cells.reshape(rows * CELLS_A_ROW, size, size, 3)[:count]
