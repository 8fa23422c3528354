"""Any timm model, from a name with a checkpoint or from a folder."""

import json
from pathlib import Path
from typing import Any

from eval.encoders.words import first_line, parse
from lemon_muse.encoder import Encoder
from lemon_muse.errors import UserError

PREFIX = "timm:"
HUB = ("hf-hub:", "hf_hub:")


def is_timm_folder(path: Path) -> bool:
    """Whether a folder holds a timm model without the facts that lemon_muse adds."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" in config and "lemon_muse" not in config


def from_folder(path: Path, *, mpp: float | None) -> Encoder:
    """The model of a timm folder.

    Args:
        mpp: of the windows that it will see, µm/px; a timm folder does not say.

    Raises:
        UserError: no mpp, or timm cannot open it.
    """
    import timm

    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    arguments = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
    try:
        network = timm.create_model(f"local-dir:{path.resolve()}", pretrained=True, num_classes=0)
    except Exception as error:  # timm and what it calls raise many kinds
        raise _unusable(path, error) from None
    return _encoder(network, config["architecture"], arguments, name=path.resolve().name, mpp=mpp)


def from_word(word: str, *, mpp: float | None, random: bool = False) -> Encoder:
    """The model of 'timm:NAME[,checkpoint_path=FILE][,argument=value…]'.

    Args:
        word: without checkpoint_path the weights are timm's own, which it downloads; further
            arguments go to `timm.create_model` (values are YAML), as in num_heads=12.
        mpp: of the windows that it will see, µm/px; needed.
        random: the weights do not matter and none are loaded.

    Raises:
        UserError: no mpp, an unknown name, arguments or weights that do not fit.
    """
    import timm

    name, arguments = parse(word, PREFIX)
    file = arguments.pop("checkpoint_path", None)
    if name.startswith(HUB):
        raise UserError(
            f"encoder='{word}': models of the hub are opened by a python: function, or as the "
            f"folder that was downloaded (docs/encoders.md)."
        )
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f"; near names: {', '.join(near)}." if near else "."
        raise UserError(f"encoder='{word}': timm has no model '{name}'{hint}")
    try:
        network = timm.create_model(
            name, pretrained=file is None and not random, num_classes=0, **arguments
        )
        if file is not None and not random:
            _load(network, str(file))
    except UserError:
        raise
    except Exception as error:
        hint = "" if file else "; without network access add ',checkpoint_path=FILE'"
        raise _unusable(word, error, hint) from None
    return _encoder(network, name.split(".")[0], arguments, name=name, mpp=mpp)


def _load(network: Any, file: str) -> None:
    """Weights of a file; the classifier is left out, all else must match."""
    from timm.models import load_state_dict

    if not Path(file).is_file():
        raise UserError(f"checkpoint_path={file}: there is no such file.")
    state = load_state_dict(file, use_ema=False)
    if any(str(key).startswith("base_encoder.") for key in state):
        raise UserError(
            f"checkpoint_path={file} is a MoCo v3 or LEMON checkpoint, with other names and 12 "
            f"heads; use encoder={file}."
        )
    heads = (network.pretrained_cfg or {}).get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    # Names alone decide: a file that fits in part would give a number that means nothing.
    kept = {k: v for k, v in state.items() if not k.startswith(tuple(f"{h}." for h in heads))}
    network.load_state_dict(kept)


def _encoder(
    network: Any, architecture: str, arguments: dict[str, Any], *, name: str, mpp: float | None
) -> Encoder:
    if mpp is None:
        raise UserError(
            f"{name} is a timm model, which does not say its µm per pixel; add mpp=0.5 (or what it "
            f"was trained at)."
        )
    config = network.pretrained_cfg or {}
    patch = getattr(network, "patch_embed", None)
    stated = getattr(patch, "img_size", None) or config.get("input_size", (3, 224, 224))[1:]
    encoder = Encoder(
        network,
        architecture=architecture,
        arguments=arguments,
        image_size=int(stated[0]),
        mpp=mpp,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        name=name,
    )
    encoder.eval().requires_grad_(False)
    return encoder


def _unusable(what: Path | str, error: Exception, hint: str = "") -> UserError:
    return UserError(f"encoder={what} cannot be opened by timm ({first_line(error)}){hint}.")
