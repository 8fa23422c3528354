"""Weights that even out what training sees: over looks, types or slides, without near-duplicates.

Random nuclei are mostly the few kinds that are everywhere. Here nuclei of a set are sorted into
classes and each class is given the same share; `subset.weights=FILE` of a training run draws by it.
"""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_prep import kmeans_tree
from data_prep.pictures import contact_sheet
from lemon_muse.config import Config
from lemon_muse.data.ahead import map_ahead
from lemon_muse.data.compose import sample_sizes, slide_numbers
from lemon_muse.data.files import write_atomic
from lemon_muse.data.reader import BlockReader
from lemon_muse.data.shards import Index, open_index
from lemon_muse.data.weights import Weights, belongs, read_weights, write_weights
from lemon_muse.errors import UserError

SHOWN, ACROSS = 12, 20  # largest and smallest classes on the picture; members of each
NONE = "unknown"  # name of the class of nuclei without a type
FREE = {"data", "out", "workers", "device"}  # settings that change nothing in the file
LATER = {"by", "levels", "rounds", "by_level", "most"}  # … nothing in what is kept until the end


class Balance(Config):
    """Weights for training, in one file: `lemon-muse prep balance data=CROPS out=FILE.npz`."""

    data: Path = Field(description="folder of crop shards")
    out: Path = Field(description="the .npz to write; a .png of the classes goes beside it")
    by: Literal["cluster", "type", "slide"] = Field(
        "cluster", description="what gets equal shares: looks (a tree of k-means), types, slides"
    )
    duplicates: float | None = Field(
        0.995,
        gt=0,
        le=1,
        description="cosine of two looks from which on one of them is left out; none = off",
    )
    encoder: Path | None = Field(
        None, description="encoder folder that gives the looks; none = pixels"
    )
    window: int = Field(40, gt=0, description="side of the middle that pixels are taken of, px")
    dims: int = Field(64, gt=0, description="principal components that make a look")
    levels: tuple[int, ...] = Field(
        (), description="clusters of each level, from the leaves up; none = √n, then tenths"
    )
    rounds: int = Field(
        2, ge=0, description="repetitions of k-means on points drawn evenly from the clusters"
    )
    by_level: bool = Field(
        False, description="equal shares at every level of the tree, not over its leaves"
    )
    most: float = Field(
        10.0, ge=1, description="how often a nucleus comes in a pass, at most, in the mean"
    )
    seed: int = Field(0, ge=0, description="of components, k-means and the picture")
    workers: int = Field(2, ge=0, description="threads that read")
    device: str = Field("auto", description="where the encoder runs: auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class _Classes:
    """A class for every nucleus, int32 [n], -1 where it is left out; and their names."""

    code: np.ndarray
    names: np.ndarray
    share: np.ndarray  # float64 [k], sum 1


def run(cfg: Balance) -> Path:
    """Write the file and return its path.

    Raises:
        UserError: no crop shards, no types to balance, or `out` holds something else.
        RunError: a block is damaged.
    """
    index = open_index(cfg.data, kind="crops")
    settings = cfg.model_dump(mode="json", exclude=FREE)
    if cfg.encoder is not None:
        from lemon_muse.encoder import load

        settings["encoder_hash"] = load(cfg.encoder).content_hash  # the folder may hold another one
    if cfg.out.suffix != ".npz":
        raise UserError(f"out={cfg.out} must end in .npz.")
    if _finished(cfg, index, settings):
        print(f"{cfg.out} is finished already")
        return cfg.out
    work = _work_folder(cfg, index, settings)
    code, vectors, gone = np.zeros(index.count, np.int32), None, 0
    if cfg.by == "cluster" or cfg.duplicates is not None:
        vectors = _looks(cfg, index, work)
    if vectors is not None and cfg.duplicates is not None:
        keep = _distinct(cfg, vectors, work)
        gone = int((~keep).sum())
        code[~keep] = -1
    found = _classes(cfg, index, code, vectors)
    size = np.bincount(found.code[found.code >= 0], minlength=len(found.names))
    times = kmeans_tree.capped(found.share, size, cfg.most)
    about = {"by": cfg.by, "settings": settings, "left_out": gone, "size": size.tolist()}
    _draw(cfg, index, found.code, size)
    write_weights(cfg.out, Weights(found.code, times, found.names, about), index)
    shutil.rmtree(work)
    _tell(cfg, index, size, times, gone)
    return cfg.out


def _finished(cfg: Balance, index: Index, settings: dict[str, Any]) -> bool:
    if not cfg.out.exists():
        return False
    old = read_weights(cfg.out, index).about.get("settings", {})
    changed = [f"{k}: {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]
    if changed:
        raise UserError(
            f"{cfg.out} was made with other settings ({'; '.join(changed[:3])}); give another "
            f"out=, or delete it."
        )
    return True


def _work_folder(cfg: Balance, index: Index, settings: dict[str, Any]) -> Path:
    """The folder of what is kept until the end; that of other settings or data is refused."""
    work = cfg.out.with_suffix(".work")
    kept = {key: value for key, value in settings.items() if key not in LATER}
    now = json.dumps({"of": belongs(index), **kept}, indent=1)
    note = work / "settings.json"
    if note.is_file() and note.read_text(encoding="utf-8") != now:
        raise UserError(
            f"{work} is of a job with other settings or data that was not finished; delete it, or "
            f"give another out=."
        )
    # It is removed in the end, so it must be ours; a file that was being written is.
    ours = note.is_file() or not work.exists()
    if not ours and not (work.is_dir() and all(p.suffix == ".tmp" for p in work.iterdir())):
        raise UserError(f"{work} is needed and holds something else; give another out=.")
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(note, now.encode())
    return work


def _looks(cfg: Balance, index: Index, work: Path) -> np.ndarray:
    from data_prep import looks

    if cfg.encoder is not None:
        raw = looks.encoder_looks(cfg.encoder, index, cfg.device)
    else:
        raw = looks.pixel_looks(min(cfg.window, index.size))
    return looks.look(index, raw, work, dims=cfg.dims, seed=cfg.seed, workers=cfg.workers)


def _distinct(cfg: Balance, vectors: np.ndarray, work: Path) -> np.ndarray:
    from data_prep.duplicates import distinct

    path = work / "keep.npy"
    if not path.is_file():
        assert cfg.duplicates is not None
        keep = distinct(vectors, cosine=cfg.duplicates, seed=cfg.seed)
        write_atomic(path, np.packbits(keep).tobytes())
    return np.unpackbits(np.fromfile(path, np.uint8), count=len(vectors)).astype(bool)


def _classes(cfg: Balance, index: Index, code: np.ndarray, vectors: np.ndarray | None) -> _Classes:
    """Sort the nuclei that are left (code 0) into classes."""
    left = np.flatnonzero(code >= 0)
    code = code.copy()
    if cfg.by == "cluster":
        assert vectors is not None
        levels = cfg.levels or kmeans_tree.default_levels(len(left))
        if levels[0] > len(left) or any(a <= b for a, b in pairwise((*levels, 0))):
            raise UserError(
                f"levels={list(levels)} must fall from level to level, begin with at most "
                f"{len(left)}, the nuclei that are left, and end with 1 or more."
            )
        print(f"{len(left)} nuclei into {' > '.join(map(str, levels))} clusters", flush=True)
        tree = kmeans_tree.grow(vectors[left], levels, rounds=cfg.rounds, seed=cfg.seed)
        code[left] = tree.leaf
        names = np.array([f"leaf {number}" for number in range(tree.leaves)])
        return _Classes(code, names, kmeans_tree.even_shares(tree, by_level=cfg.by_level))
    numbers, names = _types(index, cfg) if cfg.by == "type" else _slides(index, cfg)
    there, place = np.unique(numbers[left], return_inverse=True)
    code[left] = place
    return _Classes(code, names[there], np.full(len(there), 1 / len(there)))


def _types(index: Index, cfg: Balance) -> tuple[np.ndarray, np.ndarray]:
    """Number of the type of every nucleus, int [n], and the names of the types."""
    reader = BlockReader(index)
    blocks = np.flatnonzero(index.blocks["count"]).tolist()
    names: dict[str, int] = {}
    parts = []
    read = partial(_type_column, reader)
    for column in map_ahead(read, blocks, workers=cfg.workers):
        found, where = np.unique(column, return_inverse=True)
        numbers = [names.setdefault(str(n) or NONE, len(names)) for n in found.tolist()]
        parts.append(np.array(numbers, np.int32)[where])
    reader.close()
    if set(names) == {NONE}:
        raise UserError(f"the nuclei of {cfg.data} carry no types to balance; use by=cluster.")
    return np.concatenate(parts), np.array(list(names))


def _type_column(reader: BlockReader, block: int) -> np.ndarray:
    return reader.columns(block, "type")["type"]


def _slides(index: Index, cfg: Balance) -> tuple[np.ndarray, np.ndarray]:
    """Number of the slide of every nucleus, int [n], and the names of the slides."""
    work = cfg.out.with_suffix(".work")
    return slide_numbers(index, sample_sizes(index, "crops"), work), np.array(list(index.slides))


def _draw(cfg: Balance, index: Index, code: np.ndarray, size: np.ndarray) -> None:
    """The picture: random members of the largest classes, then of the smallest, a row each."""
    order = np.argsort(-size, kind="stable")
    shown = np.concatenate([order[:SHOWN], order[max(SHOWN, len(order) - SHOWN) :]])
    rng = np.random.default_rng([cfg.seed, 4])
    sheet = np.full((len(shown), ACROSS, index.size, index.size, 3), 255, np.uint8)
    reader = BlockReader(index)
    for row, number in enumerate(shown.tolist()):
        members = np.flatnonzero(code == number)
        some = np.sort(rng.choice(members, min(ACROSS, len(members)), replace=False))
        blocks, rows = index.locate(some)
        for place, (block, at) in enumerate(zip(blocks.tolist(), rows.tolist(), strict=True)):
            sheet[row, place] = reader.pixels(block)[at]
    reader.close()
    contact_sheet(sheet.reshape(-1, *sheet.shape[2:]), cfg.out.with_suffix(".png"), ACROSS)


def _tell(cfg: Balance, index: Index, size: np.ndarray, times: np.ndarray, gone: int) -> None:
    even = size / size.sum()
    drawn = times * even
    print(
        f"{cfg.out}: {index.count} nuclei, {gone} of them near-duplicates that are left out; "
        f"{len(size)} classes of {size.min()} to {size.max()} nuclei, as even as "
        f"{1 / np.square(even).sum():.0f} equal ones before and {1 / np.square(drawn).sum():.0f} "
        f"after; a nucleus comes {times.min():.2f} to {times.max():.2f} times a pass.\n"
        f"picture: {cfg.out.with_suffix('.png')} (largest classes first, then the smallest)\n"
        f"train with it: subset.weights={cfg.out}"
    )
