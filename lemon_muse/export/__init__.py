"""Write a pretrained encoder in the form that its users load; one file per target format."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemon_muse.errors import UserError

if TYPE_CHECKING:
    import torch

    from lemon_muse.frozen import FrozenEncoder

Writer = Callable[["FrozenEncoder", Path, dict[str, Any]], float]
Tensors = dict[str, "torch.Tensor"]
Reader = Callable[[Path, Tensors, dict[str, Any]], Tensors]


def _late(where: str) -> Callable[..., Any]:
    """A function of a module of this package, imported when it is called: 'module:function'."""
    module, name = where.split(":")

    def call(*given: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(*given)

    return call


# format: write(encoder, folder, card) -> largest difference to the source's features
FORMATS: dict[str, Writer] = {
    "timm": _late("timm:write"),
    "hf": _late("hf:write"),
    "pt2": _late("pt2:write"),
    "onnx": _late("onnx:write"),
    "muse": _late("muse:write"),
    "lemon": _late("lemon:write"),
    "cellvit": _late("cellvit:write"),
}
# format: again(folder, check pair, facts) -> outputs of the pair, anew from the exported files
READERS: dict[str, Reader] = {
    "timm": _late("timm:again"),
    "hf": _late("hf:again"),
    "pt2": _late("pt2:again"),
    "onnx": _late("onnx:again"),
    "muse": _late("verify:again_muse"),
    "lemon": _late("verify:again_lemon"),
    "cellvit": _late("verify:again_cellvit"),
}


# What holds a network of two windows: the formats that store the program, not the architecture.
PROGRAMS = ("pt2", "onnx")


def check_format(encoder: "FrozenEncoder", form: str) -> None:
    """Refuse a format whose readers cannot build the encoder's network.

    Raises:
        UserError: an encoder of two windows in a format that names an architecture.
    """
    if encoder.kind == "two_windows" and form not in PROGRAMS:
        raise UserError(
            f"format={form} cannot hold {encoder.name}: its network sees two windows "
            f"(backbone.inner), which only lemon_muse builds; use format=pt2 or format=onnx, or "
            f"the encoder's own folder."
        )


def optional(package: str, what: str, extra: str = "interop") -> Any:
    """A package that not every user has.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{what} needs the extra '{extra}': pip install lemon-muse[{extra}]"
        ) from None
