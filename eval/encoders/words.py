"""The form of the words that name encoders: PREFIX:NAME[,argument=value…]."""

from typing import Any

from lemon_muse.errors import UserError


def parse(word: str, prefix: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a word; values are YAML: 12, 0.5, true, text.

    Raises:
        UserError: a part that is no argument=value, or a value that is no YAML.
    """
    import yaml

    name, *parts = word.removeprefix(prefix).split(",")
    arguments: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"encoder='{word}': '{part}' is no argument=value.")
        try:
            arguments[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"encoder='{word}': the value of '{key}' cannot be read.") from None
    return name.strip(), arguments


def first_line(error: BaseException, limit: int = 200) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    return " ".join(lines[:2])[:limit].rstrip(".") or type(error).__name__
