"""From optical density to an image: stains of a slide, optics and electronics of a scanner.

Absorption is Beer-Lambert: I = I0 * 10^-(c_H v_H + c_E v_E), one exponent per colour channel. The
stain vectors lie between two published pairs: Ruifrok and Johnston 2001 and the reference pair of
Macenko et al. 2009, each slide somewhere between and a little beside.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
MACENKO = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
_STAIN, _SCANNER = 101, 102


@dataclass(frozen=True)
class Stain:
    """Staining of one slide: unit vectors float64 [2, 3] (H, E rows; RGB columns) and strengths."""

    vectors: np.ndarray
    hematoxylin: float
    eosin: float


@dataclass(frozen=True)
class Scanner:
    """One scanner: white point RGB in [0, 1], tone curve, blur in µm, sharpening, noise, JPEG."""

    white: np.ndarray
    gamma: float
    saturation: float
    blur: float
    sharpen: float
    noise: float
    quality: int
    subsample: bool


def stain(slide: int) -> Stain:
    """The staining of slide number `slide`, always the same."""
    rng = np.random.default_rng([_STAIN, slide])
    mix = np.array([[rng.uniform(0.3, 1.1)], [rng.uniform(0.4, 0.95)]])
    vectors = RUIFROK + mix * (MACENKO - RUIFROK) + rng.normal(0, 0.02, (2, 3))
    vectors = np.clip(vectors, 0.02, None)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    strength = np.exp(rng.normal([-0.12, -0.22], [0.27, 0.32]))
    return Stain(vectors, float(strength[0]), float(strength[1]))


def scanner(number: int) -> Scanner:
    """The properties of scanner `number`, always the same."""
    rng = np.random.default_rng([_SCANNER, number])
    return Scanner(
        white=rng.uniform(0.92, 0.975) + rng.uniform(-0.02, 0.02, 3),
        gamma=float(rng.uniform(0.8, 1.2)),
        saturation=float(rng.uniform(0.8, 1.15)),
        blur=float(rng.uniform(0.24, 0.46)),
        sharpen=float(rng.choice([0.0, 0.4, 0.8])),
        noise=float(rng.uniform(0.003, 0.011)),
        quality=int(rng.integers(72, 96)),
        subsample=bool(rng.integers(0, 2)),
    )


def beer_lambert(h: np.ndarray, e: np.ndarray, staining: Stain) -> np.ndarray:
    """Transmitted light float32 [3, H, W] in (0, 1] of stain amounts h, e float32 [H, W]."""
    out = np.empty((3, *h.shape), np.float32)
    scale = np.float32(-np.log(10))
    for channel in range(3):
        v_h = np.float32(staining.vectors[0, channel] * staining.hematoxylin) * scale
        v_e = np.float32(staining.vectors[1, channel] * staining.eosin) * scale
        plane = v_h * h
        plane += v_e * e
        np.exp(plane, out=out[channel])
    return out


def expose(light: np.ndarray, device: Scanner, *, mpp: float, noise: np.ndarray) -> np.ndarray:
    """What the scanner makes of the light: point spread, sharpening, tone, noise; uint8 [H, W, 3].

    Args:
        light: float32 [3, H, W] in (0, 1]; used up (overwritten).
        device: the scanner.
        mpp: µm per pixel.
        noise: float32 [3, H, W], unit variance.
    """
    levels = 4096
    ramp = np.linspace(0, 1.02, levels)
    for channel in range(3):
        plane = light[channel]
        ndimage.gaussian_filter(plane, device.blur / mpp, truncate=3, output=plane)
        if device.sharpen:
            halo = ndimage.gaussian_filter(plane, 0.5 / mpp, truncate=2.5)
            plane *= np.float32(1 + device.sharpen)
            plane -= np.float32(device.sharpen) * halo
        # The tone curve through a table: a power per pixel would cost more than all the rest.
        curve = (ramp**device.gamma * device.white[channel]).astype(np.float32)
        np.clip(plane, 0, 1.02, out=plane)
        plane *= np.float32((levels - 1) / 1.02)
        light[channel] = curve[plane.astype(np.int16)]
    grey = light.mean(axis=0)
    out = np.empty((*grey.shape, 3), np.uint8)
    for channel in range(3):
        plane = grey + np.float32(device.saturation) * (light[channel] - grey)
        # Photon noise grows with the square root of the light.
        plane += np.float32(device.noise) * noise[channel] * np.sqrt(np.clip(plane, 0.05, 1))
        np.clip(plane, 0, 1, out=plane)
        plane *= 255
        plane += 0.5
        out[..., channel] = plane
    return out


def jpeg(image: np.ndarray, device: Scanner) -> np.ndarray:
    """The image after the scanner's JPEG compression, uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    subsampling = 2 if device.subsample else 0
    Image.fromarray(image).save(buffer, "JPEG", quality=device.quality, subsampling=subsampling)
    buffer.seek(0)
    return np.array(Image.open(buffer).convert("RGB"))
