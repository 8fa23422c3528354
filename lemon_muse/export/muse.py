"""muse: the layout of the released MUSE files, `muse.pth`, for the MUSE code and its users."""

import io
from pathlib import Path
from typing import Any

import torch

from lemon_muse.backbones.muse_weights import from_released, to_released
from lemon_muse.data.files import write_atomic
from lemon_muse.dense import IMAGENET, DenseEncoder
from lemon_muse.errors import UserError
from lemon_muse.frozen import FrozenEncoder, card_text

NAME = "muse.pth"


@torch.inference_mode()
def write(encoder: FrozenEncoder, folder: Path, card: dict[str, Any]) -> float:
    """Write the file and its card, read it again, and return the largest difference.

    Compared are the features of nuclei and the class tokens.

    Raises:
        UserError: the released code could not hold this network, or would compute differently.
    """
    if not isinstance(encoder, DenseEncoder):
        raise UserError(
            f"format=muse holds a network with a map of nuclei, and {encoder.name} gives one "
            f"feature a window; use format=timm."
        )
    encoder = encoder.cpu().eval()
    buffer = io.BytesIO()
    torch.save(to_released(encoder.network), buffer)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / NAME, buffer.getvalue())
    write_atomic(
        folder / "README.md", card_text(encoder, {"File": _note(encoder), **card}).encode()
    )
    again = DenseEncoder(
        from_released(folder / NAME),
        image_size=encoder.image_size,
        mpp=encoder.mpp,
        mpp_range=encoder.mpp_range,
        mean=encoder.mean,  # type: ignore[arg-type]
        std=encoder.std,  # type: ignore[arg-type]
    )
    given = encoder.check_input()
    ours, theirs = encoder.check_output(given), again.check_output(given)
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


def _note(encoder: DenseEncoder) -> str:
    """What the file does not say itself."""
    said = (
        f'`{NAME}` has the layout of the released MUSE files: `torch.load(…)["teacher"]`, names '
        f"under `module.backbone.`. It holds weights only: window, µm/px and normalisation are the "
        f"ones above. `lemon-muse eval encoder={NAME}` reads it, with ImageNet's normalisation."
    )
    if (tuple(encoder.mean), tuple(encoder.std)) != IMAGENET:
        said += (
            " **This network was trained with another normalisation than ImageNet's, which the "
            "MUSE code uses: set mean and std there to the ones above.**"
        )
    return said
