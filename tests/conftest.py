"""Fixtures that several rooms share."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lemon_muse.data.codec import encode_image
from lemon_muse.data.writer import ShardWriter

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run beside each other: spinning threads would cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout, or a skip."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def crop_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished set: 700 crops of 32 px of drawn blobs, 7 slides, blocks of 64."""
    return write_blob_shards(tmp_path_factory.mktemp("shards") / "crops")


@pytest.fixture(scope="session")
def roi_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished set: 24 ROIs of 128 px with 0 to 30 drawn nuclei of two kinds, 4 slides."""
    return write_blob_rois(tmp_path_factory.mktemp("shards") / "rois")


def write_blob_shards(
    folder: Path,
    *,
    count: int = 700,
    size: int = 32,
    block: int = 64,
    encoding: str = "raw",
    seed: int = 0,
) -> Path:
    """Shards of round and long dark blobs on a pink ground: something that can be learnt."""
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, size=size, mpp=0.25, encoding=encoding) as writer:
        for start in range(0, count, block):
            n = min(block, count - start)
            writer.write(blobs(n, size, rng), blob_columns(start, n))
    return folder


def blobs(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    angle, long, wide = rng.uniform(0, np.pi, n), rng.uniform(5, 11, n), rng.uniform(3, 6, n)
    u = x * np.cos(angle)[:, None, None] + y * np.sin(angle)[:, None, None]
    v = -x * np.sin(angle)[:, None, None] + y * np.cos(angle)[:, None, None]
    inside = (u / long[:, None, None]) ** 2 + (v / wide[:, None, None]) ** 2 < 1
    tint = rng.normal(0, 22, (n, 1, 1, 3))  # each nucleus has a stain of its own
    ground = rng.normal((205, 150, 190), 12, (n, size, size, 3)) - tint
    dark = rng.normal((95, 60, 130), 20, (n, size, size, 3)) + 1.5 * tint
    return np.where(inside[..., None], dark, ground).clip(0, 255).astype(np.uint8)


def blob_columns(start: int, n: int) -> dict[str, np.ndarray]:
    number = np.arange(start, start + n)
    slide = np.array([f"slide{i % 7}" for i in number])
    return {
        "slide": slide,
        "patient": np.array([f"patient{i % 7 // 2}" for i in number]),
        "id": number,
        "x": number * 3.0 + 0.5,
        "y": number * 2.0 + 0.5,
        "mpp": np.full(n, 0.25),
        "source_mpp": np.full(n, 0.5),
        "type": np.full(n, ""),
        "score": np.ones(n),
    }


# Nuclei of each ROI: as unequal as in tissue, some ROIs with none or one.
ROI_COUNTS = (0, 1, 5, 12, 3, 20, 0, 8, 1, 15, 2, 30, 7, 0, 9, 25, 4, 1, 11, 6, 18, 0, 10, 14)


def write_blob_rois(
    folder: Path,
    *,
    counts: tuple[int, ...] = ROI_COUNTS,
    side: int = 128,
    margin: int = 16,
    seed: int = 0,
) -> Path:
    """ROI shards (JPEG) of discs and rings on a pink ground; `type` says which a nucleus is."""
    rng = np.random.default_rng(seed)
    header = {"margin": margin}
    with ShardWriter(
        folder, kind="rois", size=side, mpp=0.25, encoding="jpeg", extra=header
    ) as writer:
        for roi, count in enumerate(counts):
            points = spread(count, side, rng)
            inner = (np.minimum(points, side - points) >= margin).all(1)
            points = points[np.argsort(~inner, kind="stable")]
            kinds = rng.choice(["disc", "ring"], count)
            pixels = blob_roi(points, kinds, side, rng)
            facts = {"slide": f"slide{roi % 4}", "patient": f"patient{roi % 4 // 2}"}
            facts |= {"left": 300.0 * roi, "top": 20.0 * roi, "side": 2.0 * side}
            facts |= {"mpp": 0.25, "source_mpp": 0.125, "tissue": 1.0}
            columns = {"id": np.arange(count) + 100 * roi, "x": points[:, 0], "y": points[:, 1]}
            columns |= {"type": kinds, "score": np.ones(count)}
            payload = encode_image(pixels, "jpeg", 95)
            writer.write_roi(payload, columns, facts, inner=int(inner.sum()))
            writer.moments.add(pixels)
            writer.crop_moments.add(pixels)
    return folder


def spread(count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Points [count, 2] in a square, none within 14 px of another."""
    points = np.zeros((0, 2))
    while len(points) < count:
        new = rng.uniform(2, side - 2, 2)
        if not len(points) or np.linalg.norm(points - new, axis=1).min() >= 14:
            points = np.concatenate([points, new[None]])
    return points


def blob_roi(
    points: np.ndarray, kinds: np.ndarray, side: int, rng: np.random.Generator
) -> np.ndarray:
    """A picture, uint8 [side, side, 3], of dark discs and rings, each with a stain of its own."""
    y, x = np.mgrid[:side, :side] + 0.5
    pixels = rng.normal((205, 150, 190), 8, (side, side, 3)) + rng.normal(0, 10, 3)
    for (cx, cy), kind in zip(points, kinds, strict=True):
        far = np.hypot(x - cx, y - cy)
        radius = rng.uniform(5, 6.5)
        inside = (far < radius) & (far > (0.6 * radius if kind == "ring" else 0))
        stain = rng.normal((95, 60, 130), 15) + rng.normal(0, 15)
        pixels[inside] = stain + rng.normal(0, 10, (int(inside.sum()), 3))
    return pixels.clip(0, 255).astype(np.uint8)
