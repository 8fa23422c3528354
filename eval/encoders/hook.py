"""Any network by a function of the user's: `python:module.function[,argument=value…]`.

For models whose weights are gated or whose code is a package of its own; docs/encoders.md has the
functions for the usual ones.
"""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from eval.encoders.foreign import ForeignEncoder
from eval.encoders.words import first_line, parse
from lemon_muse.errors import UserError
from lemon_muse.released import statistics

PREFIX = "python:"
NEEDED = ("network", "image_size", "mpp", "mean", "std")
OPTIONAL = ("name", "tokens")


def from_word(word: str) -> ForeignEncoder:
    """What the function of 'python:module.function[,argument=value…]' gives.

    The module is imported from the current folder or from what is installed. The function gives a
    dict, or an object with these attributes:

        network: nn.Module, float32 [B, 3, image_size, image_size], normalised -> float [B, D]
        image_size: px; mpp: µm per pixel; mean, std: of R, G, B in 0..1, three numbers each
        name: for tables, the function's by default
        tokens: (network, images) -> patch tokens float [B, rows * cols, D], for sampler=tokens

    The content hash covers the weights, the arguments and the text of the module's file.

    Raises:
        UserError: no such module or function, it raises, or gives something else.
    """
    target, arguments = parse(word, PREFIX)
    place, _, leaf = target.rpartition(".")
    if not place or not leaf:
        raise UserError(f"encoder='{word}': use python:MODULE.FUNCTION.")
    with _current_folder():
        module = _module(place, word)
        function = _function(module, leaf, word)
        try:
            given = function(**arguments)
        except Exception as error:  # whatever the user's code raises
            raise _failed(word, module, error) from error
    facts = _facts(given, word)
    return ForeignEncoder(
        facts["network"],
        origin={
            "library": target,
            "source": _source(module),
            **{f"argument {key}": repr(value) for key, value in sorted(arguments.items())},
        },
        image_size=facts["image_size"],
        mpp=facts["mpp"],
        mean=facts["mean"],
        std=facts["std"],
        name=str(facts["name"] or leaf),
        patch_tokens=facts["tokens"],
    )


@contextmanager
def _current_folder() -> Iterator[None]:
    """The current folder is searched for modules, as `python FILE` does it."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def _module(name: str, word: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"encoder='{word}': there is no module '{name}' in {Path.cwd()} or among the "
                f"installed packages."
            ) from None
        raise UserError(
            f"encoder='{word}': {name} needs '{error.name}', which is not installed."
        ) from None
    except Exception as error:  # whatever the user's code raises
        raise UserError(
            f"encoder='{word}': importing {name} raises {type(error).__name__} "
            f"({first_line(error)})."
        ) from error


def _function(module: ModuleType, name: str, word: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    ]
    raise UserError(
        f"encoder='{word}': {module.__name__} has no function '{name}'; it has "
        f"{', '.join(sorted(own)) or 'none'}."
    )


def _failed(word: str, module: ModuleType, error: Exception) -> UserError:
    """A sentence with the last line of the user's file that the error went through."""
    file = getattr(module, "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    where = f" in line {lines[-1]} of {file}" if lines else ""
    return UserError(
        f"encoder='{word}': the function raises {type(error).__name__}{where} "
        f"({first_line(error)})."
    )


def _facts(given: Any, word: str) -> dict[str, Any]:
    """What the function gave, each part checked."""
    keys = (*NEEDED, *OPTIONAL)
    if isinstance(given, dict):
        unknown = [str(key) for key in given if key not in keys]
        if unknown:
            raise UserError(
                f"encoder='{word}': the function gives '{unknown[0]}', which is not known; it may "
                f"give {', '.join(keys)}."
            )
        facts = {key: given.get(key) for key in keys}
    else:
        facts = {key: getattr(given, key, None) for key in keys}
    missing = [key for key in NEEDED if facts[key] is None]
    if missing:
        raise UserError(
            f"encoder='{word}': the function gives {type(given).__name__} without "
            f"{', '.join(missing)}; it must give a dict, or an object, with {', '.join(NEEDED)}."
        )
    size, mpp = facts["image_size"], facts["mpp"]
    for key, right, must in (
        ("network", isinstance(facts["network"], nn.Module), "be a torch.nn.Module"),
        ("image_size", type(size) is int and size > 0, "be a whole number of px above 0"),
        ("mpp", isinstance(mpp, int | float) and 0 < mpp < 100, "be µm per pixel, above 0"),
        ("tokens", facts["tokens"] is None or callable(facts["tokens"]), "be a function"),
    ):
        if not right:
            raise UserError(f"encoder='{word}': {key} must {must}, not {str(facts[key])[:80]!r}.")
    facts["mean"], facts["std"] = statistics(facts, f"encoder='{word}'")
    return facts


def _source(module: ModuleType) -> str:
    """Digest of the module's file: the same weights read by other code are another encoder."""
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
