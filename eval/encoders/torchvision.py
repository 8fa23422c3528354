"""Classifiers of torchvision (ResNet-50 and its sisters) without their last layer."""

from pathlib import Path
from typing import Any

from torch import nn

from eval.encoders.foreign import ForeignEncoder
from eval.encoders.words import first_line, parse
from lemon_muse.dense import IMAGENET
from lemon_muse.errors import UserError

PREFIX = "torchvision:"
SIZE = 224
CLASSES = 1000


def from_word(word: str, *, mpp: float | None, random: bool = False) -> ForeignEncoder:
    """The model of 'torchvision:NAME[,weights=FILE|NAME][,image_size=N]'.

    Args:
        word: `weights` is a file with a state dict, whose classifier is left out where it has one,
            or a name of torchvision's, as IMAGENET1K_V2, which it downloads unless it has it; its
            newest by default. `image_size` is the side of the window, 224 px by default.
            Normalised as ImageNet; a file that wants another is opened by a python: function.
        mpp: of the windows that it will see, µm/px; needed.
        random: the weights do not matter and none are loaded.

    Raises:
        UserError: no mpp, an unknown name, weights that do not fit or cannot be fetched.
    """
    name, arguments = parse(word, PREFIX)
    given = str(arguments.pop("weights", "DEFAULT"))
    size = arguments.pop("image_size", SIZE)
    if arguments or not isinstance(size, int) or size < 1:
        wrong = next(iter(arguments), f"image_size={size}")
        raise UserError(
            f"encoder='{word}': '{wrong}' is not known; use weights=FILE or weights=NAME, and "
            f"image_size=PIXELS."
        )
    _known(name, word)
    if mpp is None:
        raise UserError(
            f"{name} of torchvision saw no slides: it does not say its µm per pixel; add mpp=0.5 "
            f"(or what you want it to see)."
        )
    published = None if Path(given).is_file() else _published(name, given, word)
    network, head = _headless(name, None if random else published, word)
    if not random and published is None:
        _load(network, head, given)
    tag = Path(given).stem if published is None else published.name.lower()
    return ForeignEncoder(
        network,
        origin={"library": "torchvision", "architecture": name},
        image_size=size,
        mpp=mpp,
        mean=tuple(published.transforms().mean) if published else IMAGENET[0],
        std=tuple(published.transforms().std) if published else IMAGENET[1],
        name=f"{name}.{tag}",
        build=lambda: _headless(name, None, word)[0],
    )


def _known(name: str, word: str) -> None:
    import difflib

    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
        hint = f"; near names: {', '.join(near)}." if near else "."
        raise UserError(f"encoder='{word}': torchvision has no classifier '{name}'{hint}")


def _published(name: str, given: str, word: str) -> Any:
    """torchvision's own weights of that name."""
    from torchvision.models import get_model_weights

    table = get_model_weights(name)
    if given not in table.__members__:
        raise UserError(
            f"encoder='{word}': '{given}' is neither a file nor weights of torchvision for {name} "
            f"({', '.join(table.__members__)})."
        )
    return table[given]


def _headless(name: str, weights: Any, word: str) -> tuple[nn.Module, str]:
    """The network with its last linear layer taken off, and the name of that layer."""
    from torchvision.models import get_model

    try:
        network = get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:
        where = f" (from {weights.url})" if weights is not None else ""
        raise UserError(
            f"encoder='{word}': the weights cannot be fetched ({first_line(error)}); without "
            f"network access give a file{where} as weights=FILE."
        ) from None
    last = [
        key
        for key, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == CLASSES
    ]
    if len(last) != 1:
        raise UserError(
            f"encoder='{word}': {name} has {len(last)} classifiers instead of one; use a ResNet, "
            f"or a python: function."
        )
    parent, _, leaf = last[0].rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return network, last[0]


def _load(network: nn.Module, head: str, file: str) -> None:
    """Weights of a file; the classifier is left out, all else must match."""
    from timm.models import load_state_dict

    try:
        state = load_state_dict(file, use_ema=False)
        kept = {k: v for k, v in state.items() if not k.startswith(f"{head}.")}
        network.load_state_dict(kept)
    except Exception as error:  # torch.load and load_state_dict raise many kinds
        raise UserError(
            f"weights={file} cannot be loaded ({first_line(error)}); it must be a state dict of "
            f"the same network of torchvision."
        ) from None
