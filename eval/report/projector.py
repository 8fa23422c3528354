"""The same embedding for TensorBoard's projector: vectors, names, a sprite of thumbnails."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from eval.report.gallery import Gallery
from lemon_muse.errors import UserError

# TensorBoard refuses a sprite with a side above 8192 px; memory, not that, sets this thumbnail.
SPRITE_SIDE = 8192
THUMB = 40
CONFIG = "projector_config.pbtxt"


def thumb_side(n: int, stored: int) -> int:
    """Side of a thumbnail in px, so that ceil(sqrt(n)) of them stay within the sprite's limit."""
    return max(1, min(THUMB, stored, SPRITE_SIDE // int(np.ceil(np.sqrt(n)))))


def write_projector(folder: Path, gallery: Gallery, vectors: np.ndarray) -> Path:
    """Write a log folder for `tensorboard --logdir FOLDER`, replacing an earlier one.

    Args:
        folder: new, empty, or written by this function before.
        gallery: labels, crops, split and patient of the nuclei.
        vectors: float32 [n, c], the principal components that the map starts from.

    Raises:
        UserError: the folder holds something else.
    """
    import torch
    from torch.utils.tensorboard import SummaryWriter

    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds other files; give another out= or move them away.")
    side = thumb_side(len(vectors), gallery.crops.shape[1])
    images = np.stack(
        [
            np.asarray(Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC))
            for crop in gallery.crops
        ]
    )
    # add_embedding multiplies by 255 and cuts off: the half brings every byte back exactly.
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() + 0.5) / 255
    # A tab or a line break inside a name would shift the columns of the tsv.
    clean = [" ".join(name.split()) for name in gallery.classes]
    rows = [
        [clean[label], split, " ".join(patient.split())]
        for label, split, patient in zip(
            gallery.labels, gallery.split, gallery.patient, strict=True
        )
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".projector."))
    try:
        with SummaryWriter(str(temporary)) as writer:
            writer.add_embedding(
                torch.from_numpy(vectors),
                metadata=rows,
                metadata_header=["class", "split", "patient"],
                label_img=pixels,
                tag="nuclei",
            )
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder
