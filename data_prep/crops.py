"""Cut a crop around every nucleus of a folder of images and pack them into mixed shards.

The crops are first laid down at their shuffled place in one scratch file (the operating system
keeps memory flat), then read back in order and packed into blocks: every block is a random draw
from all slides, so a batch of few blocks is mixed as well as a batch of many.
"""

import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from lemon_muse.config import Config
from lemon_muse.data.layouts import read_layout
from lemon_muse.data.shards import open_index
from lemon_muse.data.table import Table
from lemon_muse.data.writer import ShardWriter
from lemon_muse.errors import RunError, UserError

log = logging.getLogger(__name__)


class Crops(Config):
    """Crop shards from a folder of images with nucleus positions."""

    data: Path = Field(
        description="folder of images and nuclei (docs/formats.md lists the layouts)"
    )
    out: Path = Field(description="folder of the shards; a finished one is left alone")
    layout: Literal["auto", "brcam2c", "folder"] = Field(
        "auto", description="how the folder is laid out"
    )
    split: Literal["train", "val", "test", "all"] = Field(
        "train", description="which images are used, where the folder has a split"
    )
    mpp: float = Field(0.25, gt=0.05, lt=10, description="µm per pixel of the crops")
    size: int = Field(
        64, gt=7, description="side of a stored crop, px: window × 1.42 for any rotation"
    )
    edge: Literal["reflect", "drop"] = Field(
        "reflect",
        description="crops that reach over the image border: mirror the image, or leave out",
    )
    encoding: Literal["raw", "jpeg"] = Field("raw", description="raw pixels or JPEG 4:4:4 sheets")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality")
    block: int = Field(256, gt=0, description="nuclei in a block, the unit that is read at once")
    shard_mb: int = Field(256, gt=0, description="size at which a shard is closed, MiB")
    types: bool = Field(True, description="write the nucleus types where the folder has them")
    seed: int = Field(0, ge=0, description="of the mixing")
    workers: int = Field(2, ge=0, description="threads that read images")


def run(cfg: Crops) -> Path:
    """Write the shards and return their folder.

    Raises:
        UserError: the source or the settings are wrong, or `out` holds another set.
        RunError: the disk is full.
    """
    from tqdm import tqdm

    settings = cfg.model_dump(mode="json", exclude={"out", "workers"})
    if _is_done(cfg.out, settings):
        print(f"{cfg.out} is finished already")
        return cfg.out
    table, layout = read_layout(cfg.data, cfg.layout)
    rows = _chosen(table, cfg)
    position = np.random.default_rng(cfg.seed).permutation(len(rows))
    cfg.out.mkdir(parents=True, exist_ok=True)
    _need_room(cfg, len(rows))
    scratch = cfg.out / "scratch.tmp"
    extra = {"source": {**settings, "layout": layout}}
    writer = ShardWriter(
        cfg.out,
        size=cfg.size,
        mpp=cfg.mpp,
        encoding=cfg.encoding,
        quality=cfg.quality,
        shard_bytes=cfg.shard_mb * 2**20,
        extra=extra,
    )
    with writer:
        shape = (len(rows), cfg.size, cfg.size, 3)
        mixed = np.memmap(scratch, np.uint8, "w+", shape=shape)
        source = np.full(len(rows), -1, np.int64)  # row of the table at each shuffled place
        stream = table.stream(cfg.size, cfg.mpp, rows=rows, edge=cfg.edge, workers=cfg.workers)
        with tqdm(total=len(rows), unit="nuclei", desc="cut", disable=None) as bar:
            for taken, pixels in stream:
                mixed[position[taken]] = pixels
                source[position[taken]] = rows[taken]
                bar.update(len(taken))
        kept = np.flatnonzero(source >= 0)
        for start in tqdm(range(0, len(kept), cfg.block), unit="block", desc="pack", disable=None):
            here = kept[start : start + cfg.block]
            writer.write(np.asarray(mixed[here]), _columns(table, source[here], cfg))
        scratch.unlink()
    _tell(cfg.out, len(rows) - len(kept))
    return cfg.out


def _is_done(out: Path, settings: dict[str, Any]) -> bool:
    if not (out / "index.json").is_file():
        return False
    before = dict(open_index(out).header.get("source", {}))
    before.pop("layout", None)
    now = {k: v for k, v in settings.items() if k != "layout"}
    changed = [f"{k}: {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
    if changed:
        raise UserError(
            f"{out} holds shards made with other settings ({'; '.join(changed[:3])}); "
            f"give another out=, or delete that folder."
        )
    return True


def _chosen(table: Table, cfg: Crops) -> np.ndarray:
    """Rows of the table that are used, each nucleus once."""
    rows = np.arange(len(table)) if cfg.split == "all" else table.rows(cfg.split)
    if not len(rows):
        raise UserError(f"{cfg.data} has no nucleus in split={cfg.split}; use split=all.")
    place = np.stack([table.image_code[rows].astype(np.float64), table.x[rows], table.y[rows]], 1)
    _, first = np.unique(place, axis=0, return_index=True)
    if len(first) < len(rows):
        log.warning(
            "%d nuclei stand twice at the same place and are taken once", len(rows) - len(first)
        )
    return rows[np.sort(first)]


def _columns(table: Table, rows: np.ndarray, cfg: Crops) -> dict[str, np.ndarray]:
    names = np.array([Path(p).stem for p in table.image[rows]])
    known = cfg.types and len(table.classes) > 0
    types = np.array([table.classes[i] if known and i >= 0 else "" for i in table.label[rows]])
    return {
        "slide": names,
        "patient": table.patient[rows],
        "id": rows,
        "x": table.x[rows],
        "y": table.y[rows],
        "mpp": np.full(len(rows), cfg.mpp),
        "source_mpp": table.mpp[rows],
        "type": types.astype(str),
        "score": np.ones(len(rows)),
    }


def _need_room(cfg: Crops, count: int) -> None:
    """Say before the work, not after an hour, that the disk is too small."""
    each = cfg.size * cfg.size * 3
    needed = count * each * (2.02 if cfg.encoding == "raw" else 1.5)
    free = shutil.disk_usage(cfg.out).free
    if free < needed:
        smaller = ", or use encoding=jpeg" if cfg.encoding == "raw" else ""
        raise RunError(
            f"{cfg.out} needs about {needed / 2**20:.0f} MiB for {count} crops and their mixing, "
            f"but {free / 2**20:.0f} MiB are free; make room{smaller}."
        )


def _tell(out: Path, dropped: int) -> None:
    index = open_index(out)
    size = sum(s["bytes"] for s in index.header["shards"])
    at_edge = f"; {dropped} at the border left out" if dropped else ""
    print(
        f"{out}: {index.count} crops of {index.size} px at {index.mpp} µm/px from "
        f"{len(index.header['slides'])} images in {len(index.blocks)} blocks, "
        f"{size / 2**20:.0f} MiB ({size / index.count:.0f} bytes a crop){at_edge}"
    )
