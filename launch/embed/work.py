"""Features of the nuclei of one slide, in parts that are on disk as soon as they are made.

A part is read at once: some thousand crops, or about a hundred windows of a dense encoder, in rows
across the slide, so that neighbouring parts share few tiles. Batches do not cross parts; whatever
was done before a kill, a part has the same bytes.
"""

import copy
import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.embed.slides import Points, Task, find_points, key_of
from lemon_muse import __version__
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import RunError, UserError

if TYPE_CHECKING:
    from eval.samplers import Look
    from launch.embed import Embed
    from lemon_muse.data.slides import Slide

PART = 8192  # nuclei of a part, at most
HELD = 2**27  # bytes of pixels of a part, at most
STRIP = 1024  # rows of the slide, level-0 px at the encoder's mpp, that parts go along
# Squares begin on this raster, so that strided networks see every window in the same phase.
RASTER = 32


@dataclass(frozen=True)
class Way:
    """How features are made: the opened encoder and how it is read.

    `reader` is what keeps the contract of eval.features or eval.dense; `card` says it in plain
    values; `key` is their hash with all else that parts depend on.
    """

    encoder: Any
    reader: Any
    look: "Look"
    device: str
    dim: int
    card: dict[str, Any]
    key: str


@dataclass(frozen=True)
class Done:
    """A slide with all its parts: nuclei in the order of the parts, one file of features each."""

    task: Task
    points: Points
    parts: tuple[Path, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """Path, mpp, size and counts of the slide."""
        return self.points.facts

    def __len__(self) -> int:
        return len(self.points)


def open_way(cfg: "Embed") -> Way:
    """Open the encoder, on its device.

    Raises:
        UserError: it cannot be opened, or cannot be read as asked.
    """
    from eval.encoders import open_encoder
    from eval.samplers import Words, choose, reader
    from lemon_muse.dense import DenseEncoder

    encoder = open_encoder(cfg.encoder, Words(mpp=cfg.mpp))
    window, valid = cfg.window, cfg.valid
    if isinstance(encoder, DenseEncoder) and valid is None:
        # A quarter of the window on each side is context: at its border a nucleus would lack it.
        half = (window or encoder.image_size) // 2
        valid = max(half // RASTER * RASTER, min(half, RASTER), 1)
    look = choose(encoder, Words(window=window, valid=valid, mpp=cfg.mpp))
    device = _device(cfg.device)
    read = reader(encoder, look).to(device).eval()
    for parameter in read.parameters():
        parameter.requires_grad_(False)
    card: dict[str, Any] = {
        "name": encoder.name,
        "content_hash": encoder.content_hash,
        "kind": "dense" if look.valid else "crop",
        "window": look.window,
        "mpp": float(look.mpp),
        "mean": [float(v) for v in encoder.mean],
        "std": [float(v) for v in encoder.std],
        "dim": int(encoder.dim),
    }
    card |= {"valid": look.valid} if look.valid else {}
    card |= {"dtype": "bfloat16"} if cfg.bf16 else {}
    key = key_of(card, __version__, PART, HELD, STRIP)
    return Way(encoder, read, look, device, int(encoder.dim), card, key)


def _device(word: str) -> str:
    import torch

    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=word)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device={word} cannot be used ({first}); use device=cpu.") from None
    return word


def embed_slide(task: Task, cfg: "Embed", way: Way, folder: Path) -> Done:
    """Make the parts of a slide that are not there yet.

    Args:
        folder: of its parts and the list of its nuclei.

    Raises:
        UserError: the slide or its detections cannot be read.
        RunError: features are not finite, or the disk is full.
    """
    from eval.progress import Progress
    from lemon_muse.data.ahead import map_ahead

    with _open(task.path, cfg.slide_mpp) as slide:
        folder.mkdir(parents=True, exist_ok=True)
        points = find_points(task, cfg, slide, folder / "nuclei.npz")
        pieces = cut_pieces(points.xy, slide, way.look)
        files = [folder / f"{number:06d}.npy" for number in range(len(pieces))]
        todo = [i for i, file in enumerate(files) if not _is_part(file, len(pieces[i]), way.dim)]
        reader = _Reader(slide, way.look)
        total = sum(len(pieces[i]) for i in todo)
        try:
            with Progress(total, what=task.slide, unit="nuclei") as progress:
                read = map_ahead(
                    lambda i: reader.read(points.xy[pieces[i]]), todo, workers=cfg.workers
                )
                for i, seen in zip(todo, read, strict=True):
                    found = _features(seen, cfg, way, task.slide)
                    _save(files[i], found)
                    progress.update(len(found))
        finally:
            reader.close()
    order = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    return Done(task, points.take(order), tuple(files))


def _open(path: Path, given: float | None) -> "Slide":
    """The slide; what it states itself goes before `given`, which is for those that do not."""
    from lemon_muse.data.slides import MPP_RANGE, MppError, open_slide, read_facts

    stated = read_facts(path).mpp
    usable = stated is not None and MPP_RANGE[0] <= stated <= MPP_RANGE[1]
    try:
        return open_slide(path, mpp=None if usable else given)
    except MppError:
        what = "no resolution" if stated is None else f"{stated:g} µm per pixel, which cannot be"
        raise UserError(f"{path} states {what}; give slide_mpp=, its µm per pixel.") from None


def cut_pieces(xy: np.ndarray, slide: "Slide", look: "Look") -> list[np.ndarray]:
    """Rows of the nuclei that are read together, int64 arrays; each row once.

    Args:
        xy: float64 [n, 2], level-0 px.
        look: crops: strips of `STRIP` px; dense: whole squares, which nuclei share.
    """
    if not len(xy):
        return []
    down = look.mpp / slide.mpp  # level-0 px per px of the encoder
    if look.valid is None:
        most = max(1, min(PART, HELD // (3 * look.window**2)))
        strip = np.floor((xy[:, 1] / down - look.window / 2) / STRIP)
        order = np.lexsort((xy[:, 1], xy[:, 0], strip))
        unit = np.arange(len(xy))
    else:
        most = max(1, HELD // (3 * look.window**2))
        column, row = np.floor(xy / (down * look.valid)).T
        order = np.lexsort((column, row))
        new = np.diff(column[order]).astype(bool) | np.diff(row[order]).astype(bool)
        unit = np.concatenate([[0], np.cumsum(new)])
    return np.split(order, np.flatnonzero(np.diff(unit // most)) + 1)


class _Reader:
    """Reads the pixels of pieces; every thread opens the slide for itself."""

    def __init__(self, slide: "Slide", look: "Look") -> None:
        self.slide, self.look = slide, look
        self.own = threading.local()
        self.opened: list[Slide] = []

    def read(self, xy: np.ndarray) -> Any:
        """Crops uint8 [n, S, S, 3], or the windows (`eval.dense.Windows`) of the nuclei."""
        from eval.dense import cut_slide, joined

        if not hasattr(self.own, "slide"):
            self.own.slide = copy.copy(self.slide)
            self.opened.append(self.own.slide)
        slide, look, rows = self.own.slide, self.look, np.arange(len(xy))
        if look.valid is not None:
            cut = cut_slide(slide, xy, rows, window=look.window, valid=look.valid, mpp=look.mpp)
            return joined(list(cut))
        out = np.empty((len(xy), look.window, look.window, 3), np.uint8)
        for found, pixels in slide.bands(xy, look.window, mpp=look.mpp):
            out[found] = pixels
        return out

    def close(self) -> None:
        for slide in self.opened:
            slide.close()


def _features(seen: Any, cfg: "Embed", way: Way, slide: str) -> np.ndarray:
    """float32 [n, dim] of what `_Reader.read` gave, in its order of nuclei."""
    from eval import dense, features

    given: dict[str, Any] = {"device": way.device, "bf16": cfg.bf16}
    if way.look.valid is None:
        batch = min(cfg.batch, dense.per_pass(cfg.batch, way.look.window))
        out = features.encode(way.reader, seen, batch=batch, **given)
    else:
        found = dense.encode(way.reader, seen, batch=cfg.batch, **given)
        out = np.empty_like(found)
        out[seen.rows] = found
    bad = int((~np.isfinite(out)).any(1).sum())
    if bad:
        raise RunError(
            f"{way.card['name']} gives features that are not finite for {bad} of {len(out)} nuclei "
            f"of {slide}; {'try bf16=false.' if cfg.bf16 else 'look at its weights.'}"
        )
    return out


def _is_part(file: Path, count: int, dim: int) -> bool:
    """Whether a part is there; one that a broken disk cut short is made again."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        return bool(found.shape == (count, dim) and found.dtype == np.float32)
    except (OSError, ValueError, EOFError):
        return False


def _save(file: Path, found: np.ndarray) -> None:
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(found, np.float32))
    write_atomic(file, stream.getvalue())
