"""Three stores of the same nuclei compared: raw blocks, JPEG sheets, ROIs that are read as crops.

Real ROIs of BRCA-M2C (`prep rois`, 912 px at 0.25 µm/px, images of 0.5 upsampled) and 64 px crops
of all their nuclei. Writing is `ShardWriter` alone, pixels in memory; reading is `CropBatches` in
one thread, batches of 1024, files in the page cache; both in process CPU time, candidates taking
turns. Mixing is what `Order` says for 200 slides; nothing is read for it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lemon_muse.data import geometry
from lemon_muse.data.codec import encode_image
from lemon_muse.data.order import Order
from lemon_muse.data.reader import CropBatches, open_reader
from lemon_muse.data.shards import ROI_COLUMNS, ROI_FACTS, Index, open_index
from lemon_muse.data.slides import open_slide
from lemon_muse.data.writer import ShardWriter
from tests.performance.crops import REAL

SIZE, MPP, MARGIN = 64, 0.25, 32
BLOCK = 256
ROUNDS = 3
RAW = "raw blocks"
SHEETS = {"JPEG sheets q95": 95, "JPEG sheets q90": 90}
ROIS = {"ROIs, JPEG q90": "jpeg", "ROIs, WebP q90": "webp"}
SLIDES, BATCH, GROUP = 200, 4096, 64  # of the mixing; GROUP is that of `prep crops`
Roi = tuple[np.ndarray, dict[str, np.ndarray], dict[str, Any], int]  # as `write_roi` takes them


def run() -> list[dict]:
    torch.set_num_threads(1)
    rows = _mixing()
    if not REAL.is_dir():
        print(f"no {REAL}: writing and reading are left out")
        return rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rois = _real_rois(folder / "made")
        crops, columns = _crops(rois)
        writers: dict[str, Callable[[Path], None]] = {
            RAW: partial(_write_blocks, crops, columns, "raw", 95)
        }
        for what, quality in SHEETS.items():
            writers[what] = partial(_write_blocks, crops, columns, "jpeg", quality)
        for what, encoding in ROIS.items():
            writers[what] = partial(_write_rois, rois, encoding)
        places = {what: folder / f"set{i}" for i, what in enumerate(writers)}
        times: dict[str, list[float]] = {what: [] for what in writers}
        for _ in range(ROUNDS):
            for what, write in writers.items():
                began = time.process_time()
                write(places[what])
                times[what].append((time.process_time() - began) / len(crops))
        rates = {what: 1 / statistics.median(t) for what, t in times.items()}
        density = f"{len(crops) / len(rois):.0f} nuclei a ROI"
        for what, rate in rates.items():
            rows.append(_row(f"write: {what}", rate, rates[RAW], "crops/s/core", density))
        rows += _reading(places, density)
    return rows


def _reading(places: dict[str, Path], density: str) -> list[dict]:
    """Bytes of a nucleus and crops per second of each store, ROIs with both edges."""
    indices: dict[str, Index] = {}
    for what, place in places.items():
        index = open_index(place)
        if index.kind == "crops":
            indices[what] = index
        else:
            for edge in ("reflect", "drop"):
                indices[f"{what}, edge={edge}"] = index.as_crops(SIZE, edge=edge)
    times: dict[str, list[float]] = {what: [] for what in indices}
    for _ in range(ROUNDS):
        for what, index in indices.items():
            began = time.process_time()
            times[what].append(_read(index) / (time.process_time() - began))
    rates = {what: statistics.median(t) for what, t in times.items()}
    sizes = {w: sum(s["bytes"] for s in i.header["shards"]) / i.count for w, i in indices.items()}
    rows = []
    for what in indices:
        rows.append(_row(f"read: {what}", rates[what], rates[RAW], "crops/s/core", density))
        rows.append(_row(f"disk: {what}", sizes[what], sizes[RAW], "bytes/nucleus", density))
    return rows


def _read(index: Index) -> int:
    """Crops of two passes: the checksum of a block is taken once a run."""
    batches = CropBatches(index, seed=0, batch=1024, window=16, rank=0, world=1, workers=0)
    steps = 2 * batches.order.steps_a_pass
    return sum(len(batches.batch_at(step)["pixels"]) for step in range(steps))


def _real_rois(folder: Path) -> list[Roi]:
    """ROIs as `prep rois` makes them, with the pixels before they were encoded."""
    from data_prep import rois as job
    from lemon_muse.data.layouts import read_layout

    index = open_index(
        job.run(
            job.Rois(
                data=REAL,
                out=folder,
                layout="brcam2c",
                side=228,
                mpp=MPP,
                split="all",
                workers=0,
                quality_check=False,
                min_nuclei=1,
                min_tissue=0,
                margin=MARGIN,
            )
        )
    )
    files = {Path(p).stem: Path(p) for p in read_layout(REAL, "brcam2c")[0].image}
    reader, found = open_reader(index), []
    for block, row in enumerate(index.blocks):
        columns = reader.columns(block)
        facts = {name: columns[name][0] for name in ROI_FACTS}
        left, top, side = (float(facts[k]) for k in ("left", "top", "side"))
        with open_slide(files[str(facts["slide"])], mpp=float(facts["source_mpp"])) as slide:
            pixels = slide.region(left, top, side, side, mpp=MPP)
        nuclei = {name: columns[name] for name in ROI_COLUMNS}
        found.append((pixels, nuclei, facts, int(row["inner"])))
    return found


def _crops(rois: list[Roi]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The crops of all nuclei, mixed, and their columns."""
    parts, tables = [], []
    for pixels, nuclei, facts, _ in rois:
        xy = np.stack([nuclei["x"], nuclei["y"]], 1)
        parts.append(geometry.crop(pixels, xy, size=SIZE)[0])
        repeated = {k: np.repeat(facts[k], len(xy)) for k in ("slide", "patient", "source_mpp")}
        tables.append({**nuclei, **repeated, "mpp": np.full(len(xy), MPP)})
    order = np.random.default_rng(0).permutation(sum(map(len, parts)))
    columns = {k: np.concatenate([t[k] for t in tables])[order] for k in tables[0]}
    return np.concatenate(parts)[order], columns


def _write_blocks(
    crops: np.ndarray, columns: dict[str, np.ndarray], encoding: str, quality: int, folder: Path
) -> None:
    with ShardWriter(folder, size=SIZE, mpp=MPP, encoding=encoding, quality=quality) as writer:
        for start in range(0, len(crops), BLOCK):
            here = slice(start, start + BLOCK)
            writer.write(crops[here], {k: v[here] for k, v in columns.items()})


def _write_rois(rois: list[Roi], encoding: str, folder: Path) -> None:
    with ShardWriter(
        folder,
        kind="rois",
        size=len(rois[0][0]),
        mpp=MPP,
        encoding=encoding,
        quality=90,
        extra={"margin": MARGIN},
    ) as writer:
        for pixels, nuclei, facts, inner in rois:
            for moments in (writer.moments, writer.crop_moments):
                moments.add(pixels[::4, ::4])
            writer.write_roi(encode_image(pixels, encoding, 90), nuclei, facts, inner=inner)


def _mixing() -> list[dict]:
    """Slides of a batch of 4096 as the window grows, for blocks of 256 and for ROIs."""
    rng = np.random.default_rng(0)
    # ROIs: 250 of each slide, about 218 nuclei each, as in BRCA-M2C; a slide each.
    counts = rng.negative_binomial(4, 4 / (4 + 218), SLIDES * 250) + 1
    of_roi = np.repeat(np.arange(SLIDES), 250)[:, None]
    # Blocks: each a draw from the slides of its group.
    groups = np.array_split(np.arange(SLIDES), -(-SLIDES // GROUP))
    each = int(counts.sum()) // BLOCK // len(groups)
    of_block = np.concatenate([rng.choice(slides, (each, BLOCK)) for slides in groups])
    rows = []
    for store, sizes, slide in (
        ("blocks of 256", np.full(len(of_block), BLOCK), of_block),
        ("ROIs of 218 nuclei", counts, of_roi),
    ):
        for window in (16, 64, 256):
            order = Order(sizes, 0, BATCH, window)
            seen, even = [], []
            for step in np.linspace(0, order.steps_a_pass - 1, 40).astype(int).tolist():
                block, row = order.batch_at(step)
                share = np.bincount(slide[block, row % slide.shape[1]], minlength=SLIDES) / BATCH
                seen.append(int((share > 0).sum()))
                even.append(1 / (share**2).sum())
            what = f"mixing: {store}, window {window}"
            for name, values in (("seen", seen), ("as if equally often", even)):
                found = float(np.mean(values))
                row = _row(f"{what}: {name}", found, SLIDES, "slides/batch", "generated")
                rows.append({**row, "peer": f"all {SLIDES} slides"})
    return rows


def _row(what: str, ours: float, peer: float, unit: str, source: str) -> dict:
    about = {"name": "store", "peer": RAW, "cores": 1, "device": "cpu", "data": source}
    return {**about, "what": what, "ours": ours, "unit": unit, "ratio": ours / peer}
