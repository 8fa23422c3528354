"""Drawing a patch: ground, nuclei, holes, then light through the stain and the scanner."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lemon_muse.errors import UserError
from lemon_muse.synthetic import optics
from lemon_muse.synthetic.cells import Cells, Holes, scatter
from lemon_muse.synthetic.ground import HALO, ground, holes
from lemon_muse.synthetic.noise import TILE, Noise, Window, spline_grid, white
from lemon_muse.synthetic.nuclei import Canvas, paint
from lemon_muse.synthetic.regions import Regions, Style, style

HALO_PX = 12  # pixels drawn around a patch for the blur
QUANTUM = 16  # nuclei stand on sixteenths of a pixel: exact in float32 and short in GeoJSON


@dataclass(frozen=True)
class Tissue:
    """A piece of generated tissue.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        mpp: µm per pixel.
        xy: float32 [n, 2], x and y of each nucleus in pixels of `image`, pixel centres at +0.5.
        kinds: int64 [n], index in `CLASSES`.
    """

    image: np.ndarray
    mpp: float
    xy: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True)
class World:
    """Everything that is decided before a pixel is drawn; patches of it meet without a seam."""

    side: int
    mpp: float
    noise: Noise
    look: Style
    regions: Regions
    cells: Cells
    holes: Holes
    staining: optics.Stain
    device: optics.Scanner

    def nuclei(self) -> tuple[np.ndarray, np.ndarray]:
        """Nuclei inside the image: xy float32 [n, 2] in pixels and kinds int64 [n], row by row."""
        xy = self.cells.xy.astype(np.float64) / self.mpp
        xy = np.rint(xy * QUANTUM) / QUANTUM
        rows = np.flatnonzero(((xy >= 0.5) & (xy <= self.side - 0.5)).all(axis=1))
        rows = rows[np.lexsort((xy[rows, 0], xy[rows, 1]))]
        return xy[rows].astype(np.float32), self.cells.kind[rows]


def plan(
    seed: int,
    *,
    side: int,
    mpp: float,
    slide: int,
    scanner: int,
    mitotic_rate: float,
    glass: bool,
) -> World:
    """Lay out regions, nuclei, stain and scanner; see `tissue` for the arguments."""
    for name, value in (("seed", seed), ("slide", slide), ("scanner", scanner)):
        if value < 0:
            raise UserError(f"{name}={value} is negative: give 0 or more.")
    if side < 64:
        raise UserError(f"side={side} is too small for tissue: give 64 px or more.")
    if not 0.1 <= mpp <= 2:
        raise UserError(f"mpp={mpp} is outside 0.1 to 2 µm per pixel: tissue is drawn within.")
    if not 0 <= mitotic_rate <= 1:
        raise UserError(f"mitotic_rate={mitotic_rate} is a share of tumour cells: give 0 to 1.")
    noise, look = Noise(seed), style(slide)
    regions = Regions(noise, look, side * mpp, glass=glass)
    cells, gaps = scatter(seed, noise, look, regions, side * mpp, mitotic_rate=mitotic_rate)
    # Draw where the point will be written, not a fraction of a pixel beside it.
    snapped = np.rint(cells.xy.astype(np.float64) / mpp * QUANTUM) / QUANTUM * mpp
    cells.xy[:] = snapped
    staining, device = optics.stain(slide), optics.scanner(scanner)
    return World(side, mpp, noise, look, regions, cells, gaps, staining, device)


def patch(world: World, *, x: int, y: int, width: int, height: int) -> np.ndarray:
    """Draw pixels [y, y + height) x [x, x + width) of the world, uint8 [height, width, 3]."""
    mpp = world.mpp
    inner = Window(x * mpp, y * mpp, mpp, width, height)
    full = inner.grown(HALO_PX * mpp)
    cells, gaps = _near(world, full)
    h, e = _ground(world, cells, full)
    e *= 1 + 0.05 * world.noise.grid("grain", full, max(0.45, mpp))
    holes(full, gaps, h, e)
    paint(Canvas(full, h, e), cells)
    _glass(world, full, h, e)
    focus = world.regions.grid("focus", full)
    if float(focus.max()) > 0.05:
        for plane in (h, e):
            plane += focus * (ndimage.gaussian_filter(plane, 0.75 / mpp, truncate=3) - plane)
    thick = 1 + 0.07 * world.noise.grid("thickness", full, 60)
    light = optics.beer_lambert(h * thick, e * thick, world.staining)
    image = optics.expose(light, world.device, mpp=mpp, noise=_sensor(world, full))
    return np.ascontiguousarray(image[full.inner(inner)])


def tissue(
    seed: int,
    *,
    side: int = 1024,
    mpp: float = 0.25,
    slide: int = 0,
    scanner: int = 0,
    mitotic_rate: float = 0.02,
    jpeg: bool = True,
) -> Tissue:
    """Draw a square field of H&E-like tissue; a pure function of its arguments.

    Args:
        seed: layout of the tissue, >= 0. Fields of one `slide` with other seeds look alike.
        side: pixels per side, >= 64.
        mpp: µm per pixel, 0.1 to 2. The same seed shows the same tissue at any mpp.
        slide: number of the slide: stain vectors and strengths, architecture, cell size, >= 0.
        scanner: number of the scanner: white point, tone, blur, sharpening, noise, JPEG, >= 0.
        mitotic_rate: share of tumour cells in mitosis, 0 to 1.
        jpeg: send the pixels through the scanner's JPEG compression.

    Raises:
        UserError: an argument outside its range.
    """
    world = plan(
        seed,
        side=side,
        mpp=mpp,
        slide=slide,
        scanner=scanner,
        mitotic_rate=mitotic_rate,
        glass=False,
    )
    image = patch(world, x=0, y=0, width=side, height=side)
    if jpeg:
        image = optics.jpeg(image, world.device)
    xy, kinds = world.nuclei()
    return Tissue(image, mpp, xy, kinds)


def _near(world: World, window: Window) -> tuple[Cells, Holes]:
    """Nuclei and holes that may touch a window, in the world's order."""
    wide = window.grown(HALO + 14)
    low = np.array([wide.x, wide.y])
    high = low + np.array([wide.width, wide.height]) * wide.step
    cells = ((world.cells.xy > low) & (world.cells.xy < high)).all(axis=1)
    reach = world.holes.radius[:, None] * 1.3
    gaps = ((world.holes.xy + reach > low) & (world.holes.xy - reach < high)).all(axis=1)
    return world.cells.take(np.flatnonzero(cells)), world.holes.take(np.flatnonzero(gaps))


def _ground(world: World, cells: Cells, full: Window) -> tuple[np.ndarray, np.ndarray]:
    """The ground at half resolution where pixels are fine, read back on the full grid."""
    if full.step > 0.3:
        return ground(world.noise, world.look, world.regions, cells, full)
    half = full.grown(4 * full.step, 2 * full.step)
    planes = ground(world.noise, world.look, world.regions, cells, half)
    x, y = half.x + half.step / 2, half.y + half.step / 2
    h, e = (spline_grid(p, full, step=half.step, x=x, y=y, wrap=False) for p in planes)
    return h, e


def _glass(world: World, window: Window, h: np.ndarray, e: np.ndarray) -> None:
    """No stain beyond the edge of the tissue, in place; the edge is ragged."""
    border = world.regions.grid("tissue", window)
    if float(border.min()) > 12:
        return
    ragged = border + 1.2 * world.noise.grid("edge", window, 6, octaves=2)
    inside = np.clip(ragged / 1.2 + 0.5, 0, 1)
    h *= inside
    e *= inside


def _sensor(world: World, window: Window) -> np.ndarray:
    """Unit-variance noise per pixel and channel, from the position alone."""
    row, col = round(window.y / window.step), round(window.x / window.step)
    out = np.empty((3, window.height, window.width), np.float32)
    rng = np.random.default_rng([105, world.noise.seed])
    for channel, (dy, dx) in enumerate(rng.integers(0, TILE, (3, 2))):
        rows = np.arange(row + dy, row + dy + window.height) % TILE
        cols = np.arange(col + dx, col + dx + window.width) % TILE
        out[channel] = white()[rows[:, None], cols]
    return out
