"""Write the report: pictures first, the page last, each under a temporary name."""

import json
import re
from pathlib import Path
from typing import Any

from eval.report.style import Picture
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

PAGE, NUMBERS = "report.html", "report.json"
_OWN_PICTURE = re.compile(r"[a-z0-9-]+\.png")


def write(out: Path, text: str, drawn: list[Picture], numbers: dict[str, Any]) -> None:
    """Write page, `report.json` and PNGs; an older report's further pictures are removed."""
    names = [f"{picture.name}.png" for picture in drawn]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out={out} is a file; give the name of a folder.") from None
    for old in _old_pictures(out):
        if old not in names:
            (out / old).unlink(missing_ok=True)
    for picture, name in zip(drawn, names, strict=True):
        write_atomic(out / name, picture.png)
    numbers = {**numbers, "pictures": names}
    body = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(out / NUMBERS, body.encode())
    write_atomic(out / PAGE, text.encode())


def _old_pictures(out: Path) -> list[str]:
    try:
        names = json.loads((out / NUMBERS).read_text(encoding="utf-8"))["pictures"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [n for n in names if isinstance(n, str) and _OWN_PICTURE.fullmatch(n)]
