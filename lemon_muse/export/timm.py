"""timm: a folder `timm.create_model("local-dir:…", pretrained=True)` opens, and encoder.pth."""

import io
from pathlib import Path
from typing import Any

import torch

from lemon_muse.data.files import write_atomic
from lemon_muse.encoder import Encoder, save_encoder


def write(encoder: Encoder, folder: Path, card: dict[str, Any]) -> float:
    """Write the folder, open it with timm, and return the largest difference of the features."""
    import timm

    save_encoder(encoder, folder, card=card)
    state = {k: v.detach().cpu().contiguous() for k, v in encoder.network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(folder / "encoder.pth", buffer.getvalue())
    again = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    size = encoder.image_size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float((again(images) - encoder.cpu().eval()(images)).abs().max())
