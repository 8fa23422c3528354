"""lemon: the layout of the released LEMON files, `lemon.pth.tar` and `mean_std.json`.

The encoder lies under `module.base_encoder.` of `state_dict`, as MoCo v3's trainer names the query
encoder; window, µm/px and heads are not in the file but in the code that reads it, so only
encoders that have LEMON's are written. `lemon_muse.released` reads the same layout.
Source: the model card and vits.py of aliceblondel/LEMON on the Hugging Face hub.
"""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.models import VisionTransformer

from lemon_muse import __version__
from lemon_muse.data.files import write_atomic
from lemon_muse.encoder import Encoder
from lemon_muse.errors import RunError, UserError
from lemon_muse.export.cellvit_rules import odd_parts
from lemon_muse.frozen import FrozenEncoder
from lemon_muse.released import (
    LEMON_HEADS,
    LEMON_MPP,
    LEMON_PREFIX,
    LEMON_SIZE,
    LEMON_VITS,
    STATISTICS,
    open_released,
)

NAME, PAIR = "lemon.pth.tar", "check.safetensors"
# Of the largest value of the features.
SAME = 1e-4
# vits.py has functions for these only: width -> patch -> name.
FUNCTIONS = {384: {8: "vits8", 4: "vits4"}, 768: {8: "vitb8", 4: "vitb4"}}
DEPTH = 12


@torch.inference_mode()
def write(encoder: FrozenEncoder, folder: Path, card: dict[str, Any]) -> float:
    """Write both files and a card; return the largest difference of the features.

    The files are read again by `open_released` before they count as written.

    Raises:
        UserError: LEMON's code would not build this network.
        RunError: weights that are not finite, or another function than the source's.
    """
    function = _function(encoder)
    state = {
        f"{LEMON_PREFIX}{key}": value.detach().float().cpu().contiguous().clone()
        for key, value in encoder.network.state_dict().items()
    }
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise RunError(f"the encoder has non-finite weights in {bad[0]}; it is not written.")
    arch = next(name for width, name in LEMON_VITS.items() if width == encoder.dim)
    buffer = io.BytesIO()
    torch.save({"arch": arch, "state_dict": state}, buffer)
    statistics = json.dumps({"mean": list(encoder.mean), "std": list(encoder.std)}, indent=2)
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / NAME
        trial.write_bytes(buffer.getvalue())
        trial.with_name(STATISTICS).write_text(statistics)
        again = open_released(trial)
    given = encoder.check_pair()
    apart = float((again(given["input"]) - given["output"]).abs().max())
    if not apart < SAME * max(1.0, float(given["output"].abs().max())):
        raise RunError(
            f"LEMON's code would not compute what {encoder.name} does (features differ by "
            f"{apart:.2g}); nothing was written."
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Statistics first: weights beside none would be read with the published ones.
    write_atomic(folder / STATISTICS, statistics.encode())
    write_atomic(folder / PAIR, save(given))
    write_atomic(folder / NAME, buffer.getvalue())
    write_atomic(folder / "README.md", _card(encoder, function, card).encode())
    return apart


def _function(encoder: FrozenEncoder) -> str:
    """The function of LEMON's vits.py that builds the network.

    Raises:
        UserError: there is none.
    """
    vit = encoder.network
    if not isinstance(encoder, Encoder) or type(vit) is not VisionTransformer:
        raise UserError(
            f"LEMON's layout cannot hold {encoder.name}: it is for a ViT that gives one feature a "
            f"crop; use format={'timm' if isinstance(encoder, Encoder) else 'muse'} instead."
        )
    function = FUNCTIONS.get(encoder.dim, {}).get(encoder.patch_size or 0)
    wrong = [
        f"{what} {found} instead of {wanted}"
        for what, found, wanted in (
            ("window", encoder.image_size, LEMON_SIZE),
            ("µm/px", encoder.mpp, LEMON_MPP),
            ("heads", encoder.num_heads, LEMON_HEADS),
            ("blocks", len(vit.blocks), DEPTH),
            ("feature", encoder.feature, "token"),
        )
        if found != wanted
    ]
    if function is None:
        wrong.append(
            f"width {encoder.dim} with patch {encoder.patch_size} instead of 384 or 768 with 8 or 4"
        )
    wrong += odd_parts(vit)
    if wrong or function is None:
        raise UserError(
            f"LEMON's layout cannot hold {encoder.name}: {'; '.join(wrong)}; its readers would "
            f"build another network; use format=timm instead."
        )
    return function


def _card(encoder: FrozenEncoder, function: str, card: dict[str, Any]) -> str:
    lines = [
        "---",
        "tags: [pathology, histology, nucleus, self-supervised]",
        "---",
        f"# {encoder.name} in LEMON's layout",
        "",
        "A nucleus encoder for H&E, pretrained without labels by lemon_muse.",
        "",
        f"- input: RGB window of {encoder.image_size} × {encoder.image_size} px at {encoder.mpp} "
        f"µm/px around a nucleus; normalisation in `{STATISTICS}`: mean {list(encoder.mean)}, std "
        f"{list(encoder.std)}",
        f"- output: {encoder.dim} features (class token)",
        f"- network: `{function}(img_size={LEMON_SIZE}, num_classes=0)` of LEMON's vits.py, with "
        f"**{LEMON_HEADS} heads**; weights in `{NAME}` under `state_dict`, names under "
        f"`{LEMON_PREFIX}`",
        f"- content hash: {encoder.content_hash}; written by lemon_muse {__version__}",
        "",
        f"`lemon-muse eval encoder={NAME}` reads it; keep `{STATISTICS}` beside it.",
        "",
    ]
    for title, body in card.items():
        text = body if isinstance(body, str) else f"```json\n{json.dumps(body, indent=1)}\n```"
        lines += [f"## {title}", "", text, ""]
    return "\n".join(lines)
