"""Large slides for the benchmarks: a field of generated tissue, repeated over a pyramid."""

from pathlib import Path

import numpy as np

from lemon_muse.synthetic import tissue

QUALITY = 80  # of the JPEG tiles, 4:2:0 as scanners write them
NAME = "Aperio Image Library v12.0.15 (generated tissue, not a scanner file) "


def write_repeated(
    path: Path, *, field: int, times: int, mpp: float = 0.25, seed: int = 0
) -> np.ndarray:
    """Write a slide of `times` x `times` copies of a field of `field` px, as an Aperio pyramid.

    Drawing 20,000 px of tissue takes minutes. Tiles of 256 px do not divide the field, so that most
    tiles of the copies differ all the same.

    Returns:
        The nuclei, float64 [n, 2], level-0 px.
    """
    import pyvips

    drawn = tissue(seed, side=field, mpp=mpp, jpeg=False)
    side = field * times
    image = pyvips.Image.new_from_memory(drawn.image.tobytes(), field, field, 3, "uchar")
    image = image.replicate(times, times).copy(interpretation="srgb")
    about = f"{NAME}{0:06d}\r\n{side}x{side} (256x256) JPEG/YCC Q={QUALITY}"
    about += f"|AppMag = {round(10 / mpp)}|MPP = {mpp:.4f}"
    image.set_type(pyvips.GValue.gstr_type, "image-description", about)
    image.tiffsave(
        str(path), tile=True, pyramid=True, compression="jpeg", Q=QUALITY, tile_width=256,
        tile_height=256, bigtiff=True, depth="onetile", xres=1000 / mpp, yres=1000 / mpp,
        resunit="cm",
    )  # fmt: skip
    shift = np.stack(np.meshgrid(np.arange(times), np.arange(times)), -1).reshape(-1, 1, 2)
    return (drawn.xy[None] + shift * float(field)).reshape(-1, 2)


def copy_as(source: Path, path: Path, number: int) -> None:
    """A copy of a slide whose description has another number: a file of its own bytes."""
    data = source.read_bytes()
    old, new = f"{NAME}{0:06d}".encode(), f"{NAME}{number:06d}".encode()
    if old not in data:  # every level states it
        raise ValueError(f"{source} is not from write_repeated")
    path.write_bytes(data.replace(old, new))
