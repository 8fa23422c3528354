"""Crops for the benchmarks: real nuclei where there are any, else generated tissue."""

from pathlib import Path

import numpy as np

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "brca-m2c"


def real_crops(count: int, *, size: int = 64, mpp: float = 0.25) -> tuple[np.ndarray, str]:
    """Pixels uint8 [count, size, size, 3] and the name of their source."""
    from lemon_muse.data.layouts import read_layout

    if REAL.is_dir():
        table, name = read_layout(REAL, "brcam2c")
        rows = np.random.default_rng(0).permutation(len(table))[:count]
        crops = table.crops(size, mpp, np.sort(rows))
    else:
        from lemon_muse.data import geometry
        from lemon_muse.synthetic import tissue

        name, parts = "generated", []
        while sum(map(len, parts)) < count:
            field = tissue(len(parts), side=2048, mpp=mpp)
            parts.append(geometry.crop(field.image, field.xy, size=size)[0])
        crops = np.concatenate(parts)[:count]
    return crops[np.random.default_rng(1).permutation(len(crops))], name
