"""The file of a manifest: its columns, read and written."""

import csv
import io
from pathlib import Path

from lemon_muse.errors import UserError

COLUMNS = (
    "slide", "path", "width", "height", "levels", "mpp", "mpp_source", "file_mpp", "vendor",
    "patient", "organ", "scanner", "bytes", "mtime_ns", "checksum", "status", "reason",
)  # fmt: skip


def read_manifest(path: Path, *, status: str = "ok") -> list[dict[str, str]]:
    """Rows of a manifest with that status ('' for all), as strings; columns as in `COLUMNS`.

    Raises:
        UserError: the file is missing or is no manifest.
    """
    rows = read_csv(path)
    missing = {"slide", "path", "mpp", "status"} - set(rows[0] if rows else ())
    if missing:
        raise UserError(
            f"{path} is no manifest (no column {', '.join(sorted(missing))}); make one with "
            f"prep manifest data={path} out=… ."
        )
    return [row for row in rows if not status or row["status"] == status]


def older_rows(path: Path) -> dict[str, dict[str, str]]:
    """Rows of an older manifest by path; a file that is none is not overwritten."""
    if not path.is_file():
        return {}
    rows = read_csv(path)
    if rows and not set(COLUMNS) <= set(rows[0]):
        raise UserError(f"{path} is there and is no manifest; give another out= .")
    return {row["path"]: row for row in rows}


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a csv with a header, cells stripped."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [
                {k: (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a csv ({error}).") from None


def read_number(text: str | None, where: Path) -> float | None:
    """A number or, where the cell is empty, None."""
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: the mpp '{text}' is not a number.") from None


def as_csv(rows: list[dict[str, str]]) -> bytes:
    """A manifest as the bytes of its file."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
