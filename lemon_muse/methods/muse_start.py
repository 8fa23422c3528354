"""Start MUSE from weights that are there: a run, an encoder folder, or a released file.

The large field of view (512/208) goes on from a run at 224/96: everything is taken over, and the
position table is resampled to the new size (as MUSE's models at 512 have tables of 32 × 32).
"""

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lemon_muse import checkpoint
from lemon_muse.backbones.muse import (
    MuseBackbone,
    MuseNet,
    ViTTaps,
    build_muse,
    resize_positions,
)
from lemon_muse.errors import UserError

if TYPE_CHECKING:
    from lemon_muse.methods.muse import Muse

log = logging.getLogger(__name__)


def start_from(method: "Muse", source: Path) -> None:
    """Load weights into student and teacher, and heads and centres where the source has them.

    Args:
        method: freshly built.
        source: a run folder with checkpoints, an encoder folder, or a released `.pth`.

    Raises:
        UserError: nothing of that kind is there, or it is another network.
    """
    found = checkpoint.load_newest(source / "checkpoints") if source.is_dir() else None
    ours: Any = method.student["backbone"]
    if found is not None:
        _same_heads(ours, _of_run(found[1], source), source)
        _load(method, found[1]["method"], source, leading=_leading(ours))
        return
    network = _network(source)
    _same_heads(ours, network, source)
    for who in ("student", "teacher"):
        net: Any = getattr(method, who)["backbone"]
        _load(net, network.state_dict(), source, leading=_leading(ours))
    log.warning("%s has no heads: they start at random", source)


def _network(source: Path) -> Any:
    """The network of an encoder folder or a released file."""
    if source.is_file():
        from lemon_muse.backbones.muse_weights import from_released

        return from_released(source)
    from lemon_muse.encoder import load

    network = load(source).network
    if not hasattr(network, "decoder"):
        raise UserError(f"{source} holds a crop encoder; MUSE needs an encoder with its decoder.")
    return network


def _of_run(state: dict[str, Any], source: Path) -> MuseNet:
    """The network of a run, without its weights."""
    config = json.loads(state["config"])
    name = config["method"]["name"]
    if name != "muse":
        raise UserError(f"init={source} is a run of {name}; MUSE starts from a run of muse.")
    with torch.device("meta"):
        return build_muse(MuseBackbone(**config["backbone"]), seed=0)


def _same_heads(ours: MuseNet, theirs: MuseNet, source: Path) -> None:
    """No tensor's shape tells the number of attention heads: another one is another network."""
    have, want = (
        net.encoder.encoder.blocks[0].attn.num_heads if isinstance(net.encoder, ViTTaps) else None
        for net in (ours, theirs)
    )
    if have != want and None not in (have, want):
        raise UserError(
            f"init={source} was trained with {want} attention heads, not {have}; set "
            f"backbone.heads={want}."
        )


def _leading(net: MuseNet) -> int:
    """Rows of the position table before those of the patches."""
    if not isinstance(net.encoder, ViTTaps):
        return 0
    vit = net.encoder.encoder
    return 0 if vit.no_embed_class else int(vit.num_prefix_tokens)


def _load(
    module: torch.nn.Module, theirs: dict[str, torch.Tensor], source: Path, *, leading: int
) -> None:
    ours, state = module.state_dict(), {}
    for key, value in theirs.items():
        wanted = ours.get(key)
        if wanted is not None and key.endswith("pos_embed") and value.shape != wanted.shape:
            value = _positions(value, wanted, leading)
        state[key] = value
    wrong = [k for k, v in state.items() if k not in ours or ours[k].shape != v.shape]
    lacking = sorted(ours.keys() - state.keys())
    if wrong or lacking:
        first = (wrong or lacking)[0]
        raise UserError(
            f"init={source} holds another network: {first} does not fit; give the backbone and "
            f"the heads that it was trained with."
        )
    module.load_state_dict(state)


def _positions(table: torch.Tensor, wanted: torch.Tensor, leading: int) -> torch.Tensor:
    """A table [1, leading + n * n, D] for another number of patches; leading rows stay."""
    old, new = (math.isqrt(t.shape[1] - leading) for t in (table, wanted))
    if old**2 + leading != table.shape[1]:
        return table  # of another network: `_load` says so
    moved = resize_positions(table[:, leading:], (old, old), (new, new))
    return torch.cat([table[:, :leading], moved], 1)
