"""Crops and ROIs per second of slides: tiles decoded once in bands, against a read per nucleus.

Peers: openslide-python `read_region`, pyvips `crop` and `Region.fetch` per nucleus, the nuclei in
the order of a detector (tiles of 1024 px). Every candidate opens the slide itself, makes uint8 RGB
arrays of all crops and is run in turn; figures are medians of process CPU time, the file in the
page cache. The ratio is to openslide on the same slide. Two more rows put crops on another mpp. The
slide of 20,000 px is also read by two processes, half of the nuclei each, and in ROIs.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import openslide
import torch
from PIL import Image

from lemon_muse.data.slides import open_slide
from lemon_muse.synthetic import write_slide
from tests.performance.big import write_repeated

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "wsi"
SIZE, SIDE, ROUNDS = 64, 4000, 5
LARGE, FEW = (
    20_000,
    2000,
)  # side of the large slide, px; nuclei where reading them all takes minutes
PEER = "openslide, read_region per nucleus"
Crops = Iterator[tuple[np.ndarray, np.ndarray]]  # rows and their crops


def run() -> list[dict]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_slide(Path(folder) / "a.svs", side=SIDE, mpp=0.25)
        text = json.loads(path.with_suffix(".geojson").read_text(encoding="utf-8"))
        points = np.array([f["geometry"]["coordinates"] for f in text["features"]], np.float64)
        rows += _compare(f"generated {SIDE:,} px", path, 0.25, points)
        for name, mpp, vips in (
            ("cmu-1-small-region.svs", 0.499, True),
            ("tcga-cr-7395-01a-01-ts1.svs", 1.0, False),  # the wheel of pyvips has no JPEG 2000
        ):
            if (REAL / name).is_file():
                points = _dark_points(REAL / name, mpp, 6000)
                rows += _compare(name, REAL / name, mpp, points, vips=vips)
        path = Path(folder) / "large.svs"
        points = write_repeated(path, field=SIDE, times=LARGE // SIDE)
        source = f"generated {LARGE:,} px"
        rows += _compare(source, path, 0.25, points, rounds=3)
        rows += _in_pairs(source, path, _detector_order(path, 0.25, points))
        rows += _regions(source, path)
    return rows


def _detector_order(path: Path, mpp: float, points: np.ndarray) -> np.ndarray:
    """Points by tiles of 1024 px, without those whose window reaches over the slide's border."""
    with open_slide(path, mpp=mpp) as slide:
        ends = (slide.width, slide.height)
    # The peers do not mirror at the border.
    points = points[((points > SIZE) & (points < np.array(ends) - SIZE)).all(1)]
    tile = points // 1024
    return points[np.lexsort((tile[:, 0], tile[:, 1]))]


def _compare(
    source: str,
    path: Path,
    mpp: float,
    points: np.ndarray,
    *,
    vips: bool = True,
    rounds: int = ROUNDS,
) -> list[dict]:
    points = _detector_order(path, mpp, points)
    few = points[: min(len(points), FEW)]
    half = mpp / 2
    resized = f"{PEER}, then PIL resize, to mpp/2"
    # name: (peer, points, reader)
    candidates: dict[str, tuple[str, np.ndarray, Callable[[np.ndarray], Crops]]] = {
        PEER: (PEER, points, partial(_openslide, path)),
        "bands": (PEER, points, partial(_bands, path, mpp, mpp)),
        resized: (resized, points[: 5 * FEW], partial(_openslide_resized, path)),
        "bands, resampled to mpp/2": (resized, points, partial(_bands, path, mpp, half)),
    }
    if vips:
        candidates["pyvips, crop per nucleus"] = (PEER, few, partial(_vips, path))
        candidates["pyvips, Region.fetch per nucleus"] = (PEER, points, partial(_fetch, path))
    wanted = _all(_openslide(path, few), len(few))
    for name, (peer, _, read) in candidates.items():  # this also warms the page cache
        if peer == PEER and not np.array_equal(_all(read(few), len(few)), wanted):
            raise ValueError(f"{name} makes other crops of {source} than openslide")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):  # interleaved: all candidates meet the same machine
        for name, (_, mine, read) in candidates.items():
            began = time.process_time()
            seen = sum(len(crops) for _, crops in read(mine))
            times[name].append((time.process_time() - began) / seen)
    rates = {name: 1 / statistics.median(t) for name, t in times.items()}
    return [
        _row(source, f"{len(points)} nuclei: {name}", peer, rates[name], rates[peer])
        for name, (peer, _, _) in candidates.items()
    ]


def _in_pairs(source: str, path: Path, points: np.ndarray, rounds: int = 3) -> list[dict]:
    """Two processes, each with the nuclei of one half of the slide: CPU time and wall clock."""
    parts = [points[points[:, 1] < LARGE / 2], points[points[:, 1] >= LARGE / 2]]
    work = {PEER: partial(_openslide, path), "bands": partial(_bands, path, 0.25, 0.25)}
    cpu: dict[str, list[float]] = {name: [] for name in work}
    wall: dict[str, list[float]] = {name: [] for name in work}
    with get_context("spawn").Pool(2) as pool:
        pool.map(_used, [(read, part[:10]) for read in work.values() for part in parts], 1)
        for _ in range(rounds):
            for name, read in work.items():
                began = time.perf_counter()
                used = pool.map(_used, [(read, part) for part in parts], 1)
                wall[name].append((time.perf_counter() - began) / len(points))
                cpu[name].append(sum(used) / len(points))
    rows = []
    for clock, times, unit in (
        ("CPU time", cpu, "crops/s/core"),
        ("wall clock, machine shared", wall, "crops/s"),
    ):
        rates = {name: 1 / statistics.median(t) for name, t in times.items()}
        for name, rate in rates.items():
            what = f"{len(points)} nuclei, 2 processes, {clock}: {name}"
            peer = f"{PEER}, 2 processes"
            rows.append({**_row(source, what, peer, rate, rates[PEER], unit), "cores": 2})
    return rows


def _used(work: tuple[Callable[[np.ndarray], Crops], np.ndarray]) -> float:
    """CPU seconds that reading these crops takes in this process."""
    began = time.process_time()
    for _ in work[0](work[1]):
        pass
    return time.process_time() - began


def _regions(source: str, path: Path, rounds: int = 3) -> list[dict]:
    """ROIs at the slide's own mpp, on corners of the tile grid and anywhere."""
    rng = np.random.default_rng(0)
    rows = []
    for side, count in ((1024, 100), (2048, 40)):
        aligned = rng.permutation((LARGE // side - 1) ** 2)[:count]
        grid = np.stack([aligned % (LARGE // side - 1), aligned // (LARGE // side - 1)], 1) * side
        corners = {"aligned": grid, "random": rng.integers(0, LARGE - side, (count, 2))}
        for where, places in corners.items():
            peer = "openslide, read_region + convert"
            work = {peer: _roi_openslide, "Slide.region": _roi_region}
            first = [read(path, side, places[:2]) for read in work.values()]
            if not all(np.array_equal(a, b) for a, b in zip(*first, strict=True)):
                raise ValueError(f"the ROIs of {source} differ from openslide's")
            times: dict[str, list[float]] = {name: [] for name in work}
            for _ in range(rounds):
                for name, read in work.items():
                    began = time.process_time()
                    seen = sum(1 for _ in read(path, side, places))
                    times[name].append((time.process_time() - began) / seen)
            rates = {name: 1 / statistics.median(t) for name, t in times.items()}
            for name, rate in rates.items():
                what = f"ROIs of {side} px, {where} corners: {name}"
                rows.append(_row(source, what, peer, rate, rates[peer], "ROIs/s/core"))
    return rows


def _roi_openslide(path: Path, side: int, corners: np.ndarray) -> Iterator[np.ndarray]:
    with openslide.OpenSlide(path) as slide:
        for corner in corners.tolist():
            yield np.asarray(slide.read_region(corner, 0, (side, side)).convert("RGB"))


def _roi_region(path: Path, side: int, corners: np.ndarray) -> Iterator[np.ndarray]:
    with open_slide(path) as slide:
        for x, y in corners.tolist():
            yield slide.region(x, y, side, side, mpp=slide.mpp)


def _row(
    source: str, what: str, peer: str, ours: float, theirs: float, unit: str = "crops/s/core"
) -> dict:
    return {
        "name": "slides", "what": f"{source}, {what}", "peer": peer, "ours": ours, "unit": unit,
        "ratio": ours / theirs, "cores": 1, "device": "cpu", "data": source,
    }  # fmt: skip


def _corners(points: np.ndarray, side: int) -> list[list[int]]:
    return np.floor(points - side / 2 + 0.5).astype(int).tolist()


def _all(parts: Crops, count: int) -> np.ndarray:
    out = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for rows, pixels in parts:
        out[rows] = pixels
    return out


def _one_by_one(points: np.ndarray, side: int, read: Callable[[int, int], np.ndarray]) -> Crops:
    """Crops in blocks of 256, so that no reader pays for the memory of them all."""
    corners = _corners(points, side)
    for start in range(0, len(corners), 256):
        part = corners[start : start + 256]
        out = np.empty((len(part), SIZE, SIZE, 3), np.uint8)
        for crop, (x, y) in zip(out, part, strict=True):
            crop[:] = read(x, y)
        yield np.arange(start, start + len(part)), out


def _bands(path: Path, mpp: float, target: float, points: np.ndarray) -> Crops:
    with open_slide(path, mpp=mpp) as slide:
        yield from slide.bands(points, SIZE, mpp=target)


def _openslide(path: Path, points: np.ndarray) -> Crops:
    with openslide.OpenSlide(path) as slide:
        yield from _one_by_one(
            points,
            SIZE,
            lambda x, y: np.asarray(slide.read_region((x, y), 0, (SIZE, SIZE)))[..., :3],
        )


def _openslide_resized(path: Path, points: np.ndarray) -> Crops:
    side = SIZE // 2

    def read(x: int, y: int) -> np.ndarray:
        image = slide.read_region((x, y), 0, (side, side)).convert("RGB")
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    with openslide.OpenSlide(path) as slide:
        yield from _one_by_one(points, side, read)


def _vips(path: Path, points: np.ndarray) -> Crops:
    import pyvips

    pyvips.cache_set_max(0)
    image = pyvips.Image.new_from_file(str(path))
    yield from _one_by_one(points, SIZE, lambda x, y: image.crop(x, y, SIZE, SIZE).numpy())


def _fetch(path: Path, points: np.ndarray) -> Crops:
    import pyvips

    pyvips.cache_set_max(0)
    region = pyvips.Region.new(pyvips.Image.new_from_file(str(path)))
    yield from _one_by_one(
        points,
        SIZE,
        lambda x, y: np.frombuffer(region.fetch(x, y, SIZE, SIZE), np.uint8).reshape(SIZE, SIZE, 3),
    )


def _dark_points(path: Path, mpp: float, count: int) -> np.ndarray:
    """Points where the slide is dark, as nuclei are; float64 [count, 2], level-0 px."""
    with open_slide(path, mpp=mpp) as slide:
        small = slide.thumbnail(1000)
        scale = np.array([slide.width / small.shape[1], slide.height / small.shape[0]])
    weight = (255.0 - small.mean(-1)).ravel() ** 3
    rng = np.random.default_rng(0)
    place = rng.choice(len(weight), count, replace=False, p=weight / weight.sum())
    cells = np.stack([place % small.shape[1], place // small.shape[1]], 1)
    return (cells + rng.uniform(0, 1, (count, 2))) * scale


if __name__ == "__main__":
    for row in run():
        print(row)
