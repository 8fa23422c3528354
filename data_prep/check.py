"""Verify a set of crop shards, byte by byte, and draw a contact sheet."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from lemon_muse.config import Config
from lemon_muse.data.files import write_atomic
from lemon_muse.data.order import Order
from lemon_muse.data.reader import BlockReader
from lemon_muse.data.shards import COLUMNS, Index, open_index
from lemon_muse.errors import RunError, UserError


class Check(Config):
    """Verify crop shards and draw a contact sheet."""

    data: Path = Field(description="folder of crop shards")
    out: Path | None = Field(
        None, description="where check.json and contact_sheet.png go; default data/check"
    )
    batch: int = Field(4096, gt=1, description="batch size for which the mixing is measured")
    cells: int = Field(160, gt=0, description="nuclei on the contact sheet")
    seed: int = Field(0, ge=0, description="of the choice of nuclei")


def run(cfg: Check) -> dict[str, Any]:
    """Check everything; returns what `check.json` holds.

    Raises:
        UserError: at least one thing is damaged; the message names the first, check.json all.
    """
    from tqdm import tqdm

    index = open_index(cfg.data)
    out = cfg.out or cfg.data / "check"
    out.mkdir(parents=True, exist_ok=True)
    reader = BlockReader(index)
    problems = _compare_tars(index)
    seen: Counter[tuple[str, int]] = Counter()
    patients: Counter[str] = Counter()
    slides: list[np.ndarray] = []
    sums, pixels = np.zeros((2, 3)), 0
    for block in tqdm(range(len(index.blocks)), unit="block", desc="check", disable=None):
        try:
            crops, columns = reader.pixels(block), reader.columns(block)
        except (RunError, OSError, ValueError) as error:
            problems.append(str(error))
            continue
        problems += [f"block {block}: {p}" for p in _wrong_columns(columns, len(crops))]
        seen.update(zip(columns["slide"].tolist(), columns["id"].tolist(), strict=True))
        patients.update(columns["patient"].tolist())
        slides.append(columns["slide"])
        values = crops.reshape(-1, 3) / 255.0
        sums += (values.sum(0), (values**2).sum(0))
        pixels += len(values)
    twice = [key for key, n in seen.items() if n > 1]
    if twice:
        problems.append(f"{len(twice)} nuclei stand in the set twice, the first is {twice[0]}")
    if not problems:  # a damaged block is missing from the counts anyway
        problems += _wrong_counts(index, seen)
    mean = sums[0] / max(pixels, 1)
    result = {
        "data": str(cfg.data),
        "nuclei": index.count,
        "blocks": len(index.blocks),
        "slides": len(index.header["slides"]),
        "patients": dict(sorted(patients.items())),
        "mean": mean.round(6).tolist(),
        "std": np.sqrt(np.maximum(sums[1] / max(pixels, 1) - mean**2, 0)).round(6).tolist(),
        "mixing": _mixing(index, slides, cfg) if not problems else None,
        "problems": problems,
    }
    write_atomic(out / "check.json", json.dumps(result, indent=1).encode())
    if problems:
        raise UserError(
            f"{cfg.data} has {len(problems)} problem(s), all in {out / 'check.json'}; "
            f"the first: {problems[0]}"
        )
    contact_sheet(index, reader, out / "contact_sheet.png", cells=cfg.cells, seed=cfg.seed)
    print(
        f"{cfg.data}: {index.count} nuclei of {result['slides']} slides, {len(patients)} patients, "
        f"{len(index.blocks)} blocks, all bytes as written; a batch of {result['mixing']['batch']} "
        f"holds {result['mixing']['slides_in_a_batch']:.0f} slides. See {out / 'contact_sheet.png'}"
    )
    return result


def contact_sheet(
    index: Index, reader: BlockReader, path: Path, *, cells: int, seed: int, columns: int = 20
) -> None:
    """A PNG of randomly chosen crops, `columns` a row, with thin white lines between them."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(index.count, min(cells, index.count), replace=False))
    blocks, rows = index.locate(chosen)
    crops = np.concatenate([reader.pixels(int(b))[rows[blocks == b]] for b in np.unique(blocks)])
    crops = rng.permutation(crops)
    side = index.size + 2
    lines = -(-len(crops) // columns)
    sheet = np.full((lines * side, columns * side, 3), 255, np.uint8)
    for i, crop in enumerate(crops):
        y, x = i // columns * side, i % columns * side
        sheet[y : y + index.size, x : x + index.size] = crop
    picture = Image.fromarray(sheet)
    temporary = path.with_suffix(".tmp")
    picture.save(temporary, "PNG")
    temporary.replace(path)


def _compare_tars(index: Index) -> list[str]:
    """What a plain tar reader sees must be what the index says."""
    problems = []
    for number, shard in enumerate(index.header["shards"]):
        mine = index.blocks[index.blocks["shard"] == number]
        said = {int(o) for o in mine["offset"]} | {int(o) for o in mine["meta_offset"]}
        try:
            with tarfile.open(index.shard(number)) as tar:
                found = {m.offset_data for m in tar.getmembers()}
        except (tarfile.TarError, OSError) as error:
            problems.append(f"{shard['name']} is not a readable tar file: {error}")
            continue
        if found != said:
            problems.append(f"{shard['name']} has {len(found)} members, the index {len(said)}")
    return problems


def _wrong_columns(columns: dict[str, np.ndarray], count: int) -> list[str]:
    problems = [f"column '{c}' is missing" for c in COLUMNS if c not in columns]
    problems += [
        f"column '{k}' has {len(v)} rows for {count} crops"
        for k, v in columns.items()
        if len(v) != count
    ]
    if not problems and not np.isfinite([columns["x"], columns["y"]]).all():
        problems.append("coordinates are not finite")
    if not problems and not (columns["source_mpp"] > 0).all():
        problems.append("a source mpp is missing")
    return problems


def _wrong_counts(index: Index, seen: Counter[tuple[str, int]]) -> list[str]:
    found: Counter[str] = Counter()
    for (slide, _), n in seen.items():
        found[slide] += n
    said = {k: v["count"] for k, v in index.header["slides"].items()}
    wrong = [s for s in said.keys() | found.keys() if said.get(s, 0) != found.get(s, 0)]
    return [
        f"slide {s}: index.json says {said.get(s, 0)} nuclei, the blocks hold {found.get(s, 0)}"
        for s in sorted(wrong)
    ]


def _mixing(index: Index, slides: list[np.ndarray], cfg: Check) -> dict[str, Any]:
    """How many slides the first batches of a training run would see."""
    batch = min(cfg.batch, index.count)
    names, codes = np.unique(np.concatenate(slides), return_inverse=True)
    order = Order(index.blocks["count"], cfg.seed, batch, 64)
    numbers, effective = [], []
    for step in range(min(8, order.steps_a_pass)):
        block, row = order.batch_at(step)
        counts = np.bincount(codes[index.starts[block] + row], minlength=len(names))
        numbers.append(int((counts > 0).sum()))
        effective.append(float(1 / np.square(counts / counts.sum()).sum()))
    return {
        "batch": batch,
        "slides_in_a_batch": float(np.mean(numbers)),
        "effective_slides": float(np.mean(effective)),
    }
