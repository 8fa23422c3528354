"""timm: a folder `timm.create_model("local-dir:…", pretrained=True)` opens, and encoder.pth."""

import io
from pathlib import Path
from typing import Any

import torch

from lemon_muse.backbones.muse import timm_arguments
from lemon_muse.data.files import write_atomic
from lemon_muse.dense import DenseEncoder
from lemon_muse.encoder import Encoder, save_encoder
from lemon_muse.frozen import FrozenEncoder

NOTE = (
    "This is the encoder of a MUSE network without its decoder: it gives one feature of a whole "
    "window. Features of nuclei come from the decoder's map; use the network's own folder for "
    "them. Features equal the network's at the window above; at other sizes timm resamples the "
    "positions with antialiasing, which the network does not."
)


def write(encoder: FrozenEncoder, folder: Path, card: dict[str, Any]) -> float:
    """Write the folder, open it with timm, and return the largest difference of the features.

    Of a MUSE network the encoder alone is written.
    """
    import timm

    if isinstance(encoder, DenseEncoder):
        part, card = image_encoder(encoder), {"Note": NOTE, **card}
    else:
        assert isinstance(encoder, Encoder)
        part = encoder
    save_encoder(part, folder, card=card)
    state = {k: v.detach().cpu().contiguous() for k, v in part.network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(folder / "encoder.pth", buffer.getvalue())
    again = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    size = part.image_size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return float((again(images) - encoder.cpu().eval()(images)).abs().max())


def image_encoder(encoder: DenseEncoder) -> Encoder:
    """The ViT or ResNet of a MUSE network as an encoder of windows; weights are shared."""
    architecture, arguments = timm_arguments(encoder.settings)
    # Stochastic depth belongs to pretraining; whoever trains on chooses it anew.
    arguments = {k: v for k, v in arguments.items() if k != "drop_path_rate"}
    # timm resamples positions in its own way: only the table's own size gives the same features.
    size = encoder.settings.image if encoder.patch_size else encoder.image_size
    return Encoder(
        encoder.image_encoder,
        architecture=architecture,
        arguments=arguments,
        image_size=size,
        mpp=encoder.mpp,
        mean=encoder.mean,  # type: ignore[arg-type]
        std=encoder.std,  # type: ignore[arg-type]
        name=encoder.name,
    )
