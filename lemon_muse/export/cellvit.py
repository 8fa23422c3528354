"""cellvit: encoder weights for CellViT and CellViT++.

A ViT-S/16 with 6 heads becomes `cellvit256.pth`, which their CellViT256 loads unchanged
(`pretrained_encoder`). A ViT-B/16, or a ViT-S/16 with 12 heads, goes into their generic CellViT
(backbone `default`), which loads whole models only: `cellvit_encoder.pth` and `full_state`.
Source: models/segmentation/cell_segmentation/cellvit.py and experiment_cellvit_pannuke.py of
TIO-IKIM/CellViT.
"""

import copy
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import save
from timm.models import VisionTransformer
from torch import nn

from lemon_muse import __version__
from lemon_muse.backbones.muse import resize_positions
from lemon_muse.data.files import write_atomic
from lemon_muse.dense import DenseEncoder
from lemon_muse.errors import RunError, UserError
from lemon_muse.export.cellvit_rules import DEPTH, PATCH, ROUTES, expected, vit_of
from lemon_muse.frozen import FrozenEncoder

FILES = {"ViT256": "cellvit256.pth", "default": "cellvit_encoder.pth"}
FACTS, PAIR = "cellvit.json", "check.safetensors"
SIZE = 224
GRID = (SIZE // PATCH, SIZE // PATCH)
LAYERS = [3, 6, 9, 12]
# Names of the encoder inside the generic class.
PREFIX = "encoder."
ARCHITECTURES = {384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}
# Of the largest value of the tokens.
SAME = 1e-4


def write(encoder: FrozenEncoder, folder: Path, card: dict[str, Any]) -> float:
    """Write the weights, facts, a reference pair and a card; return the largest difference.

    Compared are all tokens after the final norm at 224 px, float32, with the source's. Of a MUSE
    network the encoder alone is written.

    Raises:
        UserError: CellViT cannot hold the encoder, or the folder holds the other kind of file.
        RunError: weights that are not finite, or another function than the source's.
    """
    vit = vit_of(encoder)
    heads = int(cast(Any, vit.blocks[0]).attn.num_heads)
    route = ROUTES[(vit.embed_dim, heads)]
    for other in set(FILES.values()) - {FILES[route]}:
        if (folder / other).exists():
            raise UserError(f"{folder} holds {other} of another encoder; give an empty folder.")
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    vit, wanted, resampled = _at_224(encoder, vit, images)
    state = {
        key: value.detach().float().cpu().contiguous().clone()
        for key, value in vit.state_dict().items()
    }
    _check_state(state, vit.embed_dim)
    buffer = io.BytesIO()
    torch.save(_wrapped(state, route), buffer)
    again = _read(buffer.getvalue(), route, width=vit.embed_dim, heads=heads)
    apart = float((_tokens(again, images) - wanted).abs().max())
    if not apart < SAME * max(1.0, float(wanted.abs().max())):
        raise RunError(
            f"CellViT would not compute what {encoder.name} does (tokens differ by {apart:.2g}); "
            f"nothing was written."
        )
    facts = _facts(encoder, route, width=vit.embed_dim, heads=heads, resampled=resampled)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILES[route], buffer.getvalue())
    write_atomic(folder / PAIR, save({"input": images, "tokens": wanted.contiguous()}))
    write_atomic(folder / FACTS, json.dumps(facts, indent=2).encode())
    write_atomic(folder / "README.md", _card(encoder, facts, card).encode())
    return apart


def full_state(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of a generic CellViT with our encoder in it, to be saved as `pretrained`.

    Args:
        model: CellViT's own class, built with the settings of the card; its decoder and tissue
            head are kept as they are.
        folder: what `format=cellvit` wrote.

    Returns:
        Every tensor of `model.state_dict()`, those of the encoder replaced; `strict=True` loads it.

    Raises:
        UserError: the folder is of another kind, or the model is built otherwise than the encoder.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        settings, name = facts["model"], facts["file"]
        stored = torch.load(folder / name, map_location="cpu", weights_only=True)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, EOFError) as error:
        first = str(error).split("\n")[0]
        raise UserError(
            f"{folder} is not what format=cellvit writes ({first}); export the encoder again."
        ) from None
    encoder = (
        {f"{PREFIX}{key}": value for key, value in stored["teacher"].items()}
        if ("teacher" in stored)
        else stored
    )
    # Heads and taps leave no trace in the shapes of the weights.
    for key, value in settings.items():
        built = getattr(model, key, value)
        if (list(built) if isinstance(value, list) else built) != value:
            raise UserError(
                f"the CellViT was built with {key}={built}, and the encoder in {folder} needs "
                f"{key}={value}; build it with the settings of the card."
            )
    state = model.state_dict()
    for key, value in encoder.items():
        if key not in state or state[key].shape != value.shape:
            has = tuple(state[key].shape) if key in state else "no such tensor"
            raise UserError(
                f"{key} is {tuple(value.shape)} in {folder}, and the model has {has}; build "
                f"CellViT with the settings of the card."
            )
    return {**state, **encoder}


@torch.inference_mode()
def _at_224(
    encoder: FrozenEncoder, vit: VisionTransformer, images: torch.Tensor
) -> tuple[VisionTransformer, torch.Tensor, bool]:
    """The encoder for images of 224 px.

    Returns:
        A float32 copy with 14 x 14 positions; the source's tokens of the images; whether positions
        were resampled: of a MUSE network as it does itself at 224 px, of others as timm does.
    """
    moved = tuple(vit.patch_embed.grid_size) != GRID
    crop: Any = copy.deepcopy(vit).cpu().float().eval()
    if not isinstance(encoder, DenseEncoder):
        if moved:
            crop.set_input_size(img_size=(SIZE, SIZE))
        return crop, _tokens(crop, images), moved
    taps: Any = copy.copy(encoder.network.encoder)
    taps._modules = {**taps._modules, "encoder": crop}
    cls, maps = taps(images)
    wanted = torch.cat([cls[:, None], maps[-1].flatten(2).transpose(1, 2)], 1)
    if moved:
        old = tuple(crop.patch_embed.grid_size)
        patches = resize_positions(crop.pos_embed[:, 1:], old, GRID, offset=taps.offset)
        table = torch.cat([crop.pos_embed[:, :1], patches], 1)
        crop.pos_embed = nn.Parameter(table, requires_grad=False)
    return crop, wanted, moved


@torch.inference_mode()
def _tokens(network: Any, images: torch.Tensor) -> torch.Tensor:
    """All tokens after the final norm, float [B, 197, D], class token first."""
    return network.forward_features(images)


def _check_state(state: Mapping[str, torch.Tensor], width: int) -> None:
    """Exactly the tensors of CellViT's ViT, all finite."""
    wanted = expected(width)
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != wanted:
        odd = sorted({*found.items()} ^ {*wanted.items()})[:3]
        raise UserError(
            f"CellViT cannot hold the encoder: its tensors are not those of CellViT's ViT "
            f"({', '.join(f'{key} {shape}' for key, shape in odd)}); use format=timm instead."
        )
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise RunError(f"the encoder has non-finite weights in {bad[0]}; it is not written.")


def _wrapped(state: dict[str, torch.Tensor], route: str) -> dict[str, Any]:
    if route == "ViT256":
        return {"teacher": state}
    return {f"{PREFIX}{key}": value for key, value in state.items()}


def _read(payload: bytes, route: str, *, width: int, heads: int) -> nn.Module:
    """A plain timm ViT with the weights of the file."""
    stored = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    state = (
        stored["teacher"]
        if route == "ViT256"
        else {key.removeprefix(PREFIX): value for key, value in stored.items()}
    )
    # On no device, so that no time goes into random weights.
    with torch.device("meta"):
        plain = timm.create_model(ARCHITECTURES[width], num_classes=0, num_heads=heads)
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def _facts(
    encoder: FrozenEncoder, route: str, *, width: int, heads: int, resampled: bool
) -> dict[str, Any]:
    return {
        "format": "cellvit",
        "file": FILES[route],
        "backbone": route,
        "model": {
            "embed_dim": width,
            "depth": DEPTH,
            "num_heads": heads,
            "extract_layers": LAYERS,
            "mlp_ratio": 4,
            "qkv_bias": True,
        },
        "normalize": {"mean": list(encoder.mean), "std": list(encoder.std)},
        "mpp": encoder.mpp,
        "window": encoder.image_size,
        "positions_resampled": resampled,
        "source": {"name": encoder.name, "content_hash": encoder.content_hash},
        "version": __version__,
    }


def _card(encoder: FrozenEncoder, facts: dict[str, Any], card: dict[str, Any]) -> str:
    """The model card, with the lines that CellViT's configuration needs."""
    model = facts["model"]
    if facts["backbone"] == "ViT256":
        own = ["  backbone: ViT256", f"  pretrained_encoder: {facts['file']}"]
        say = f"CellViT256 and CellViT++ load `{facts['file']}` as they are."
    else:
        keys = ("embed_dim", "depth", "num_heads", "extract_layers")
        own = ["  backbone: default", *(f"  {key}: {model[key]}" for key in keys)]
        own += ["  input_channels: 3", "  pretrained: cellvit_full.pth"]
        say = (
            f"`{facts['file']}` holds the encoder alone. The generic CellViT loads whole models: "
            f"make `cellvit_full.pth` with `lemon_muse.export.cellvit.full_state` "
            f"(docs/use/cellvit.md)."
        )
    mean, std = facts["normalize"]["mean"], facts["normalize"]["std"]
    digest = facts["source"]["content_hash"]
    note = (
        f"Positions were resampled to 14 × 14 tokens; the encoder has learnt on windows of "
        f"{facts['window']} px, so take it as a start for training, not as a finished network."
        if facts["positions_resampled"]
        else "Positions are the encoder's own, 14 × 14 tokens."
    )
    lines = [
        "---",
        "tags: [pathology, histology, nucleus, self-supervised, cellvit]",
        "---",
        f"# {encoder.name} for CellViT",
        "",
        "A nucleus encoder for H&E, pretrained without labels by lemon_muse, in the layout of "
        "CellViT's encoder.",
        "",
        f"- pretrained at {encoder.mpp} µm/px on windows of {encoder.image_size} px",
        f"- width {model['embed_dim']}, {DEPTH} blocks, **{model['num_heads']} heads**, patch 16",
        f"- source: content hash {digest}; written by lemon_muse {__version__}",
        f"- `{PAIR}`: `input` [1, 3, 224, 224], normalised, and `tokens` [1, 197, "
        f"{model['embed_dim']}] after the final norm",
        "",
        f"{say} {note}",
        "",
        "**CellViT normalises with 0.5 unless told otherwise. Its configuration needs:**",
        "",
        "```yaml",
        "model:",
        *own,
        "transformations:",
        "  normalize:",
        f"    mean: {mean}",
        f"    std: {std}",
        "```",
        "",
    ]
    for title, body in card.items():
        text = body if isinstance(body, str) else f"```json\n{json.dumps(body, indent=1)}\n```"
        lines += [f"## {title}", "", text, ""]
    return "\n".join(lines)
