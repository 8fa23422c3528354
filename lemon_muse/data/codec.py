"""How pixels are stored: a block raw or as a JPEG sheet, a ROI as JPEG or WebP."""

import io

import numpy as np

CELLS_A_ROW = 16  # of a JPEG sheet


def encode(pixels: np.ndarray, encoding: str, quality: int) -> tuple[str, bytes]:
    """File ending and payload of a block's pixels, uint8 [N, S, S, 3]."""
    if encoding == "raw":
        buffer = io.BytesIO()
        np.save(buffer, pixels, allow_pickle=False)
        return "pixels.npy", buffer.getvalue()
    count, size = pixels.shape[:2]
    rows = -(-count // CELLS_A_ROW)
    cells = np.zeros((rows * CELLS_A_ROW, size, size, 3), np.uint8)
    cells[:count] = pixels
    sheet = cells.reshape(rows, CELLS_A_ROW, size, size, 3).swapaxes(1, 2)
    sheet = sheet.reshape(rows * size, CELLS_A_ROW * size, 3)
    return "sheet.jpg", encode_image(sheet, "jpeg", quality)


def decode(payload: np.ndarray, encoding: str, count: int, size: int) -> np.ndarray:
    """Pixels uint8 [count, size, size, 3] of a payload, uint8 [bytes], that `encode` made.

    Raw pixels are a view of the payload.
    """
    if encoding == "raw":
        return payload[-count * size * size * 3 :].reshape(count, size, size, 3)
    sheet = decode_image(payload)
    rows = sheet.shape[0] // size
    cells = sheet.reshape(rows, size, CELLS_A_ROW, size, 3).swapaxes(1, 2)
    return cells.reshape(rows * CELLS_A_ROW, size, size, 3)[:count]


def encode_image(image: np.ndarray, encoding: str, quality: int) -> bytes:
    """An RGB picture, uint8 [H, W, 3], as JPEG 4:4:4 ('jpeg') or WebP ('webp')."""
    if encoding == "jpeg":
        import imagecodecs

        pixels = np.ascontiguousarray(image)
        return bytes(imagecodecs.jpeg8_encode(pixels, level=quality, subsampling="444"))
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def decode_image(payload: np.ndarray) -> np.ndarray:
    """The RGB picture, uint8 [H, W, 3], of a JPEG or WebP file, uint8 [bytes].

    libjpeg-turbo through imagecodecs: 1.3 times as fast as through Pillow, the same pixels
    (measured), and it lets other threads run.
    """
    import imagecodecs

    is_jpeg = bytes(payload[:2]) == b"\xff\xd8"
    decoder = imagecodecs.jpeg8_decode if is_jpeg else imagecodecs.webp_decode
    return np.asarray(decoder(payload.tobytes()))[..., :3]
