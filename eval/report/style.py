"""How the pictures look: one palette for classes, one matplotlib style, 2x resolution."""

import base64
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

# Okabe and Ito's colour-blind-safe palette, ordered by contrast to the pink and violet of H&E,
# then Paul Tol's "muted" set for label sets with more classes.
PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#F0E442", "#000000", "#CC79A7",
    "#332288", "#44AA99", "#999933", "#882255", "#DDCC77", "#117733", "#88CCEE", "#AA4499",
)  # fmt: skip
INK, MUTED, LINE, FAINT = "#1c2430", "#5f6b7a", "#d5dbe3", "#aeb7c2"
ACCENT = "#8a2d6b"
DPI = 192  # twice CSS's 96: one CSS pixel is two picture pixels
WIDTH = 1036  # CSS pixels of a picture as wide as the text

_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same picture everywhere
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf0f4",
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A picture of the page: its PNG file, and the bytes that stand inline."""

    name: str
    png: bytes
    inline: bytes
    kind: str
    width: int
    height: int
    alt: str

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.inline).decode()}"


def class_colour(index: int) -> str:
    """The colour of a class, the same in every picture."""
    return PALETTE[index % len(PALETTE)]


def rgb(colour: str) -> tuple[int, int, int]:
    """'#rrggbb' as three bytes."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def short(text: str, length: int = 30) -> str:
    """Cut the middle out of a name that is too long for a picture."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - half - 1]}…{text[-half:]}"


@contextmanager
def canvas(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of that many CSS pixels, without pyplot's global state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(width / 96, height / 96), dpi=DPI, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
        FigureCanvasAgg(figure)
        yield figure


def drawn(figure: Any, name: str, alt: str) -> Picture:
    """A finished matplotlib figure as a picture; no date or version goes into the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    image = Image.open(buffer).convert("RGB")
    # Plots have few colours: a palette makes the file three times smaller and looks the same.
    small = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    png = _png(small)
    return Picture(name, png, png, "png", image.width // 2, image.height // 2, alt)


def photographed(image: Image.Image, name: str, alt: str) -> Picture:
    """A sheet of nuclei: PNG as a file, JPEG 4:4:4 inline (a tenth of the bytes)."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88, subsampling=0, optimize=True, progressive=True)
    size = (math.ceil(image.width / 2), math.ceil(image.height / 2))
    return Picture(name, _png(image), buffer.getvalue(), "jpeg", *size, alt)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Level 9 would make photographs 2 % smaller and take five times as long.
    image.save(buffer, format="PNG", compress_level=4 if image.mode == "RGB" else 9)
    return buffer.getvalue()
