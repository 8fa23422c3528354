"""Load YAML and ``a.b=value`` words into a typed, frozen model; nothing is accepted and ignored.

A job's settings are a pydantic model that stands beside the code it configures. Its defaults are
the recipe; a YAML file holds differences; words come last. Every mistake is one sentence
(`UserError`) that names the key, the allowed values and the nearest right name.
"""

import difflib
import inspect
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined

from lemon_muse.errors import UserError

ROOT = Path(__file__).resolve().parent
WORD = re.compile(r"[\w.-]+=")


class Config(BaseModel):
    """Base of every settings model: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def variant(cls, tree: dict[str, Any]) -> type["Config"]:
        """The model for these settings, where their kind depends on what they say."""
        return cls

    @classmethod
    def elsewhere(cls, key: str) -> str | None:
        """A clause on which other variant has this key, which the model has not."""
        return None


C = TypeVar("C", bound=Config)


NUMBERS = {
    "tag:yaml.org,2002:int": r"^(?:[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)"
    r"|[-+]?0x[0-9a-fA-F_]+)$",
    "tag:yaml.org,2002:float": r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+][0-9]+)?"
    r"|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
}


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans: PyYAML would read on, off, yes and no so."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:bool"]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 takes 7:08 for a number to the base of 60: here it is text, as in after=7:8.
_Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern if tag not in NUMBERS else re.compile(NUMBERS[tag], re.X))
        for tag, pattern in rules
    ]
    for letter, rules in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load(model: type[C], words: list[str]) -> C:
    """Build `model` from command-line words.

    Args:
        model: the settings model of the job.
        words: at most one YAML file name (first), then ``a.b=value`` words. Values are YAML.

    Raises:
        UserError: an unknown key, a value of the wrong kind, a file that is not there.
    """
    return validate(model, read(model, words))


def read(model: type[Config], words: list[str]) -> dict[str, Any]:
    """The words as nested dicts; arguments and errors as for `load`."""
    tree: dict[str, Any] = {}
    for position, word in enumerate(words):
        # The name of a YAML file may hold a '=', but a key is no path.
        if WORD.match(word) and not (position == 0 and Path(word).is_file()):
            key, text = word.split("=", 1)
            _put(tree, key, _read_value(key, text))
        elif position == 0 and word.endswith((".yaml", ".yml")):
            tree = _read_file(find(word))
        else:
            raise UserError(
                f"'{word}' is neither key=value nor a YAML file given first; write for example "
                f"{_example(model)}, or --help for all keys."
            )
    return tree


def validate(model: type[C], tree: dict[str, Any]) -> C:
    """Build `model`, or its variant for these settings, from nested dicts.

    Raises:
        UserError: a mistake, in one sentence.
    """
    chosen = model.variant(tree)
    try:
        return chosen.model_validate(tree)  # type: ignore[return-value]
    except ValidationError as error:
        raise UserError(_sentence(chosen, error)) from None


def find(name: str) -> Path:
    """Where a YAML file is: the working folder first, then the recipes shipped with the package."""
    given = Path(name)
    shipped = [ROOT / "configs", ROOT.parent / "configs"]
    for place in [given, *(folder / part for folder in shipped for part in (given, given.name))]:
        if place.is_file():
            return place
    known = sorted({str(p.relative_to(f)) for f in shipped for p in f.rglob("*.yaml")})
    raise UserError(
        f"there is no file '{name}'; the recipes that ship are: {', '.join(known) or 'none'}."
    )


def dump(config: Config) -> str:
    """The resolved settings as YAML that `load` takes back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def help_text(model: type[Config], prefix: str = "") -> str:
    """One line a field: name, type, default, comment; nested groups follow with dotted names."""
    lines: list[str] = []
    groups: list[str] = []
    for name, field in model.model_fields.items():
        nested = _models_in(field.annotation)
        if nested:
            default = field.get_default(call_default_factory=True)
            for option in nested:
                title = f"\n{prefix}{name}: {_first_line(option)}"
                if len(nested) > 1:
                    tag = "default" if isinstance(default, option) else "alternative"
                    title += f" ({tag})"
                rest = inspect.cleandoc(option.__doc__ or "").split("\n\n", 1)[1:]
                notes = textwrap.indent("\n".join(rest) + "\n", "  ") if rest else ""
                groups.append(f"{title}\n{notes}{help_text(option, f'{prefix}{name}.')}")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"default {_show(default)}"
        kind = _type_name(field.annotation)
        lines.append(
            f"  {prefix}{name:<{max(1, 26 - len(prefix))}} {field.description or ''} "
            f"[{kind}; {shown}]"
        )
    return "\n".join(lines + groups)


def flat_keys(model: type[Config], prefix: str = "") -> list[str]:
    """Every dotted key that `model` takes."""
    keys = []
    for name, field in model.model_fields.items():
        nested = _models_in(field.annotation)
        keys += [key for option in nested for key in flat_keys(option, f"{prefix}{name}.")]
        if not nested:
            keys.append(prefix + name)
    return list(dict.fromkeys(keys))


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *groups, leaf = key.split(".")
    for group in groups:
        child = tree.setdefault(group, {})
        if not isinstance(child, dict):
            raise UserError(f"'{key}' goes below '{group}', but '{group}' already has a value.")
        tree = child
    if isinstance(value, dict) and isinstance(tree.get(leaf), dict):
        tree[leaf].update(value)
    else:
        tree[leaf] = value


def _read_value(key: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError:
        raise UserError(f"the value of '{key}' cannot be read: {text!r}; quote it.") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(error).replace("\n", " ")
        raise UserError(f"{path} is not readable YAML: {where}.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold 'key: value' lines.")
    return tree


def _sentence(model: type[Config], error: ValidationError) -> str:
    """The first mistake, as one sentence."""
    first = error.errors()[0]
    parts = [str(p) for p in first["loc"]]
    known = flat_keys(model)
    key = ".".join(parts)
    # pydantic puts the tag of a union into the location: method.moco_v3.lr -> method.lr
    if key not in known and len(parts) > 2:
        key = ".".join(p for i, p in enumerate(parts) if i != len(parts) - 2)
    if first["type"] == "extra_forbidden":
        if other := model.elsewhere(key):
            return f"unknown key '{key}': {other}."
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else f"; the keys are: {', '.join(known)}."
        return f"unknown key '{key}'{hint}"
    if first["type"] == "missing":
        return f"'{key}' is required: give {key}=… ."
    if first["type"] == "value_error" and not parts:
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tags = first.get("ctx", {}).get("expected_tags", "")
        return f"'{key}.name' must be one of {tags}."
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(first["loc"][-1], int):  # an item of a list: the key is that of the list
        key = ".".join(parts[:-1])
    return f"'{key}' is {first['input']!r}: {message.removesuffix('.')}."


def _example(model: type[Config]) -> str:
    leaf = next((k for k in flat_keys(model) if "." not in k), "key")
    return f"{leaf}=VALUE"


def _models_in(annotation: Any) -> list[type[Config]]:
    """The settings models inside an annotation (a model, an Optional one, a union of them)."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return [m for arg in typing.get_args(annotation) for m in _models_in(arg)]
    return []


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(a) for a in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(a) for a in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is not None:
        inner = ", ".join(_type_name(a) for a in typing.get_args(annotation) if a is not Ellipsis)
        return f"{origin.__name__} of {inner}"
    if annotation is type(None):
        return "none"
    return getattr(annotation, "__name__", str(annotation)).lower()


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if str(value) else "empty"


def _first_line(model: type[Config]) -> str:
    return (model.__doc__ or "").strip().split("\n")[0]
