"""The released MUSE files (.pth), read and written.

A released file is what DINO's trainer saves: a dict whose `teacher` holds the network under
`module.backbone.` and the projection heads under other names. Nothing in it tells heads, patch or
image size apart from the shapes of the tensors; heads are width / 64.
Source: models/muse_vit.py, muse_r50.py of alibaba-damo-academy/MUSE (the loaders).
"""

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from lemon_muse.backbones.muse import (
    DINO_OFFSET,
    VITS,
    MuseBackbone,
    MuseNet,
    ResNetTaps,
    build_muse,
    resize_positions,
)
from lemon_muse.errors import UserError

PREFIX = "module.backbone."
POSITIONS = "encoder.encoder.pos_embed"
# Blocks in the four stages: what tells a ResNet-50 from its larger sisters.
RESNET50 = (3, 4, 6, 3)


def to_released(net: MuseNet) -> dict[str, dict[str, torch.Tensor]]:
    """The weights in the released layout, on the CPU: `torch.save` it and the MUSE code loads it.

    Raises:
        UserError: a network that the released code could not hold, or would compute differently.
    """
    settings = net.settings
    wrong = [
        f"{key}={getattr(settings, key)}"
        for key, released in (("decoder", "full"), ("norm", "batch"), ("convention", "released"))
        if getattr(settings, key) != released
    ]
    if isinstance(net.encoder, ResNetTaps):
        wrong += [] if settings.name == "resnet50" else [f"name={settings.name}"]
    else:
        heads = net.encoder.encoder.blocks[0].attn.num_heads
        wrong += [f"heads={heads} at width {net.dim}"] if heads != max(1, net.dim // 64) else []
    if wrong:
        raise UserError(
            f"the released MUSE code cannot hold this network ({', '.join(wrong)}); it knows "
            "decoder=full, norm=batch, convention=released, resnet50, and heads of 64 channels."
        )
    state = {PREFIX + key: value.detach().cpu() for key, value in net.state_dict().items()}
    return {"teacher": state}


def from_released(
    source: str | Path | dict[str, Any],
    *,
    pos_resample: bool = False,
    image: int | None = None,
    trust: bool = False,
) -> MuseNet:
    """The network of a released file, in evaluation mode, on the CPU.

    Args:
        source: the file, or what `torch.load` gave for it.
        pos_resample: what the released loader does to every ViT: positions are resampled once at
            load by (cells + 0.1) / cells, even to the size they have. Published scores include it.
        image: side, px, of the images that the position table is brought to; none = as stored.
        trust: read Python objects beside the tensors too. They can run code: only for files whose
            source you trust.

    Raises:
        UserError: no such file, not such a file, or keys and shapes that do not match.
    """
    name = "the checkpoint" if isinstance(source, dict) else str(source)
    stored = source if isinstance(source, dict) else _load(Path(source), trust)
    state = _backbone_of(stored, name)
    settings = _settings_of(state, name)
    side = image or settings.image
    if settings.name != "resnet50" and (pos_resample or side != settings.image):
        state = _with_positions(state, settings, side, DINO_OFFSET if pos_resample else 0.0)
        settings = settings.model_copy(update={"image": side})
    net = build_muse(settings, seed=0)
    _check(net.state_dict(), state, name)
    net.load_state_dict(state)
    return net.eval()


def _load(path: Path, trust: bool) -> Any:
    """What the file holds; nothing but tensors and plain values unless `trust`."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a MUSE checkpoint (.pth).")
    try:
        # DINO stores its arguments as a Namespace: a bag of attributes, harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked and not trust:
            raise UserError(
                f"{path} holds a Python object ({blocked[1]}) beside its tensors, and reading it "
                "could run code; if you trust where the file comes from, pass trust=True."
            ) from None
        raise UserError(f"{path} is not a file that torch.save wrote.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (RuntimeError, EOFError, ValueError):
        raise UserError(
            f"{path} is cut short or not a file that torch.save wrote; fetch it again."
        ) from None


def _backbone_of(stored: Any, name: str) -> dict[str, torch.Tensor]:
    """The tensors below the prefix, without it."""
    teacher = stored.get("teacher") if isinstance(stored, dict) else None
    if not isinstance(teacher, dict):
        raise UserError(f"{name} is not a MUSE checkpoint: it has no entry 'teacher'.")
    state = {
        key.removeprefix(PREFIX): value
        for key, value in teacher.items()
        if isinstance(key, str) and key.startswith(PREFIX) and isinstance(value, torch.Tensor)
    }
    if not state:
        raise UserError(
            f"{name} is not a MUSE checkpoint: no key of 'teacher' begins with '{PREFIX}'."
        )
    return state


def _settings_of(state: dict[str, torch.Tensor], name: str) -> MuseBackbone:
    """Architecture, width, depth, heads, patch and image size, from the shapes."""
    if "encoder.encoder.conv1.weight" in state:
        stages = tuple(_count(state, f"encoder.encoder.layer{i}.") for i in (1, 2, 3, 4))
        if stages != RESNET50:
            raise UserError(
                f"{name} holds a ResNet with {stages} blocks in its stages; only ResNet-50 has "
                f"{RESNET50} and can be loaded."
            )
        return MuseBackbone(name="resnet50")
    table, patch = state.get(POSITIONS), state.get("encoder.encoder.patch_embed.proj.weight")
    if table is None or patch is None or table.dim() != 3 or patch.dim() != 4:
        raise UserError(
            f"{name} holds neither a ViT ({POSITIONS}, encoder.encoder.patch_embed.proj.weight) "
            "nor a ResNet-50 (encoder.encoder.conv1.weight)."
        )
    cells = math.isqrt(table.shape[1] - 1)
    if cells**2 + 1 != table.shape[1]:
        raise UserError(f"{name}: the {table.shape[1]} positions are no square and a class token.")
    side, width = patch.shape[-1], table.shape[2]
    short = next((key for key, (_, dim) in VITS.items() if dim == width), "vit_small")
    depth = _count(state, "encoder.encoder.blocks.")
    args = {"embed_dim": width} if VITS[short][1] != width else {}
    args |= {"depth": depth} if depth != 12 else {}
    return MuseBackbone(name=short, patch=side, image=cells * side, args=args)


def _count(state: dict[str, torch.Tensor], prefix: str) -> int:
    """How many numbered blocks lie below a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def _with_positions(
    state: dict[str, torch.Tensor], settings: MuseBackbone, side: int, offset: float
) -> dict[str, torch.Tensor]:
    """The same weights with the position table resampled to images of `side` px."""
    patch = settings.patch or 16
    if side % patch:
        raise UserError(f"image={side} is not a multiple of the patch, {patch} px.")
    old, new = settings.image // patch, side // patch
    table = state[POSITIONS].float()
    moved = resize_positions(table[:, 1:], (old, old), (new, new), offset=offset)
    return {**state, POSITIONS: torch.cat([table[:, :1], moved], 1)}


def _check(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], name: str) -> None:
    """Every key there, with its shape, and none besides."""
    shapes = [
        f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    for what, names in (
        ("lacks", sorted(wanted.keys() - found.keys())),
        ("has unknown", sorted(found.keys() - wanted.keys())),
        ("has other shapes:", shapes),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(f"{name} {what} {', '.join(names[:5])}{more}.")
