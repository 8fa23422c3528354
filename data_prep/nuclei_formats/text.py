"""Detection files as text: unpacked, parsed, and every damage turned into one sentence."""

import gc
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lemon_muse.errors import UserError

AGAIN = "copy it again, or run the detector again on that slide"


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """The unpacked content of a plain, .gz or .snappy file; its first `limit` bytes if >= 0.

    CellViT's .snappy is raw snappy (no frames), which cannot be cut: it is unpacked whole.

    Raises:
        UserError: the file is missing, cut off or damaged.
    """
    try:
        if path.suffix == ".snappy":
            import cramjam

            unpacked = bytes(cramjam.snappy.decompress_raw(path.read_bytes()))
            return unpacked if limit < 0 else unpacked[:limit]
        if path.suffix == ".gz" and path.stat().st_size:
            with gzip.open(path) as packed:
                return packed.read(limit)
        with path.open("rb") as plain:
            return plain.read(limit)
    except FileNotFoundError:
        raise UserError(f"there is no detection file {path}; check detections=.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); {AGAIN}.") from None
    except Exception as error:
        # cramjam's DecompressionError has no public base class of its own.
        if type(error).__name__ != "DecompressionError":
            raise
        raise UserError(f"{path} is cut off or damaged ({error}); {AGAIN}.") from None


def read_json(path: Path) -> Any:
    """The JSON value of a file.

    Raises:
        UserError: as `read_bytes`; the file is empty or is no JSON.
    """
    content = read_bytes(path)
    if not content.strip():
        raise UserError(f"{path} is empty; {AGAIN}.")
    return parse(path, content)


def parse(path: Path, content: bytes) -> Any:
    """JSON of bytes that came from `path`, with its mistakes as `UserError`."""
    with no_collector():
        try:
            return json.loads(content)
        except ValueError as error:
            raise UserError(f"{path} is not complete, readable JSON ({error}); {AGAIN}.") from None


@contextmanager
def no_collector() -> Iterator[None]:
    """Python's cycle collector rests: JSON has no cycles.

    With it, millions of small lists are walked through again and again: 2.5 to 4 times slower.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def misread(path: Path, tool: str, error: Exception) -> UserError:
    """The sentence for a file that is JSON but not what its tool writes."""
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    return UserError(
        f"{path} is not what {tool} writes ({what}); give the file as the tool wrote it, or name "
        f"its format with format=."
    )
