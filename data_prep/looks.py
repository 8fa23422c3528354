"""What nuclei look like, in a few numbers: principal components of small pictures or of features.

Each nucleus gets a unit vector; the cosine between two of them says how alike they look. Vectors
are kept in files of a few thousand nuclei each, so that a killed job goes on.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lemon_muse.data.ahead import map_ahead
from lemon_muse.data.files import write_atomic
from lemon_muse.data.reader import BlockReader
from lemon_muse.data.shards import Index
from lemon_muse.errors import RunError, UserError

SIDE = 20  # px of the small picture: with 64 components, the pixel floor of our probes
FITTED = 20_000  # nuclei from which the components are taken
PIECE = 16_384  # nuclei of a file
Raw = Callable[[np.ndarray], np.ndarray]


def pixel_looks(window: int) -> Raw:
    """The middle `window` px of crops as a picture of 20 px: uint8 [m, S, S, 3] to float32 [m, D].

    Values are 0 to 1; each pixel of the small picture is the mean of the part it covers.
    """
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    def raw(pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(_middle(pixels, window)).permute(0, 3, 1, 2).float() / 255
        return adaptive_avg_pool2d(images, min(SIDE, window)).flatten(1).numpy()

    return raw


def encoder_looks(folder: Path, index: Index, device: str) -> Raw:
    """An encoder's features of crops: uint8 [m, S, S, 3] to float32 [m, dim].

    Raises:
        UserError: it is no encoder of crops, or of another size or mpp than the crops have.
    """
    import torch

    from lemon_muse import distributed
    from lemon_muse.encoder import Encoder, load

    encoder = load(folder)
    if not isinstance(encoder, Encoder):
        raise UserError(f"{folder} reads whole ROIs; prep balance needs an encoder of crops.")
    if encoder.image_size > index.size or abs(encoder.mpp / index.mpp - 1) > 0.02:
        raise UserError(
            f"{folder} needs {encoder.image_size} px at {encoder.mpp:g} µm/px, but the crops of "
            f"{index.folder} have {index.size} px at {index.mpp:g}; take another encoder."
        )
    chosen = distributed.pick_device(device)
    encoder.to(chosen).eval()
    mean, std = (torch.tensor(v, device=chosen)[:, None, None] for v in (encoder.mean, encoder.std))

    @torch.inference_mode()
    def raw(pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(_middle(pixels, encoder.image_size)).to(chosen)
        images = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return encoder(images).float().cpu().numpy()

    return raw


def look(index: Index, raw: Raw, folder: Path, *, dims: int, seed: int, workers: int) -> np.ndarray:
    """Unit vectors of all nuclei of a set, float32 [n, min(dims, D)].

    The mean of some 20,000 nuclei is taken off and their first principal components are kept: what
    all nuclei share would make every cosine large.

    Args:
        index: of a set of crops.
        raw: uint8 [m, S, S, 3] to float32 [m, D].
        folder: of the files; those that stand are used.
        dims: components.
        seed: of the choice of those nuclei.
        workers: threads that read.

    Raises:
        RunError: a block is damaged, or features are not finite.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    reader = BlockReader(index)
    mean, axes = _components(index, reader, raw, folder, dims, seed, workers)
    pieces = list(_pieces(index))
    out = np.empty((index.count, axes.shape[1]), np.float32)
    with tqdm(total=index.count, unit=" nuclei", unit_scale=True, desc="looks", disable=None) as b:
        for number, blocks in enumerate(pieces):
            path = folder / f"looks-{number:06d}.npy"
            here = slice(int(index.starts[blocks[0]]), int(index.starts[blocks[-1] + 1]))
            if not path.is_file():
                parts = list(map_ahead(reader.pixels, blocks.tolist(), workers=workers))
                vectors = (_finite(raw, np.concatenate(parts)) - mean) @ axes
                _save(path, _unit(vectors).astype(np.float16))
            # What is used is what was kept: a job that went on gives the same as one that did not.
            vectors = np.load(path, allow_pickle=False).astype(np.float32)
            out[here] = _unit(vectors)
            b.update(len(vectors))
    reader.close()
    return out


def _components(
    index: Index,
    reader: BlockReader,
    raw: Raw,
    folder: Path,
    dims: int,
    seed: int,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean float32 [D] and axes float32 [D, dims] of what `raw` gives."""
    from scipy.linalg import eigh

    path = folder / "components.npz"
    if not path.is_file():
        order = np.random.default_rng([seed, 2]).permutation(np.flatnonzero(index.blocks["count"]))
        needed = 1 + int(np.searchsorted(index.blocks["count"][order].cumsum(), FITTED))
        blocks = np.sort(order[:needed]).tolist()
        parts = map_ahead(reader.pixels, blocks, workers=workers)
        values = np.concatenate([_finite(raw, pixels) for pixels in parts]).astype(np.float64)
        mean = values.mean(0)
        values -= mean
        last = values.shape[1] - 1
        some = (max(0, last + 1 - dims), last)
        axes = eigh(values.T @ values, subset_by_index=some)[1][:, ::-1]
        buffer = io.BytesIO()
        np.savez(buffer, mean=mean.astype(np.float32), axes=axes.astype(np.float32))
        write_atomic(path, buffer.getvalue())
    with np.load(path, allow_pickle=False) as members:
        return members["mean"], members["axes"]


def _pieces(index: Index) -> Iterator[np.ndarray]:
    """Numbers of consecutive blocks with some 16,000 nuclei together."""
    piece = index.starts[:-1] // PIECE
    yield from np.split(np.arange(len(piece)), np.flatnonzero(np.diff(piece)) + 1)


def _finite(raw: Raw, pixels: np.ndarray) -> np.ndarray:
    parts = [raw(pixels[start : start + 1024]) for start in range(0, len(pixels), 1024)]
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        raise RunError("the encoder gives features that are not finite; take another one.")
    return values


def _unit(vectors: np.ndarray) -> np.ndarray:
    long = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = vectors / np.maximum(long, 1e-12)
    return unit


def _middle(pixels: np.ndarray, window: int) -> np.ndarray:
    first = (pixels.shape[1] - window) // 2
    return pixels[:, first : first + window, first : first + window]


def _save(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_atomic(path, buffer.getvalue())
