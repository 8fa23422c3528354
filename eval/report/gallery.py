"""`gallery.npz`: some nuclei with their features and pixels, for the pictures of the report.

The file lies beside results.jsonl and is written by `eval` for the encoder in the foreground. Keys:

| key          | dtype           | meaning                                                         |
|--------------|-----------------|-----------------------------------------------------------------|
| features     | float32 [n, d]  | frozen features as the probes see them, not normalised          |
| crops        | uint8 [n,S,S,3] | the window that the encoder saw, RGB                            |
| labels       | int64 [n]       | index into `classes`                                            |
| classes      | str [K]         | class names in the benchmark's order                            |
| split        | str [n]         | 'train', 'val' or 'test'                                        |
| patient      | str [n]         | patient of the nucleus                                          |
| encoder      | str scalar      | name as in the rows of results.jsonl; '' if unknown             |
| encoder_hash | str scalar      | content hash as in the rows; '' if unknown                      |
| mpp          | float64 scalar  | µm per pixel of `crops`; NaN if unknown                         |

n is at most `LIMIT`. The last three keys may be absent.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

NAME = "gallery.npz"
LIMIT = 4000


@dataclass(frozen=True)
class Gallery:
    """The arrays of a gallery.npz; see the module's table."""

    features: np.ndarray
    crops: np.ndarray
    labels: np.ndarray
    classes: list[str]
    split: np.ndarray
    patient: np.ndarray
    encoder: str
    encoder_hash: str
    mpp: float

    def part(self, rows: np.ndarray) -> "Gallery":
        """The gallery of some rows (int64 indices)."""
        arrays = (self.features[rows], self.crops[rows], self.labels[rows])
        names = (self.encoder, self.encoder_hash, self.mpp)
        return Gallery(*arrays, self.classes, self.split[rows], self.patient[rows], *names)


def choose_rows(split: np.ndarray, *, limit: int = LIMIT, seed: int = 0) -> np.ndarray:
    """Which nuclei of a benchmark go into the gallery: a random draw, up to a quarter from test.

    Classes keep their natural shares inside a split, so that neighbour counts can be held against
    the share of the class. Validation nuclei are left out unless there is nothing else.

    Args:
        split: str [N], the split of each nucleus.
        limit: most rows, at least 2.
        seed: of the draw.

    Returns:
        int64 [m], sorted, m <= limit.
    """
    rng = np.random.default_rng(seed)
    test = rng.permutation(np.flatnonzero(split == "test"))
    train = rng.permutation(np.flatnonzero(split == "train"))
    n_test = min(len(test), max(limit // 4, limit - len(train)))
    chosen = np.concatenate([test[:n_test], train[: limit - n_test]])
    if len(chosen) == 0:
        chosen = rng.permutation(len(split))[:limit]
    return np.sort(chosen).astype(np.int64)


def write_gallery(
    path: Path,
    *,
    features: np.ndarray,
    crops: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    split: np.ndarray,
    patient: np.ndarray,
    encoder: str = "",
    encoder_hash: str = "",
    mpp: float = math.nan,
) -> None:
    """Write a gallery.npz (temporary name, sync, rename); keys and shapes in the module's table.

    Raises:
        ValueError: lengths that differ, more than `LIMIT` nuclei, crops that are not uint8 RGB.
    """
    n = len(features)
    lengths = {len(crops), len(labels), len(split), len(patient), n}
    if len(lengths) != 1:
        raise ValueError(f"features, crops, labels, split, patient differ in length: {lengths}")
    if n > LIMIT:
        raise ValueError(f"{n} nuclei: a gallery holds at most {LIMIT}, see choose_rows")
    crops = np.asarray(crops)
    if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[3] != 3:
        raise ValueError(f"crops must be uint8 [n, S, S, 3], not {crops.dtype} {crops.shape}")
    arrays = {
        "features": np.asarray(features, np.float32),
        "crops": crops,
        "labels": np.asarray(labels, np.int64),
        "classes": np.asarray(list(classes), dtype=np.str_),
        "split": np.asarray(split).astype(np.str_),
        "patient": np.asarray(patient).astype(np.str_),
        "encoder": np.asarray(encoder, dtype=np.str_),
        "encoder_hash": np.asarray(encoder_hash, dtype=np.str_),
        "mpp": np.asarray(mpp, np.float64),
    }
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, stream.getvalue())


def read_gallery(path: Path, *, limit: int | None = None, seed: int = 0) -> Gallery:
    """Read and check a gallery.npz; with `limit` a random draw (`choose_rows`) of its nuclei.

    Raises:
        UserError: not such a file, arrays that do not fit each other, features not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            gallery = Gallery(
                features=np.asarray(file["features"], np.float32),
                crops=file["crops"],
                labels=np.asarray(file["labels"], np.int64),
                classes=[str(c) for c in file["classes"]],
                split=file["split"].astype(str),
                patient=file["patient"].astype(str),
                encoder=str(file["encoder"]) if "encoder" in file else "",
                encoder_hash=str(file["encoder_hash"]) if "encoder_hash" in file else "",
                mpp=float(file["mpp"]) if "mpp" in file else math.nan,
            )
    except Exception as error:  # a damaged zip raises many kinds
        raise UserError(
            f"{path} is not a gallery ({error}); run 'lemon-muse eval' again."
        ) from None
    problem = _problem(gallery)
    if problem:
        raise UserError(f"{path}: {problem}; run 'lemon-muse eval' again.")
    if limit is not None and len(gallery.labels) > limit:
        gallery = gallery.part(choose_rows(gallery.split, limit=limit, seed=seed))
    return gallery


def _problem(gallery: Gallery) -> str:
    n = len(gallery.labels)
    arrays = (gallery.features, gallery.crops, gallery.split, gallery.patient)
    if n == 0 or any(len(a) != n for a in arrays):
        return "it is empty or its arrays differ in length"
    if gallery.features.ndim != 2 or not np.isfinite(gallery.features).all():
        return "features must be finite numbers [n, d]"
    if gallery.crops.dtype != np.uint8 or gallery.crops.ndim != 4 or gallery.crops.shape[3] != 3:
        return "crops must be uint8 [n, S, S, 3]"
    if gallery.labels.min() < 0 or gallery.labels.max() >= len(gallery.classes):
        return f"a label lies outside its {len(gallery.classes)} classes"
    return ""
