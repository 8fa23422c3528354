"""What the stain of a slide is: Macenko's two vectors, moments in CIELAB, and there and back.

Stains absorb light in proportion to their amount, so optical densities add up (Beer-Lambert): every
pixel of H&E lies in the plane that the hematoxylin and the eosin vector span. Optical density here
is -ln((I + 1) / 256): 0 on glass of 255, finite on black.
"""

import numpy as np

BETA = 0.15  # OD below which a channel is taken for glass
ALPHA = 1.0  # percent of the angles beyond each stain vector
STRENGTH = 99.0  # percentile of a stain's concentrations that is its strength
LEAST = 100  # stained pixels: with fewer a percentile is a single pixel
SPREAD = 5.0  # degrees between the two vectors; closer ones are one stain and its noise
DIGITS = 5

DENSITY = -np.log((np.arange(256) + 1) / 256)


def optical_density(pixels: np.ndarray) -> np.ndarray:
    """Optical density, float32 [..., 3] from 0 to 5.55, of RGB uint8 [..., 3]."""
    return DENSITY.astype(np.float32)[pixels]


def macenko(
    pixels: np.ndarray, *, beta: float = BETA, alpha: float = ALPHA
) -> tuple[np.ndarray, np.ndarray] | None:
    """The two stain vectors of a slide and how strong each is.

    Macenko et al., "A method for normalizing histology slides for quantitative analysis",
    ISBI 2009, section 2: the singular vectors of the densities span the plane of the stains, and
    the stains are the robust extremes of the angle in it. A stained pixel is one of which all three
    densities reach `beta`, as in the authors' published program.

    Args:
        pixels: RGB uint8 [n, 3], tissue with or without glass.
        beta: OD.
        alpha: percent, 0 to 50.

    Returns:
        Vectors float64 [2, 3], unit length, hematoxylin first: that with the larger share of red
        density, as eosin hardly absorbs red. Strength float64 [2]: the 99th percentile of the least
        squares concentration over the stained pixels, so that glass does not count.
        None where fewer than 100 pixels are stained or the two vectors lie within 5 degrees.
    """
    density = DENSITY[_checked(pixels)]
    density = density[(density >= beta).all(1)]
    if len(density) < LEAST:
        return None
    # The plane of stains passes through the origin, so the second moments are not centred.
    _, axes = np.linalg.eigh(density.T @ density)
    plane = axes[:, :0:-1]  # [3, 2]: the larger two, largest first
    # The largest axis points into the cone of the densities: angles stay clear of the jump at 180.
    plane = plane * np.where(plane.sum(0) < 0, -1, 1)
    flat = density @ plane
    angle = np.percentile(np.arctan2(flat[:, 1], flat[:, 0]), (alpha, 100 - alpha))
    if np.ptp(angle) < np.deg2rad(SPREAD):
        return None
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1) @ plane.T
    vectors = vectors[np.argsort(-vectors[:, 0])]
    amount = density @ np.linalg.pinv(vectors)
    return vectors, np.percentile(amount, STRENGTH, axis=0)


def lab_moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation in CIELAB (D65; L 0 to 100), float64 [3] each, of uint8 [n, 3].

    What RandStainNA (Shen et al., MICCAI 2022) knows of a slide.

    Raises:
        ValueError: there is no pixel.
    """
    from skimage.color import rgb2lab

    if not len(_checked(pixels)):
        raise ValueError("the moments of no pixel are not known")
    lab = rgb2lab(pixels)
    return lab.mean(0), lab.std(0)


def describe(pixels: np.ndarray) -> dict[str, object]:
    """Everything above of uint8 [n, 3], n > 0, as it goes into JSON, rounded to 5 digits.

    Returns:
        lab_mean [3], lab_std [3], vectors [2, 3] and strength [2], the last two None where
        `macenko` finds no two stains.
    """
    mean, std = lab_moments(pixels)
    found = macenko(pixels)
    vectors, strength = found if found is not None else (None, None)
    named = {"lab_mean": mean, "lab_std": std, "vectors": vectors, "strength": strength}
    return {k: None if v is None else v.round(DIGITS).tolist() for k, v in named.items()}


def concentrations(pixels: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """How much of each stain: least squares, float32 [n, 2], of uint8 [n, 3].

    Args:
        pixels: RGB.
        vectors: float [2, 3], rows are the stains' densities; not parallel.

    Returns:
        Amounts in units of the vectors; a pixel outside the stains' cone has a negative one.
    """
    solve = np.linalg.pinv(np.asarray(vectors, np.float64)).astype(np.float32)
    return optical_density(_checked(pixels)) @ solve


def compose(concentrations: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The inverse: RGB uint8 [n, 3] of amounts float [n, 2], rounded and held within 0 to 255.

    Where a pixel lies in the plane of the stains it comes back as it was.
    """
    density = np.asarray(concentrations, np.float32) @ np.asarray(vectors, np.float32)
    return np.rint(256 * np.exp(-density) - 1).clip(0, 255).astype(np.uint8)


def _checked(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be uint8 [n, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels
