"""Cut a crop around every nucleus of slides, or of a folder of images, into mixed shards.

The part of a slide is its crops, raw, in a random order. A group's parts are merged bucket by
bucket (`mixing`), so memory holds one bucket, however many nuclei there are.
"""

import hashlib
import io
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_prep.assembly import Job, assemble
from data_prep.claims import own_name
from data_prep.mixing import Part, mixed
from data_prep.nuclei_table import NucleiTable, read_table
from data_prep.sources import Source, Where, open_sources
from lemon_muse.config import Config
from lemon_muse.data.codec import encode
from lemon_muse.data.files import write_atomic
from lemon_muse.data.shards import open_index
from lemon_muse.data.writer import ShardWriter, check_encoding
from lemon_muse.errors import RunError, UserError

log = logging.getLogger(__name__)

BUCKET = 192 * 2**20  # bytes of pixels that a merge holds
STAINED = 256  # crops of a slide from which its stain is measured
STRIDE = 5  # every fifth pixel of those, in both directions


class CropSettings(Config):
    """What is cut, and how it is stored."""

    mpp: float = Field(0.25, gt=0.05, lt=10, description="µm per pixel of the crops")
    size: int = Field(
        64, gt=7, description="side of a stored crop, px: window × 1.42 for any rotation"
    )
    per_slide: int | None = Field(
        None, gt=0, description="nuclei taken of a slide, at random; none = all"
    )
    balance: Literal["none", "type", "cluster"] = Field(
        "none", description="equal shares of a slide's nuclei by type, or by look (k-means)"
    )
    edge: Literal["reflect", "drop"] = Field(
        "reflect",
        description="crops that reach over the image border: mirror the image, or leave out",
    )
    encoding: Literal["raw", "jpeg"] = Field("raw", description="raw pixels or JPEG 4:4:4 sheets")
    quality: int = Field(95, ge=1, le=100, description="JPEG quality")
    block: int = Field(256, gt=0, description="nuclei in a block, the unit that is read at once")
    shard_mb: int = Field(256, gt=0, description="size at which a shard is closed, MiB")
    group: int = Field(64, gt=0, description="slides that are mixed together, at most")
    scratch_gb: float = Field(
        24.0, gt=0, description="raw crops of a group on disk before they are mixed, at most, GiB"
    )
    types: bool = Field(True, description="write the nucleus types where the data has them")


class Crops(CropSettings, Where):
    """Crop shards from slides and their nuclei, or from a folder of images with nuclei."""


def run(cfg: Crops) -> Path:
    """Write the shards and return their folder.

    Raises:
        UserError: the source or the settings are wrong, or `out` holds another set.
        RunError: the disk is full.
    """
    check_encoding("crops", cfg.encoding, cfg.size)
    if cfg.balance != "none" and cfg.per_slide is None:
        raise UserError("balance= needs per_slide=, the number of nuclei of a slide.")
    sources, layout = open_sources(
        cfg.data, layout=cfg.layout, split=cfg.split, tables=cfg.out / "work" / "tables"
    )
    cfg.out.mkdir(parents=True, exist_ok=True)
    free = {"data", "out", "workers", "layout", "group", "scratch_gb"}
    job = Job(
        out=cfg.out,
        settings={**cfg.model_dump(mode="json", exclude=free), "layout": layout},
        cut=partial(cut, cfg),
        merge=partial(merge, cfg),
        bytes_each=cfg.size * cfg.size * 3,
        group=cfg.group,
        scratch=int(cfg.scratch_gb * 2**30),
        seed=cfg.seed,
        workers=cfg.workers,
    )
    _need_room(cfg, sources)
    try:
        done = assemble(job, sources)
    except UserError as error:
        if cfg.edge == "drop" and "would be empty" in str(error):
            raise UserError(
                f"no crop is left for {cfg.out}: every nucleus is nearer to the border of its "
                f"slide than half a crop; use edge=reflect with another out=."
            ) from None
        raise
    if not done:
        print(f"{cfg.out} is finished already")
        return cfg.out
    _tell(cfg.out)
    return cfg.out


def cut(cfg: Crops, source: Source, part: Path) -> None:
    """Make the part of a slide: `<part>.pixels`, its crops in random order, then `<part>.npz`."""
    from lemon_muse.data import stain
    from lemon_muse.data.slides import open_slide

    table = read_table(source.table)
    rng = slide_rng(cfg.seed, source.slide)
    each = cfg.size * cfg.size * 3
    path = own_name(part, "pixels")
    with open_slide(source.path, mpp=source.mpp) as slide:
        xy = np.stack([table.x, table.y], 1).astype(np.float64)
        rows = _chosen(cfg, table, slide, xy, rng)
        place = rng.permutation(len(rows))
        kept = np.zeros(len(rows), bool)
        looked: dict[int, np.ndarray] = {}  # by place: the same whatever the order of the bands
        handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
        try:
            for here, pixels in slide.bands(xy[rows], cfg.size, mpp=cfg.mpp, edge=cfg.edge):
                kept[here] = True
                for position, crop in zip(place[here].tolist(), pixels, strict=True):
                    os.pwrite(handle, crop.data, position * each)
                    if position < STAINED:
                        looked[position] = crop[::STRIDE, ::STRIDE].reshape(-1, 3)
            os.fsync(handle)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
    path.replace(f"{part}.pixels")
    sample = [looked[position] for position in sorted(looked)]
    order = rows[np.argsort(place)]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        key=source.key,
        place=np.sort(place[kept]),
        **{name: getattr(table, name)[order] for name in ("id", "x", "y", "type", "score")},
        about=json.dumps(
            {
                "patient": source.patient,
                "source_mpp": source.mpp,
                "dropped": int((~kept).sum()),
                "stain": stain.describe(np.concatenate(sample)) if sample else None,
            }
        ),
    )
    write_atomic(part.with_name("part.npz"), buffer.getvalue())


def slide_rng(seed: int, slide: str) -> np.random.Generator:
    """The generator of a slide: the same wherever and whenever the slide is worked on."""
    digest = hashlib.blake2b(slide.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])


def _chosen(
    cfg: Crops, table: NucleiTable, slide: Any, xy: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    from data_prep import choose

    clusters = None
    if cfg.balance == "cluster" and cfg.per_slide and cfg.per_slide < len(table):
        clusters = choose.cluster(slide, xy, seed=cfg.seed)
    return choose.choose(
        table.type, count=cfg.per_slide, balance=cfg.balance, rng=rng, clusters=clusters
    )


def merge(cfg: Crops, group: int, slides: list[str]) -> None:
    """Mix the parts of a group into its shards."""
    parts = [Part(cfg, slide) for slide in slides]
    total = sum(len(part.place) for part in parts)
    buckets = max(1, -(-total * cfg.size * cfg.size * 3 // BUCKET))
    writer = ShardWriter(
        cfg.out,
        size=cfg.size,
        mpp=cfg.mpp,
        encoding=cfg.encoding,
        quality=cfg.quality,
        shard_bytes=cfg.shard_mb * 2**20,
        group=group,
        whole=False,
    )
    with writer, ThreadPoolExecutor(max(1, cfg.workers)) as pool:
        for pixels, columns in mixed(cfg, group, parts, buckets):
            _write(cfg, writer, pool, pixels, columns)
            del pixels  # else it would be held while the next bucket is read
        for part in parts:
            entry = writer.add_slide(part.slide, part.about["patient"], part.about["source_mpp"], 0)
            entry |= {"dropped": part.about["dropped"], "stain": part.about["stain"]}


def _write(
    cfg: Crops,
    writer: ShardWriter,
    pool: ThreadPoolExecutor,
    pixels: np.ndarray,
    columns: dict[str, np.ndarray],
) -> None:
    encoded = partial(encode, encoding=cfg.encoding, quality=cfg.quality)
    cuts = range(0, len(pixels), cfg.block)
    blocks = [pixels[start : start + cfg.block] for start in cuts]
    # Raw blocks need no work: a pool would only copy them all before one is written.
    payloads = pool.map(encoded, blocks) if cfg.encoding == "jpeg" else map(encoded, blocks)
    for start, block, payload in zip(cuts, blocks, payloads, strict=True):
        here = slice(start, start + cfg.block)
        writer.write(block, {k: v[here] for k, v in columns.items()}, payload=payload)


def _need_room(cfg: Crops, sources: list[Source]) -> None:
    """Say before the work, not after an hour, that the disk is too small."""
    each = cfg.size * cfg.size * 3
    try:
        index = json.loads((cfg.out / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = {"slides": {}}
    new = [source for source in sources if source.slide not in index["slides"]]
    counts = [min(source.count, cfg.per_slide or source.count) for source in new]
    scratch = min(sum(counts) * each, int(cfg.scratch_gb * 2**30) * max(1, cfg.workers))
    there = sum(_bytes(p) for p in cfg.out.rglob("*")) if not index["slides"] else 0
    ratio = 1.02 if cfg.encoding == "raw" else 0.35
    needed = sum(counts) * each * ratio + scratch - there
    free = shutil.disk_usage(cfg.out).free
    if free < needed:
        smaller = ", or use encoding=jpeg" if cfg.encoding == "raw" else ""
        raise RunError(
            f"{cfg.out} needs about {needed / 2**20:.0f} MiB more for {sum(counts)} crops and "
            f"their mixing, but {free / 2**20:.0f} MiB are free; make room{smaller}."
        )


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # another process may be done with it
        return 0


def _tell(out: Path) -> None:
    index = open_index(out)
    size = sum(s["bytes"] for s in index.header["shards"])
    slides = index.header["slides"]
    used = sum(about["count"] > 0 for about in slides.values())
    dropped = sum(about.get("dropped", 0) for about in slides.values())
    at_edge = f"; {dropped} at the border left out" if dropped else ""
    print(
        f"{out}: {index.count} crops of {index.size} px at {index.mpp:g} µm/px from "
        f"{used} slides in {len(index.blocks)} blocks, "
        f"{size / 2**20:.0f} MiB ({size / index.count:.0f} bytes a crop){at_edge}"
    )
