"""The map of a tissue: what lies where, as smooth fields over the whole slide.

Fields are sampled on a coarse lattice and read through a cubic B-spline, so that a contour (a level
set of a field) is sharp and smooth at any resolution and the same for every patch.
"""

from dataclasses import dataclass

import numpy as np

from lemon_muse.synthetic.noise import Noise, Window, smooth, spline_grid

STEP = 4.0  # µm between lattice points
MARGIN = 96.0  # µm of world drawn beyond the image, so that nothing stops at its border
_STYLE = 103


@dataclass(frozen=True)
class Style:
    """What makes the tissue of one slide its own: architecture, cell size, density, fibres."""

    nest: float  # grain of the tumour map, µm
    stretch: float  # 1 round nests, 3 cords
    direction: float  # of cords and fibres, radians
    tumour_level: float  # threshold in standard deviations: low is sheets, high is scattered nests
    lymphoid: float  # threshold of lymphoid aggregates
    scatter: float  # share of stroma places taken by single lymphocytes
    plasma: float  # threshold of plasma cell areas
    loose: float  # threshold of loose, myxoid stroma
    glands: float  # share of nest places that hold a lumen
    fat: float  # threshold of fat
    cleft: float  # width of retraction clefts around nests, µm
    diameter: float  # of tumour nuclei, µm
    crowding: float  # spacing of tumour nuclei over their diameter
    pleomorphism: float  # log-normal spread of tumour nuclei
    chromatin: float  # 0 vesicular ... 1 dense tumour nuclei
    fibroblasts: float  # spacing of stroma nuclei, µm
    collagen: float  # eosin of the fibres
    basophilia: float  # hematoxylin of tumour cytoplasm
    blueness: float  # hematoxylin that stroma has taken up
    wave: float  # radians by which fibres undulate
    tear: float  # how readily bundles come apart, in standard deviations
    foam: float  # vacuolation of tumour cytoplasm, 0 to 1


def style(slide: int) -> Style:
    """The style of slide number `slide`, always the same."""
    rng = np.random.default_rng([_STYLE, slide])
    u = rng.uniform
    return Style(
        nest=u(17, 34),
        stretch=float(np.exp(u(0, 1.0))),
        direction=u(0, np.pi),
        tumour_level=u(-0.35, 0.35),
        lymphoid=u(0.5, 1.3),
        scatter=u(0.04, 0.22),
        plasma=u(0.0, 0.9),
        loose=u(0.2, 1.6),
        glands=u(0.0, 0.012),
        fat=u(1.3, 2.8),
        cleft=float(np.exp(rng.normal(0.3, 0.7))),
        diameter=u(9.2, 12.3),
        crowding=u(0.96, 1.16),
        pleomorphism=u(0.08, 0.2),
        chromatin=u(0.0, 0.8),
        fibroblasts=u(12, 18),
        collagen=u(0.28, 0.52),
        basophilia=u(0.06, 0.22),
        blueness=0.03 + 0.11 * u(0, 1) ** 2,
        wave=u(0.1, 0.4),
        tear=u(-2.6, -1.5),
        foam=u(0, 1),
    )


FIELDS = ("tissue", "tumour", "lymphoid", "plasma", "loose", "fat", "cos", "sin", "cleft", "focus")


class Regions:
    """Fields over a square world of `side` µm (and `MARGIN` around it).

    `tissue`, `tumour` and `fat` are about the signed distance to the border in µm, positive
    inside; `lymphoid`, `plasma`, `loose` and `focus` lie in [0, 1]; `cos`, `sin` are of twice the
    angle of the fibres; `cleft` is the local width of the gap around nests, µm.
    """

    def __init__(self, noise: Noise, look: Style, side: float, *, glass: bool) -> None:
        self.origin = -MARGIN - 2 * STEP
        count = int(np.ceil((side - 2 * self.origin) / STEP)) + 1
        self.values = np.empty((len(FIELDS), count, count), np.float32)
        # Bands of rows: the temporaries of a whole slide would take gigabytes.
        for start in range(0, count, 256):
            stop = min(count, start + 256)
            # One row more on both sides, for the gradient.
            rows = np.arange(start - 1, stop + 1)
            x = (self.origin + np.arange(-1, count + 1) * STEP)[None, :].astype(np.float64)
            y = (self.origin + rows * STEP)[:, None].astype(np.float64)
            x, y = np.broadcast_arrays(x, y)
            self.values[:, start:stop] = _fields(noise, look, x, y, side=side, glass=glass)

    def grid(self, name: str, window: Window) -> np.ndarray:
        """A field on the pixels of a window, float32 [height, width]."""
        lattice = self.values[FIELDS.index(name)]
        return spline_grid(lattice, window, step=STEP, x=self.origin, y=self.origin, wrap=False)

    def at(self, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """A field at scattered points in µm (bilinear), float32 [n]."""
        lattice = self.values[FIELDS.index(name)]
        limit = lattice.shape[0] - 1.001
        col = np.clip((x - self.origin) / STEP, 0, limit)
        row = np.clip((y - self.origin) / STEP, 0, limit)
        c, r = col.astype(np.int64), row.astype(np.int64)
        fc, fr = col - c, row - r
        top = lattice[r, c] * (1 - fc) + lattice[r, c + 1] * fc
        bottom = lattice[r + 1, c] * (1 - fc) + lattice[r + 1, c + 1] * fc
        return (top * (1 - fr) + bottom * fr).astype(np.float32)

    def angle(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Direction of the fibres at scattered points, radians."""
        return np.arctan2(self.at("sin", x, y), self.at("cos", x, y)) / 2


def _distance(field: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """About the signed distance in µm to the zero level, and the gradient (without the border)."""
    down, right = np.gradient(field, STEP)
    inner = (slice(1, -1), slice(1, -1))
    # A floor under the gradient keeps plateaus from looking far away from any border.
    slope = np.sqrt(down[inner] ** 2 + right[inner] ** 2) + 0.008
    return np.clip(field[inner] / slope, -60, 60), right[inner], down[inner]


def _fields(
    noise: Noise, look: Style, x: np.ndarray, y: np.ndarray, *, side: float, glass: bool
) -> np.ndarray:
    """All fields on lattice points x, y [r, c] in µm; float32 [FIELDS, r - 2, c - 2]."""
    inner = (slice(1, -1), slice(1, -1))
    cos, sin = np.cos(look.direction), np.sin(look.direction)
    wx = x + 14 * noise.points("warp x", x, y, 26)
    wy = y + 14 * noise.points("warp y", x, y, 26)
    along, across = (
        (wx * cos + wy * sin) / look.stretch**0.6,
        (wy * cos - wx * sin) * look.stretch**0.4,
    )
    nests = noise.points("nests", along, across, look.nest, octaves=2)
    tumour, right, down = _distance(nests - np.float32(look.tumour_level))
    tissue = 2.1 + noise.points("tissue", x, y, 90, octaves=3)
    if glass:
        # A slide carries one piece of tissue with glass all around it.
        reach = np.hypot(x / side - 0.5, y / side - 0.5) / 0.5
        tissue = tissue + np.float32(6) * (0.84 - reach)
    tissue, *_ = _distance(tissue)
    fat, *_ = _distance(noise.points("fat", x, y, 45, octaves=2) - np.float32(look.fat))
    x, y = x[inner], y[inner]
    aggregate = noise.points("lymphoid", x, y, 30, octaves=2)
    plasma = noise.points("plasma", x, y, 22)
    loose = noise.points("loose", x, y, 40)
    # Fibres: the slide's direction, a slow turn, and along the border of the nests beside them.
    turn = noise.points("turn", x, y, 70) * 0.9 + look.direction
    hug = 2.5 * np.exp(-(((tumour + 8) / 16) ** 2))
    tangent = np.arctan2(down, right) + np.pi / 2
    c = np.cos(2 * turn) + hug * np.cos(2 * tangent)
    s = np.sin(2 * turn) + hug * np.sin(2 * tangent)
    length = np.hypot(c, s) + 1e-3
    cleft = look.cleft * np.clip(noise.points("cleft", x, y, 22) + 0.2, 0, 2.5)
    focus = smooth(noise.points("focus", x, y, 120), 0.6, 2.4)
    return np.stack(
        [
            tissue,
            tumour,
            smooth(aggregate, look.lymphoid - 0.15, look.lymphoid + 0.5),
            smooth(plasma, look.plasma - 0.3, look.plasma + 0.5),
            smooth(loose, look.loose - 0.6, look.loose + 0.6),
            fat,
            c / length,
            s / length,
            cleft,
            focus,
        ]
    ).astype(np.float32)
