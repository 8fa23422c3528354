"""Features of the nuclei of one slide, in parts that are on disk as soon as they are made.

A part has some thousand crops, or about a hundred windows of a dense encoder, in rows across the
slide, so that neighbouring parts share few tiles. Batches do not cross parts; whatever was done
before a kill, a part has the same bytes.
"""

import io
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.embed import reading
from launch.embed.slides import Points, Task, find_points, key_of
from lemon_muse import __version__
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import RunError, UserError

if TYPE_CHECKING:
    from eval.samplers import Look
    from launch.embed import Embed
    from lemon_muse.data.slides import Slide

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
    key = key_of(card, __version__, reading.PART, reading.HELD, reading.STRIP, reading.ORDER)
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

    with _open(task.path, cfg.slide_mpp) as slide:
        folder.mkdir(parents=True, exist_ok=True)
        points = find_points(task, cfg, slide, folder / "nuclei.npz")
        pieces = reading.cut_pieces(points.xy, slide, way.look)
        files = [folder / f"{number:06d}.npy" for number in range(len(pieces))]
        todo = [i for i, file in enumerate(files) if not _is_part(file, len(pieces[i]), way.dim)]
        total = sum(len(pieces[i]) for i in todo)
        with (
            closing(reading.Reader(slide, way.look, workers=cfg.workers)) as reader,
            closing(reader.pieces(points.xy, [pieces[i] for i in todo])) as read,
            Progress(total, what=task.slide, unit="nuclei") as progress,
        ):
            for i, seen in zip(todo, read, strict=True):
                found = _features(seen, cfg, way, task.slide)
                reader.done(seen)
                _save(files[i], found)
                progress.update(len(found))
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


def _features(seen: Any, cfg: "Embed", way: Way, slide: str) -> np.ndarray:
    """float32 [n, dim] of what `Reader.pieces` gave, in its order of nuclei."""
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
