"""What lies below the nuclei: collagen, tumour cytoplasm, lymphoid ground, gaps and glass."""

import numpy as np
from scipy import ndimage

from lemon_muse.synthetic.cells import ADIPOCYTE, LUMEN, MITOSIS, TUMOUR, Cells, Holes
from lemon_muse.synthetic.noise import Noise, Window, smooth, texture
from lemon_muse.synthetic.regions import Regions, Style

COARSE = 1.0  # µm per pixel of the bundle pattern
HALO = 14.0  # µm around a patch within which cells shape its cytoplasm


def ground(
    noise: Noise, look: Style, regions: Regions, cells: Cells, window: Window
) -> tuple[np.ndarray, np.ndarray]:
    """Hematoxylin and eosin below the nuclei, two float32 [height, width] on `window`."""
    field = {name: regions.grid(name, window) for name in ("tumour", "lymphoid", "loose", "cleft")}
    bundles, fibres = _collagen(noise, look, regions, window)
    rough = noise.grid("rough", window, 2.2, octaves=2)
    loose = field["loose"]
    body = smooth(bundles, -1.3, 1.2)
    grainy = noise.grid("granules", window, 0.75, octaves=2)
    threads = 0.17 * fibres + 0.07 * rough + 0.08 * grainy
    e = np.float32(look.collagen) * (0.55 + 0.5 * body + threads)
    h = np.float32(look.blueness) + 0.04 * loose + 0.03 * fibres + 0.018 * rough + 0.012 * grainy
    # Loose stroma is pale and grey-blue; between bundles the section tears open.
    e *= 1 - loose * (0.5 - 0.2 * fibres - 0.1 * grainy)
    open_ = smooth(bundles + 0.3 * rough - 0.3 * loose, look.tear - 0.25, look.tear + 0.25)
    e, h = e * (0.08 + 0.92 * open_), h * (0.1 + 0.9 * open_)
    # Lymphoid ground: little matter between the cells.
    aggregate = field["lymphoid"]
    thin = smooth(rough + 0.4 * fibres, -1.2, 0.9)
    e += aggregate * (0.2 * thin + 0.03 - e)
    h += aggregate * (0.09 * thin + 0.01 - h)
    border = field["tumour"] + 0.6 * rough
    nest = smooth(border, -0.7, 0.7)
    nest_h, nest_e = _cytoplasm(look, cells, window, rough, grainy)
    e += nest * (nest_e - e)
    h += nest * (nest_h - h)
    gap = smooth(-border, 0.0, 0.8) * smooth(border + field["cleft"] * 1.6, -0.6, 0.6)
    keep = 1 - 0.93 * gap
    return np.clip(h * keep, 0, None), np.clip(e * keep, 0, None)


def _collagen(
    noise: Noise, look: Style, regions: Regions, window: Window
) -> tuple[np.ndarray, np.ndarray]:
    """Bundles (several µm) and fibres (below a µm): noise smeared along the direction field."""
    wide = window.grown(48, COARSE)
    pattern = noise.grid("bundles", wide, 2.6)
    cos, sin = _direction(noise, look, regions, wide)
    bundles = _smear(pattern, cos, sin, reach=24, follow=True)
    rows, cols = np.arange(window.height), np.arange(window.width)
    y = (window.y + (rows + 0.5) * window.step - wide.y) / COARSE - 0.5
    x = (window.x + (cols + 0.5) * window.step - wide.x) / COARSE - 0.5
    bundles = _bilinear(bundles, y, x)
    near = window.grown(7)
    pattern = noise.grid("fibres", near, 0.7)
    cos, sin = _direction(noise, look, regions, near)
    fibres = _smear(pattern, cos, sin, reach=round(5 / window.step), follow=False)
    return bundles, fibres[near.inner(window)]


def _direction(
    noise: Noise, look: Style, regions: Regions, window: Window
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vector of the fibres (x, y) on a window, with their wave."""
    angle = np.arctan2(regions.grid("sin", window), regions.grid("cos", window)) / 2
    angle += np.float32(look.wave) * noise.grid("wave", window, 9)
    return np.cos(angle), np.sin(angle)


def _smear(
    pattern: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, reach: int, follow: bool
) -> np.ndarray:
    """Mean of the pattern along the direction field, `reach` pixels both ways, unit variance.

    `follow` looks the direction up again at every step (curved paths), else paths are straight.
    """
    height, width = pattern.shape
    grid: np.ndarray = np.indices(pattern.shape, dtype=np.float32)
    flat, flat_cos, flat_sin = pattern.ravel(), cos.ravel(), sin.ravel()
    total = pattern.copy()
    for sign in (1.0, -1.0):
        dx, dy = cos * np.float32(sign), sin * np.float32(sign)
        y, x = grid.copy()
        for _ in range(reach):
            x += dx
            y += dy
            np.clip(x, 0, width - 1, out=x)
            np.clip(y, 0, height - 1, out=y)
            at = (y + 0.5).astype(np.int32) * width + (x + 0.5).astype(np.int32)
            total += flat[at]
            if follow:
                # A line has no sense of direction: keep going the way we came.
                nx, ny = flat_cos[at], flat_sin[at]
                turn = np.where(nx * dx + ny * dy < 0, np.float32(-1), np.float32(1))
                dx, dy = nx * turn, ny * turn
    # The spread is that of a mean of correlated values; a constant, so that patches agree.
    return total / np.float32(SPREAD[follow] * np.sqrt(2 * reach + 1))


# Measured standard deviation of the sums above, over the square root of the number of terms.
SPREAD = {True: 1.75, False: 1.35}


def _bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Read an image on the grid of row positions y and column positions x."""
    r = np.clip(np.floor(y).astype(np.int64), 0, image.shape[0] - 2)
    c = np.clip(np.floor(x).astype(np.int64), 0, image.shape[1] - 2)
    fy, fx = (y - r).astype(np.float32)[:, None], (x - c).astype(np.float32)[None, :]
    rows = image[r] * (1 - fy) + image[r + 1] * fy
    return rows[:, c] * (1 - fx) + rows[:, c + 1] * fx


def _cytoplasm(
    look: Style, cells: Cells, window: Window, rough: np.ndarray, grainy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tumour cytoplasm: a pixel belongs to the nearest nucleus; cells differ and have borders."""
    wide = window.grown(HALO)
    owners = np.flatnonzero((cells.kind == TUMOUR) | (cells.kind == MITOSIS))
    col = np.floor((cells.xy[owners, 0] - wide.x) / wide.step).astype(np.int64)
    row = np.floor((cells.xy[owners, 1] - wide.y) / wide.step).astype(np.int64)
    inside = (col >= 0) & (row >= 0) & (col < wide.width) & (row < wide.height)
    if not inside.any():
        flat = np.ones_like(grainy)
        return 0.1 * flat, 0.25 * flat
    seeds = np.zeros((wide.height, wide.width), np.int32)
    seeds[row[inside], col[inside]] = owners[inside] + 1
    nearest = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    # Reading the map at wavering positions makes borders between cells uneven.
    rows, cols = np.indices(grainy.shape)
    top, left = (s.start for s in wide.inner(window))
    waver = np.float32(0.9 / window.step)
    r = np.clip(np.rint(rows + top + waver * rough), 0, wide.height - 1).astype(np.int64)
    c = np.clip(np.rint(cols + left - waver * rough), 0, wide.width - 1).astype(np.int64)
    owner = seeds[nearest[0][r, c], nearest[1][r, c]] - 1
    edge = np.zeros(owner.shape, np.float32)
    edge[1:] += owner[1:] != owner[:-1]
    edge[:, 1:] += owner[:, 1:] != owner[:, :-1]
    edge = ndimage.gaussian_filter(np.minimum(edge, 1), 0.45 / window.step, truncate=3)
    tone, other = (
        ndimage.uniform_filter(cells.dice[:, k][owner], round(2 / window.step)) for k in (5, 4)
    )
    foam = 1 - np.float32(0.75 * look.foam) * smooth(rough + 0.6 * grainy, 0.5, 1.4) * (0.3 + tone)
    h = np.float32(look.basophilia) * (0.65 + 0.7 * tone) * (1 + 0.3 * grainy + 0.16 * rough) * foam
    e = (
        np.float32(0.2 + 0.16 * look.collagen)
        * (0.7 + 0.6 * other)
        * (1 + 0.2 * grainy + 0.1 * rough)
        * foam
    )
    # Some slides show membranes as pale gaps, others as pink lines.
    line = float(1.4 - 2.4 * look.basophilia / 0.22)
    e = e * np.clip(1 + line * edge, 0.15, 3) + 0.08 * max(line, 0) * edge
    h = h * np.clip(1 - 0.7 * edge, 0.15, 3)
    return h, e


def holes(window: Window, gaps: Holes, h: np.ndarray, e: np.ndarray) -> None:
    """Clear the stain inside fat cells, lumens and vacuoles, in place; walls stay pink."""
    for i in range(len(gaps.xy)):
        radius = float(gaps.radius[i])
        reach = radius * 1.25 + 1.5
        left = int(np.floor((gaps.xy[i, 0] - reach - window.x) / window.step))
        top = int(np.floor((gaps.xy[i, 1] - reach - window.y) / window.step))
        size = int(2 * reach / window.step) + 1
        rows = np.arange(max(0, top), min(window.height, top + size))
        cols = np.arange(max(0, left), min(window.width, left + size))
        if not len(rows) or not len(cols):
            continue
        dy = (window.y + (rows + 0.5) * window.step - gaps.xy[i, 1])[:, None].astype(np.float32)
        dx = (window.x + (cols + 0.5) * window.step - gaps.xy[i, 0])[None, :].astype(np.float32)
        shift = (gaps.dice[i, :2] * 512).astype(np.int64)
        at = (
            (shift[0] + np.arange(len(rows)))[:, None] % 512,
            (shift[1] + np.arange(len(cols))) % 512,
        )
        squeeze = 1 + 0.25 * (gaps.dice[i, 2] - 0.5)
        rho = np.hypot(dx * squeeze, dy / squeeze)
        wobble = texture(max(2.6, radius / 2.5), window.step)[at]
        inside = radius * (1 + 0.09 * wobble) - rho
        mask = smooth(inside, -0.4, 0.5)
        place = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
        content = 0.02
        if gaps.kind[i] == LUMEN:
            # Secretion: wisps of mucin in part of the lumens.
            content = 0.03 + 0.35 * gaps.dice[i, 3] ** 3 * smooth(
                texture(1.3, window.step)[at], 0, 1
            )
        wall = np.exp(-(((inside + 0.5) / 0.6) ** 2)) * (gaps.kind[i] == ADIPOCYTE)
        e[place] = e[place] * (1 - mask) + content * mask + 0.16 * wall
        h[place] = h[place] * (1 - mask) + 0.5 * content * mask + 0.03 * wall
