"""Start MUSE from weights that are there: a run, an encoder folder, or a released file.

The large field of view (512/208) goes on from a run at 224/96: everything is taken over, and the
position table is resampled to the new size (as MUSE's models at 512 have tables of 32 × 32).
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lemon_muse import checkpoint
from lemon_muse.backbones.muse import resize_positions
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
    if found is not None:
        _load(method, method.state_dict(), found[1]["method"], source)
        return
    network = _network(source)
    for who in ("student", "teacher"):
        net: Any = getattr(method, who)["backbone"]
        _load(net, net.state_dict(), network.state_dict(), source)
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


def _load(
    module: torch.nn.Module,
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    source: Path,
) -> None:
    state = {}
    for key, value in theirs.items():
        wanted = ours.get(key)
        if wanted is not None and key.endswith("pos_embed") and value.shape != wanted.shape:
            value = _positions(value, wanted)
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


def _positions(table: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """A position table [1, 1 + n * n, D] for another number of patches; the class token stays."""
    old, new = (round((t.shape[1] - 1) ** 0.5) for t in (table, wanted))
    moved = resize_positions(table[:, 1:], (old, old), (new, new))
    return torch.cat([table[:, :1], moved], 1)
