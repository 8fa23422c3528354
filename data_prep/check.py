"""Verify a set of shards, byte by byte, describe it, and draw what it holds."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data_prep import pictures
from data_prep.check_samples import compare_tars, wrong_block, wrong_roi
from lemon_muse.config import Config
from lemon_muse.data.ahead import map_ahead
from lemon_muse.data.files import write_atomic
from lemon_muse.data.moments import Moments
from lemon_muse.data.order import Order
from lemon_muse.data.reader import BlockReader, RoiCropReader, open_reader
from lemon_muse.data.shards import Index, open_index
from lemon_muse.errors import RunError, UserError

STRIDE = 4  # of the pixels of ROIs that count for mean and std


class Check(Config):
    """Verify crop or ROI shards; draw contact sheet, overlays and histograms."""

    data: Path = Field(description="folder of shards")
    out: Path | None = Field(None, description="where check.json and the pictures go; data/check")
    batch: int = Field(4096, gt=1, description="batch size for which the mixing is measured")
    window: int = Field(64, gt=0, description="blocks or ROIs that training shuffles together")
    cells: int = Field(160, gt=0, description="nuclei on the contact sheet")
    overlays: int = Field(6, ge=0, description="ROIs that are drawn with their nuclei")
    seed: int = Field(0, ge=0, description="of the choice of nuclei")
    workers: int = Field(2, ge=0, description="threads that read")


@dataclass
class _Seen:
    """What the samples hold, one after the other."""

    keys: list[np.ndarray] = field(default_factory=list)  # uint64 of slide and id
    slides: list[np.ndarray] = field(default_factory=list)  # int32 codes, one a nucleus
    names: dict[str, int] = field(default_factory=dict)
    patients: Counter[str] = field(default_factory=Counter)
    brightness: list[float] = field(default_factory=list)
    moments: Moments = field(default_factory=Moments)
    problems: list[str] = field(default_factory=list)

    def code(self, names: np.ndarray) -> np.ndarray:
        found, where = np.unique(names, return_inverse=True)
        codes = [self.names.setdefault(name, len(self.names)) for name in found.tolist()]
        return np.array(codes, np.int32)[where]


def run(cfg: Check) -> dict[str, Any]:
    """Check everything; returns what `check.json` holds.

    Raises:
        UserError: at least one thing is damaged; the message names the first, check.json all.
    """
    index = open_index(cfg.data)
    out = cfg.out or cfg.data / "check"
    out.mkdir(parents=True, exist_ok=True)
    seen = _read_all(index, cfg.workers)
    problems = compare_tars(index) + seen.problems + _repeated(index, seen)
    if not problems:  # a damaged sample is missing from the counts anyway
        problems += _wrong_counts(index, seen)
    result = _describe(index, seen, cfg) | {"problems": problems}
    write_atomic(out / "check.json", json.dumps(result, indent=1).encode())
    if problems:
        raise UserError(
            f"{cfg.data} has {len(problems)} problem(s), all in {out / 'check.json'}; "
            f"the first: {problems[0]}"
        )
    _draw(index, seen, cfg, out)
    mixing = result["mixing"]
    what = f"{len(index.blocks)} {'blocks' if index.kind == 'crops' else 'ROIs'}"
    print(
        f"{cfg.data}: {index.count} nuclei of {result['slides']} slides, "
        f"{len(result['patients'])} patients, {what}, all bytes as written; a batch of "
        f"{mixing['batch']} nuclei holds {mixing['slides_in_a_batch']:.0f} slides. See the "
        f"pictures in {out}"
    )
    return result


def _read_all(index: Index, workers: int) -> _Seen:
    from tqdm import tqdm

    seen, reader = _Seen(), open_reader(index)

    def read(block: int) -> tuple[np.ndarray, dict[str, np.ndarray]] | str:
        try:
            return reader.pixels(block), reader.columns(block)
        except (RunError, OSError, ValueError) as error:
            return str(error)

    numbers = range(len(index.blocks))
    bar = tqdm(total=index.count, unit=" nuclei", unit_scale=True, desc="check", disable=None)
    with bar:
        for block, got in zip(numbers, map_ahead(read, numbers, workers=workers), strict=True):
            bar.update(int(index.blocks[block]["count"]))
            if isinstance(got, str):
                seen.problems.append(got)
                continue
            pixels, columns = got
            if index.kind == "crops":
                wrong = wrong_block(columns, len(pixels))
            else:
                wrong = wrong_roi(index, block, pixels, columns)
            seen.problems += [f"sample {block}: {problem}" for problem in wrong]
            if not wrong:
                _note(seen, index, pixels, columns)
            reader.recycle(pixels)
    return seen


def _note(seen: _Seen, index: Index, pixels: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    count = len(columns["id"])
    names = np.broadcast_to(columns["slide"], count)
    patients = np.broadcast_to(columns["patient"], count)
    codes = seen.code(names)
    here, row = np.unique(names, return_inverse=True)
    salts = np.array([_salt(name) for name in here.tolist()], np.uint64)
    ids = columns["id"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    seen.keys.append(ids ^ salts[row])
    seen.slides.append(codes)
    for patient, number in zip(*np.unique(patients, return_counts=True), strict=True):
        if patient:
            seen.patients[str(patient)] += int(number)
    looked = pixels if index.kind == "crops" else pixels[::STRIDE, ::STRIDE]
    before, area = seen.moments.sums[0].sum(), looked.size
    seen.moments.add(looked)
    seen.brightness.append(float((seen.moments.sums[0].sum() - before) / max(1, area)))


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _repeated(index: Index, seen: _Seen) -> list[str]:
    """Nuclei that stand in the set twice."""
    if not seen.keys:
        return []
    keys = np.concatenate(seen.keys)
    order = np.argsort(keys, kind="stable")
    codes = np.concatenate(seen.slides)
    # Of different slides, equal keys are chance; within a slide a key is its id, turned over.
    same = (np.diff(keys[order]) == 0) & (np.diff(codes[order]) == 0)
    twice = np.flatnonzero(same)
    if not len(twice):
        return []
    first = list(seen.names)[codes[order[twice[0]]]]
    return [f"{len(twice)} nuclei stand in the set twice, the first of slide {first}"]


def _wrong_counts(index: Index, seen: _Seen) -> list[str]:
    found = np.bincount(
        np.concatenate([np.zeros(0, np.int32), *seen.slides]), minlength=len(seen.names)
    )
    counts = dict(zip(seen.names, found.tolist(), strict=True))
    said = {k: v["count"] for k, v in index.header["slides"].items()}
    wrong = [s for s in said.keys() | counts.keys() if said.get(s, 0) != counts.get(s, 0)]
    return [
        f"slide {s}: index.json says {said.get(s, 0)} nuclei, the samples hold {counts.get(s, 0)}"
        for s in sorted(wrong)
    ]


def _describe(index: Index, seen: _Seen, cfg: Check) -> dict[str, Any]:
    """What check.json says of the set."""
    slides = index.header["slides"]
    mean = seen.moments.sums[0] / max(seen.moments.count, 1)
    square = seen.moments.sums[1] / max(seen.moments.count, 1)
    about = {
        "data": str(cfg.data),
        "kind": index.kind,
        "nuclei": index.count,
        "blocks": len(index.blocks),
        "slides": len([s for s in slides.values() if s["count"]]),
        "per_slide": {name: slide["count"] for name, slide in sorted(slides.items())},
        "patients": dict(sorted(seen.patients.items())),
        "source_mpp": dict(Counter(f"{slide['source_mpp']:.4g}" for slide in slides.values())),
        "mean": mean.round(6).tolist(),
        "std": np.sqrt(np.maximum(square - mean**2, 0)).round(6).tolist(),
        "mixing": None if seen.problems else _mixing(index, seen, cfg),
    }
    if index.kind == "rois":
        density = _density(index)
        about["density_per_mm2"] = {
            f"p{q}": round(float(np.percentile(density, q)), 1) for q in (5, 25, 50, 75, 95)
        }
    return about


def _density(index: Index) -> np.ndarray:
    """Nuclei per mm² of every ROI."""
    return index.blocks["count"] / (index.size * index.mpp / 1000) ** 2


def _mixing(index: Index, seen: _Seen, cfg: Check) -> dict[str, Any]:
    """How many slides the first batches of a training run would see."""
    batch = min(cfg.batch, index.count)
    codes = np.concatenate(seen.slides)
    order = Order(index.blocks["count"], cfg.seed, batch, cfg.window)
    numbers, effective = [], []
    for step in range(min(8, order.steps_a_pass)):
        block, row = order.batch_at(step)
        counts = np.bincount(codes[index.starts[block] + row], minlength=len(seen.names))
        numbers.append(int((counts > 0).sum()))
        effective.append(float(1 / np.square(counts / counts.sum()).sum()))
    return {
        "batch": batch,
        "window": cfg.window,
        "slides_in_a_batch": float(np.mean(numbers)),
        "effective_slides": float(np.mean(effective)),
    }


def _draw(index: Index, seen: _Seen, cfg: Check, out: Path) -> None:
    """The pictures: contact sheet, histograms, ROIs with their nuclei."""
    rng = np.random.default_rng(cfg.seed)
    slides = index.header["slides"].values()
    panels = [
        ("nuclei per slide", np.array([s["count"] for s in slides]), ""),
        ("source resolution", np.array([s["source_mpp"] for s in slides]), "µm/px"),
        ("brightness of a sample", np.array(seen.brightness), "0 to 1"),
    ]
    crops = index
    if index.kind == "rois":
        panels.insert(1, ("nuclei per ROI", index.blocks["count"].astype(float), ""))
        panels.insert(2, ("density", _density(index), "nuclei/mm²"))
        _overlays(index, cfg, out, rng)
        crops = index.as_crops(max(2 * int(index.header["margin"]), 8), edge="reflect")
    pictures.histograms(out / "histograms.png", panels)
    reader = BlockReader(crops) if index.kind == "crops" else RoiCropReader(crops)
    chosen = np.sort(rng.choice(crops.count, min(cfg.cells, crops.count), replace=False))
    blocks, rows = crops.locate(chosen)
    cells = [reader.pixels(int(b))[rows[blocks == b]] for b in np.unique(blocks)]
    pictures.contact_sheet(rng.permutation(np.concatenate(cells)), out / "contact_sheet.png")


def _overlays(index: Index, cfg: Check, out: Path, rng: np.random.Generator) -> None:
    for old in out.glob("roi-*.png"):
        old.unlink()
    reader = open_reader(index)
    count = min(cfg.overlays, len(index.blocks))
    for number, block in enumerate(rng.choice(len(index.blocks), count, replace=False).tolist()):
        columns = reader.columns(block)
        pictures.roi_overlay(
            reader.pixels(block),
            np.stack([columns["x"], columns["y"]], 1),
            out / f"roi-{number:02d}.png",
            types=columns["type"],
            mpp=index.mpp,
        )
