"""Floors: what is reached without pretraining. A probe's figure means little without them.

Every floor goes through the same probes on the same crops as the encoder. Scaling was chosen to
make the floors high: on BRCA-M2C (60 / 12 / 18 images, 40 px, 0.25 mpp) the root of histograms has
balanced KNN .720 on val, plain histograms .682; standardised colour has .704 on val and .579 on
test, plain colour .705 and .523.
"""

import copy
import logging

import numpy as np
import torch
from torch import nn

from lemon_muse.data.table import Table

log = logging.getLogger(__name__)

# LEMON's window; floors are also measured on it where the encoder's differs.
WINDOW, MPP = 40, 0.25
FLOORS = ("majority", "colour", "histogram", "pixel_pca")
VERSION = "1"
BINS = 16
CENTRE = 16
COMPONENTS = 192
# A PCA of more pixels than this has no use as a floor: larger windows are shrunk by a whole factor.
PCA_SIDE = 64
PCA_ROWS = 20_000


def floor_features(
    name: str, table: Table, *, size: int, mpp: float, seed: int = 0, workers: int = 0
) -> np.ndarray:
    """Features float32 [n, d] of a floor for every row; whatever is fitted sees train alone.

    colour: mean and standard deviation of R, G, B; standardised on train (6).
    histogram: square roots of the 16-bin histograms of R, G, B of the window and of its central
        16 px (96). The root makes the cosine the Bhattacharyya coefficient.
    pixel_pca: first 192 principal components of the pixels, fitted on train (<= 20,000 nuclei).

    Args:
        size, mpp: the window, px and µm/px.
    """
    if name == "pixel_pca":
        return _pixel_pca(table, size=size, mpp=mpp, seed=seed, workers=workers)
    describe = {"colour": _colour, "histogram": _histogram}[name]
    out: np.ndarray | None = None
    for rows, pixels in table.stream(size, mpp, workers=workers):
        part = describe(pixels)
        out = np.zeros((len(table), part.shape[1]), np.float32) if out is None else out
        out[rows] = part
    if out is None:
        raise ValueError("the table is empty")
    if name == "colour":
        train = out[fitting_rows(table)]
        out = (out - train.mean(0)) / np.maximum(train.std(0), 1e-6)
    return out


def fitting_rows(table: Table) -> np.ndarray:
    """Rows that floors are fitted on, without labels, int64: train, or all where folds divide.

    With folds that is transductive and makes floors higher, if anything: never the encoder.
    """
    train = table.rows("train")
    return train if len(train) else np.arange(len(table))


def _colour(pixels: np.ndarray) -> np.ndarray:
    flat = pixels.reshape(len(pixels), -1, 3).astype(np.float32) / 255
    return np.concatenate([flat.mean(1), flat.std(1)], 1)


def _histogram(pixels: np.ndarray) -> np.ndarray:
    side = pixels.shape[1]
    start = max(0, (side - CENTRE) // 2)
    centre = pixels[:, start : start + CENTRE, start : start + CENTRE]
    return np.concatenate([_root_histogram(pixels), _root_histogram(centre)], 1)


def _root_histogram(pixels: np.ndarray) -> np.ndarray:
    """Square roots of channel histograms, float32 [n, 3 * BINS]; each channel's shares sum to 1."""
    n = len(pixels)
    bins = pixels.reshape(n, -1, 3).astype(np.int64) * BINS // 256
    cells = (np.arange(n)[:, None, None] * 3 + np.arange(3)) * BINS + bins
    counts = np.bincount(cells.ravel(), minlength=n * 3 * BINS).reshape(n, 3 * BINS)
    return np.sqrt(counts / bins.shape[1]).astype(np.float32)


def _pixel_pca(table: Table, *, size: int, mpp: float, seed: int, workers: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    train = fitting_rows(table)
    if len(train) > PCA_ROWS:
        train = np.sort(np.random.default_rng(seed).permutation(train)[:PCA_ROWS])
    wanted = np.zeros(len(table), bool)
    wanted[train] = True
    pixels = np.empty((len(table), _shrunk(size) ** 2 * 3), np.uint8)
    for rows, part in table.stream(size, mpp, workers=workers):
        pixels[rows] = _shrink(part).reshape(len(rows), -1)
    sample = pixels[wanted].astype(np.float32) / 255
    count = min(COMPONENTS, len(sample), sample.shape[1])
    pca = PCA(count, svd_solver="randomized", random_state=seed).fit(sample)
    parts = [
        pca.transform(pixels[start : start + 4096].astype(np.float32) / 255)
        for start in range(0, len(pixels), 4096)
    ]
    return np.concatenate(parts).astype(np.float32)


def _shrunk(size: int) -> int:
    return size // -(-size // PCA_SIDE)


def _shrink(pixels: np.ndarray) -> np.ndarray:
    """Mean over whole blocks so that the side is at most `PCA_SIDE`; small windows stay."""
    n, side = pixels.shape[:2]
    small = _shrunk(side)
    factor = -(-side // PCA_SIDE)
    if factor == 1:
        return pixels
    blocks = pixels[:, : small * factor, : small * factor]
    blocks = blocks.reshape(n, small, factor, small, factor, 3)
    return blocks.mean((2, 4), dtype=np.float32).round().astype(np.uint8)


def majority_scores(train_labels: np.ndarray, count: int, *, classes: int) -> np.ndarray:
    """Shares of the classes in train for every nucleus, float32 [count, K]: always the majority."""
    share = np.bincount(train_labels, minlength=classes) / max(1, len(train_labels))
    return np.tile(share.astype(np.float32), (count, 1))


def random_encoder(encoder: nn.Module, *, seed: int) -> nn.Module:
    """The same architecture as a lemon_muse encoder, freshly initialised as training would do it.

    A ViT with MoCo v3's fixed sin-cos positions gets them too; they are not learnt.
    """
    import timm

    from lemon_muse.backbones.vit import prepare_moco_vit

    if hasattr(encoder, "fresh"):
        fresh: nn.Module = encoder.fresh(seed=seed)  # type: ignore[operator]
        return fresh
    fresh = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(
            encoder.architecture,  # type: ignore[arg-type]
            num_classes=0,
            **encoder.arguments,  # type: ignore[arg-type]
        )
        if isinstance(network, timm.models.VisionTransformer):
            sincos = _has_sincos(encoder.network)  # type: ignore[arg-type]
            prepare_moco_vit(network, freeze_patch=False, sincos=sincos)
    fresh.network = network
    return fresh.eval().requires_grad_(False)


def _has_sincos(vit: nn.Module) -> bool:
    from lemon_muse.backbones.vit import sincos_positions

    positions = vit.pos_embed
    if not isinstance(positions, torch.Tensor) or positions.shape[-1] % 4:
        return False
    grid: tuple[int, int] = vit.patch_embed.grid_size  # type: ignore[union-attr, assignment]
    table = sincos_positions(positions.shape[-1], *grid)
    found = positions[0, positions.shape[1] - len(table) :]
    return found.shape == table.shape and bool(torch.allclose(found.cpu(), table, atol=1e-4))
