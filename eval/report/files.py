"""Write the report: pictures first, the pages last, each under a temporary name."""

import json
import re
from pathlib import Path
from typing import Any

from eval.report.style import Picture
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

PAGE, NUMBERS = "report.html", "report.json"
# Files of the leaderboard, which a report may have or not.
FURTHER = ("leaderboard.csv", "leaderboard.tex", "leaderboard.html")
_OWN_PICTURE = re.compile(r"[a-z0-9-]+\.png")


def write(out: Path, pages: dict[str, str], drawn: list[Picture], numbers: dict[str, Any]) -> None:
    """Write pages, `report.json` and PNGs; what an older report had further is removed.

    Args:
        pages: file name (`PAGE` or one of `FURTHER`) to text.
    """
    names = [f"{picture.name}.png" for picture in drawn]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out={out} is a file; give the name of a folder.") from None
    for old in _old_files(out):
        if old not in names and old not in pages:
            (out / old).unlink(missing_ok=True)
    for picture, name in zip(drawn, names, strict=True):
        write_atomic(out / name, picture.png)
    numbers = {**numbers, "pictures": names, "pages": list(pages)}
    body = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(out / NUMBERS, body.encode())
    for name, text in pages.items():
        write_atomic(out / name, text.encode())


def _old_files(out: Path) -> list[str]:
    """What an older `report.json` says that it wrote, as far as a report may have written it."""
    try:
        said = json.loads((out / NUMBERS).read_text(encoding="utf-8"))
        names = [*said["pictures"], *said.get("pages", [])]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    own = [n for n in names if isinstance(n, str)]
    return [n for n in own if _OWN_PICTURE.fullmatch(n) or n in FURTHER]
