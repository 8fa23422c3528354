"""timm: a folder `timm.create_model("local-dir:…", pretrained=True)` opens, and encoder.pth.

The folder is also what `hf-hub:` finds on the hub once it is uploaded. `encoder.pth` is for the
consumers that build the network themselves and load a bare dict of tensors, such as kaiko eva.
"""

import io
from collections.abc import Callable
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
BARE = "encoder.pth"


def write(encoder: FrozenEncoder, folder: Path, card: dict[str, Any]) -> float:
    """Write the folder, open it with timm, and return the largest difference of the features.

    Of a MUSE network the encoder alone is written.
    """
    part, card = crop_encoder(encoder, card)
    arguments = ", ".join(f"{k}={v!r}" for k, v in part.arguments.items())
    bare = (
        f"`{BARE}` holds the same weights as a bare dict of tensors under timm's names, for code "
        f"that builds the network itself. It does not say the architecture: other heads or another "
        f"pooling load without a complaint and compute another function. Build it with\n\n"
        f"```python\ntimm.create_model({part.architecture!r}, num_classes=0, {arguments},\n"
        f'                  checkpoint_path="{BARE}")\n```'
    )
    save_encoder(part, folder, card={"Bare weights": bare, **card})
    state = {k: v.detach().cpu().contiguous() for k, v in part.network.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(folder / BARE, buffer.getvalue())
    return apart(part, lambda pair: again(folder, pair))


def apart(
    encoder: Encoder, again: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> float:
    """Largest difference between an encoder and what reads its export, on eight windows."""
    size = encoder.image_size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = again({"input": images})["output"]
    with torch.inference_mode():
        return float((found - encoder.cpu().eval()(images)).abs().max())


@torch.inference_mode()
def again(
    folder: Path, pair: dict[str, torch.Tensor], facts: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """What timm makes of the input of a pair, from the folder alone."""
    import timm

    model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    return {"output": model(pair["input"])}


def crop_encoder(encoder: FrozenEncoder, card: dict[str, Any]) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of windows and its card: of a MUSE network, its ViT or ResNet and a note."""
    if isinstance(encoder, DenseEncoder):
        return image_encoder(encoder), {"Note": NOTE, **card}
    assert isinstance(encoder, Encoder)
    return encoder, card


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
