"""Cut regions of interest (ROIs) with their nuclei from slides into mixed shards."""

import io
import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from data_prep.assembly import Job, assemble
from data_prep.claims import own_name
from data_prep.crops import slide_rng
from data_prep.nuclei_table import NucleiTable, read_table
from data_prep.roi_part import RoiPart
from data_prep.sources import Source, Where, open_sources
from lemon_muse.config import Config
from lemon_muse.data import geometry
from lemon_muse.data.codec import encode_image
from lemon_muse.data.files import write_atomic
from lemon_muse.data.moments import Moments
from lemon_muse.data.shards import open_index
from lemon_muse.data.writer import ShardWriter, check_encoding
from lemon_muse.errors import UserError

STRIDE = 4  # of the pixels that mean and std are taken from, in both directions
SAMPLED = 32  # nuclei of a ROI whose windows give the mean and std of crops
STAINED = 50_000  # pixels of those windows that the stain of a slide is measured on


class RoiSettings(Config):
    """What is cut, and how it is stored."""

    side: float = Field(512.0, gt=0, description="side of a ROI, µm")
    mpp: float = Field(0.25, gt=0.05, lt=10, description="µm per pixel of the ROIs")
    sampling: Literal["grid", "dense"] = Field(
        "grid", description="a grid over the tissue, or the places with most nuclei"
    )
    per_slide: int | None = Field(
        None, gt=0, description="ROIs of a slide: at random (grid) or the densest; none = all"
    )
    min_nuclei: int = Field(16, ge=0, description="nuclei that a ROI must hold")
    min_tissue: float = Field(0.1, ge=0, le=1, description="share of a ROI that must be tissue")
    quality_check: bool = Field(True, description="leave out ROIs that are blurred or inked")
    encoding: Literal["jpeg", "webp"] = Field("jpeg", description="JPEG 4:4:4 or WebP")
    quality: int = Field(90, ge=1, le=100, description="of the JPEG or WebP")
    margin: int = Field(
        32,
        ge=0,
        description="nuclei nearer to the border are no crops for LEMON, px; half a stored crop",
    )
    shard_mb: int = Field(256, gt=0, description="size at which a shard is closed, MiB")
    group: int = Field(64, gt=0, description="slides that are mixed together, at most")
    types: bool = Field(True, description="write the nucleus types where the data has them")

    @property
    def pixels(self) -> int:
        """Side of a ROI in px."""
        return round(self.side / self.mpp)


class Rois(RoiSettings, Where):
    """ROI shards from slides and their nuclei, or from a folder of images with nuclei."""


def run(cfg: Rois) -> Path:
    """Write the shards and return their folder.

    Raises:
        UserError: the source or the settings are wrong, no ROI is left, `out` holds another set.
        RunError: the disk is full.
    """
    check_encoding("rois", cfg.encoding, cfg.pixels)
    if cfg.pixels <= 2 * cfg.margin:
        raise UserError(f"side={cfg.side:g} µm is {cfg.pixels} px, not more than twice the margin.")
    sources, layout = open_sources(
        cfg.data, layout=cfg.layout, split=cfg.split, tables=cfg.out / "work" / "tables"
    )
    free = {"data", "out", "workers", "layout", "group"}
    job = Job(
        out=cfg.out,
        settings={**cfg.model_dump(mode="json", exclude=free), "layout": layout},
        cut=partial(cut, cfg),
        merge=partial(merge, cfg),
        bytes_each=0,
        group=cfg.group,
        scratch=0,
        seed=cfg.seed,
        workers=cfg.workers,
    )
    try:
        done = assemble(job, sources)
    except UserError as error:
        why = _rejected(cfg.out)
        if "would be empty" in str(error) and why:
            raise UserError(f"no ROI is left for {cfg.out}: {_said(why)} were left out.") from None
        raise
    if not done:
        print(f"{cfg.out} is finished already")
        return cfg.out
    _tell(cfg.out)
    return cfg.out


@dataclass
class _Cut:
    """What a slide gives: pictures in a file, facts and nuclei as columns."""

    payloads: list[int] = field(default_factory=list)  # bytes of each
    facts: list[tuple[float, float, float]] = field(default_factory=list)  # left, top, tissue
    counts: list[tuple[int, int]] = field(default_factory=list)  # nuclei, of those inner
    rows: list[np.ndarray] = field(default_factory=list)
    xy: list[np.ndarray] = field(default_factory=list)
    whole: Moments = field(default_factory=Moments)
    crops: Moments = field(default_factory=Moments)
    looked: list[np.ndarray] = field(default_factory=list)  # pixels for the stain, uint8 [n, 3]


def cut(cfg: Rois, source: Source, part: Path) -> None:
    """Make the part of a slide: `<part>.rois`, its pictures one after the other, `<part>.npz`."""
    from data_prep import roi_places, roi_quality
    from lemon_muse.data.slides import open_slide

    table = read_table(source.table)
    rng = slide_rng(cfg.seed, source.slide)
    xy = np.stack([table.x, table.y], 1).astype(np.float64)
    path = own_name(part, "rois")
    made = _Cut()
    with open_slide(source.path, mpp=source.mpp) as slide:
        side = slide.extent(cfg.pixels, mpp=cfg.mpp)
        if side > min(slide.width, slide.height):  # a fact about this slide, no reason to stop
            found, rejected = None, {"a slide smaller than a ROI": 1}
        else:
            found = roi_places.find(
                slide,
                xy,
                side=side,
                sampling=cfg.sampling,
                min_nuclei=cfg.min_nuclei,
                min_tissue=cfg.min_tissue,
                most=cfg.per_slide,
                rng=rng,
            )
            rejected = dict(found.rejected)
        places = (
            zip(found.corners.tolist(), found.nuclei, found.tissue.tolist(), strict=True)
            if found
            else ()
        )
        try:
            with path.open("wb") as file:
                for (left, top), rows, tissue in places:
                    image = slide.region(left, top, side, side, mpp=cfg.mpp)
                    reason = roi_quality.judge(image, cfg.mpp) if cfg.quality_check else ""
                    if reason:
                        rejected[reason] = rejected.get(reason, 0) + 1
                        continue
                    _add(cfg, made, image, (left, top, tissue), rows, xy[rows], side, rng)
                    file.write(encode_image(image, cfg.encoding, cfg.quality))
                    made.payloads.append(file.tell() - sum(made.payloads))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    path.replace(f"{part}.rois")
    write_atomic(part.with_name("part.npz"), _packed(cfg, source, table, made, side, rejected))


def _add(
    cfg: Rois,
    made: _Cut,
    image: np.ndarray,
    facts: tuple[float, float, float],
    rows: np.ndarray,
    xy: np.ndarray,
    side: float,
    rng: np.random.Generator,
) -> None:
    """Note a ROI: its nuclei in px of the picture, those with a whole window first."""
    points = (xy - facts[:2]) * (cfg.pixels / side)
    low = np.floor(points - cfg.margin + 0.5)  # as `geometry.crop` places a window
    inner = ((low >= 0) & (low + 2 * cfg.margin <= cfg.pixels)).all(1)
    order = np.argsort(~inner, kind="stable")
    made.facts.append(facts)
    made.counts.append((len(rows), int(inner.sum())))
    made.rows.append(rows[order])
    made.xy.append(points[order])
    made.whole.add(image[::STRIDE, ::STRIDE])
    few = points[rng.permutation(np.flatnonzero(inner))[:SAMPLED]]
    if len(few) and cfg.margin:
        windows = geometry.crop(image, few, size=2 * cfg.margin)[0]
        made.crops.add(windows)
        made.looked.append(windows[:, ::STRIDE, ::STRIDE].reshape(-1, 3))


def _packed(
    cfg: Rois,
    source: Source,
    table: NucleiTable,
    made: _Cut,
    side: float,
    rejected: dict[str, int],
) -> bytes:
    """The bytes of `<part>.npz`."""
    from lemon_muse.data import stain

    looked = np.concatenate([np.zeros((0, 3), np.uint8), *made.looked])
    looked = looked[:: -(-len(looked) // STAINED) or 1]
    rows = np.concatenate([np.zeros(0, np.int64), *made.rows])
    xy = np.concatenate([np.zeros((0, 2)), *made.xy])
    about = {
        "patient": source.patient,
        "source_mpp": source.mpp,
        "side": side,
        "rejected": rejected,
        "whole": made.whole.as_json(),
        "crops": made.crops.as_json(),
        "stain": stain.describe(looked) if len(looked) else None,
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        key=source.key,
        about=json.dumps(about),
        lengths=np.array(made.payloads, np.int64),
        facts=np.array(made.facts, np.float64).reshape(-1, 3),
        counts=np.array(made.counts, np.int64).reshape(-1, 2),
        id=table.id[rows],
        x=xy[:, 0],
        y=xy[:, 1],
        type=table.type[rows] if cfg.types else np.full(len(rows), ""),
        score=table.score[rows],
    )
    return buffer.getvalue()


def merge(cfg: Rois, group: int, slides: list[str]) -> None:
    """Write the ROIs of a group's parts in random order into its shards."""
    parts = [RoiPart(cfg.out, cfg.pixels, slide) for slide in slides]
    writer = ShardWriter(
        cfg.out,
        kind="rois",
        size=cfg.pixels,
        mpp=cfg.mpp,
        encoding=cfg.encoding,
        quality=cfg.quality,
        shard_bytes=cfg.shard_mb * 2**20,
        group=group,
        whole=False,
        extra={"margin": cfg.margin},
    )
    which = [(part, number) for part in parts for number in range(len(part.counts))]
    rng = np.random.default_rng([cfg.seed, group])
    with writer:
        for i in rng.permutation(len(which)).tolist():
            part, number = which[i]
            payload, columns, facts = part.roi(number)
            writer.write_roi(payload, columns, facts, inner=int(part.counts[number, 1]))
        for part in parts:
            entry = writer.add_slide(part.slide, part.about["patient"], part.about["source_mpp"], 0)
            entry |= {"rejected": part.about["rejected"], "stain": part.about.get("stain")}
            for moments, name in ((writer.moments, "whole"), (writer.crop_moments, "crops")):
                moments.sums += part.about[name]["sums"]
                moments.count += part.about[name]["count"]


def _rejected(out: Path) -> dict[str, int]:
    """How many ROIs were left out, by reason, in all groups."""
    found: dict[str, int] = {}
    for path in sorted((out / "groups").glob("*.json")):
        for slide in json.loads(path.read_text(encoding="utf-8"))["slides"].values():
            for reason, count in slide.get("rejected", {}).items():
                found[reason] = found.get(reason, 0) + count
    return found


def _said(rejected: dict[str, int]) -> str:
    return ", ".join(f"{n} for {reason}" for reason, n in rejected.items() if n) or "none"


def _tell(out: Path) -> None:
    index = open_index(out)
    size = sum(s["bytes"] for s in index.header["shards"])
    slides = index.header["slides"]
    empty = sum(not about.get("rois") for about in slides.values())
    print(
        f"{out}: {len(index.blocks)} ROIs of {index.size} px at {index.mpp:g} µm/px with "
        f"{index.count} nuclei from {len(slides) - empty} slides, {size / 2**20:.0f} MiB; left "
        f"out: {_said(_rejected(out))}" + (f"; {empty} slides gave no ROI" if empty else "")
    )
