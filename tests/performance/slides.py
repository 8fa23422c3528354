"""Crops per second per core from a slide: tiles decoded once in bands, against one read a nucleus.

Peers: openslide-python `read_region` and pyvips `crop` per nucleus, the nuclei in the order of a
detector (tiles of 1024 px). Every candidate opens the slide itself, makes uint8 RGB arrays of all
crops and is run in turn; figures are medians of process CPU time, the file in the page cache. The
ratio is to openslide on the same slide. Two more rows put crops on another mpp.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import torch
from PIL import Image

from lemon_muse.data.slides import open_slide
from lemon_muse.synthetic import write_slide

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "wsi"
SIZE, SIDE, ROUNDS = 64, 4000, 5
PEER = "openslide, read_region per nucleus"


def run() -> list[dict]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_slide(Path(folder) / "a.svs", side=SIDE, mpp=0.25)
        text = json.loads(path.with_suffix(".geojson").read_text(encoding="utf-8"))
        points = np.array([f["geometry"]["coordinates"] for f in text["features"]], np.float64)
        rows += _compare(f"generated {SIDE} px", path, 0.25, points)
        for name, mpp, vips in (
            ("cmu-1-small-region.svs", 0.499, True),
            ("tcga-cr-7395-01a-01-ts1.svs", 1.0, False),  # the wheel of pyvips has no JPEG 2000
        ):
            if (REAL / name).is_file():
                points = _dark_points(REAL / name, mpp, 6000)
                rows += _compare(name, REAL / name, mpp, points, vips=vips)
    return rows


def _compare(
    source: str, path: Path, mpp: float, points: np.ndarray, *, vips: bool = True
) -> list[dict]:
    with open_slide(path, mpp=mpp) as slide:
        ends = (slide.width, slide.height)
    # Windows inside the slide: the peers do not mirror at its border.
    points = points[((points > SIZE) & (points < np.array(ends) - SIZE)).all(1)]
    tile = points // 1024
    points = points[np.lexsort((tile[:, 0], tile[:, 1]))]
    half = mpp / 2
    candidates: dict[str, tuple[str, Callable[[], np.ndarray]]] = {
        PEER: (PEER, lambda: _openslide(path, points)),
        "bands": (PEER, lambda: _bands(path, points, mpp, mpp)),
    }
    if vips:
        candidates["pyvips, crop per nucleus"] = (PEER, lambda: _vips(path, points))
    resized = f"{PEER}, then PIL resize, to mpp/2"
    candidates[resized] = (resized, lambda: _openslide_resized(path, points))
    candidates["bands, resampled to mpp/2"] = (resized, lambda: _bands(path, points, mpp, half))
    made = {name: call() for name, (_, call) in candidates.items()}
    for name in made.keys() & {"bands", "pyvips, crop per nucleus"}:
        if not np.array_equal(made[name], made[PEER]):
            raise ValueError(f"{name} makes other crops of {source} than openslide")
    del made
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):  # interleaved: all candidates meet the same machine
        for name, (_, call) in candidates.items():
            began = time.process_time()
            call()
            times[name].append((time.process_time() - began) / len(points))
    rates = {name: 1 / statistics.median(t) for name, t in times.items()}
    return [
        {
            "name": "slides",
            "what": f"{source}, {len(points)} nuclei: {name}",
            "peer": peer,
            "ours": rates[name],
            "unit": "crops/s/core",
            "ratio": rates[name] / rates[peer],
            "cores": 1,
            "device": "cpu",
            "data": source,
        }
        for name, (peer, _) in candidates.items()
    ]


def _corners(points: np.ndarray, side: int) -> list[list[int]]:
    return np.floor(points - side / 2 + 0.5).astype(int).tolist()


def _bands(path: Path, points: np.ndarray, mpp: float, target: float) -> np.ndarray:
    out = np.empty((len(points), SIZE, SIZE, 3), np.uint8)
    with open_slide(path, mpp=mpp) as slide:
        for rows, pixels in slide.bands(points, SIZE, mpp=target):
            out[rows] = pixels
    return out


def _openslide(path: Path, points: np.ndarray) -> np.ndarray:
    out = np.empty((len(points), SIZE, SIZE, 3), np.uint8)
    with openslide.OpenSlide(path) as slide:
        for i, (x, y) in enumerate(_corners(points, SIZE)):
            out[i] = np.asarray(slide.read_region((x, y), 0, (SIZE, SIZE)))[..., :3]
    return out


def _openslide_resized(path: Path, points: np.ndarray) -> np.ndarray:
    out = np.empty((len(points), SIZE, SIZE, 3), np.uint8)
    side = SIZE // 2
    with openslide.OpenSlide(path) as slide:
        for i, (x, y) in enumerate(_corners(points, side)):
            image = slide.read_region((x, y), 0, (side, side)).convert("RGB")
            out[i] = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return out


def _vips(path: Path, points: np.ndarray) -> np.ndarray:
    import pyvips

    pyvips.cache_set_max(0)
    out = np.empty((len(points), SIZE, SIZE, 3), np.uint8)
    image = pyvips.Image.new_from_file(str(path))
    for i, (x, y) in enumerate(_corners(points, SIZE)):
        out[i] = image.crop(x, y, SIZE, SIZE).numpy()
    return out


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
