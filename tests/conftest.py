"""Fixtures that several rooms share."""

from pathlib import Path

import numpy as np
import pytest
import torch

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
