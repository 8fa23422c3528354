"""Files of nucleus detectors, read into level-0 coordinates: one file a tool, one line here."""

import json
from collections.abc import Callable
from pathlib import Path

from data_prep.nuclei_formats import cellvit, histoplus, hoverfast, hovernet, qupath, tables
from data_prep.nuclei_formats.record import Nuclei, SlideFacts
from data_prep.nuclei_formats.text import AGAIN, no_collector, read_bytes, read_json
from lemon_muse.errors import UserError

__all__ = ["ENDINGS", "FORMATS", "Nuclei", "SlideFacts", "detect", "read"]

Reader = Callable[..., Nuclei]

FORMATS: dict[str, Reader] = {
    "hoverfast": hoverfast.read,
    "cellvit": cellvit.read,
    "hovernet": hovernet.read,
    "qupath": qupath.read,
    "histoplus": histoplus.read,
    "tables": tables.read,
}
# What a detection file's name may end in, the best first: outlines before points of one tool.
ENDINGS = (
    ".parquet",
    ".json",
    ".json.snappy",
    ".json.gz",
    ".geojson",
    ".geojson.snappy",
    ".geojson.gz",
    ".csv",
    ".tsv",
)
HEAD = 4096  # bytes in which most tools can be told


def read(path: Path, *, slide: SlideFacts, kind: str = "auto") -> Nuclei:
    """Nuclei of a detection file of any known tool.

    Args:
        path: the file.
        slide: facts of its slide.
        kind: a name of `FORMATS`, or 'auto'.

    Raises:
        UserError: the file is of no known kind, or what its reader says.
    """
    reader = FORMATS[detect(path) if kind == "auto" else kind]
    with no_collector():
        return reader(Path(path), slide=slide)


def detect(path: Path) -> str:
    """Which of `FORMATS` a file is, by its ending and content.

    Raises:
        UserError: the file is missing, damaged, empty or of no known kind.
    """
    path = Path(path)
    if path.suffix in (".csv", ".tsv", ".parquet"):
        return "tables"
    head = read_bytes(path, HEAD).lstrip()
    if not head and path.name.endswith(".json.gz"):
        return "hoverfast"  # it writes nothing where there is no nucleus
    if not head:
        raise UserError(f"{path} is empty; {AGAIN}.")
    return _by_list(path, head) if head.startswith(b"[") else _by_keys(path, head)


def _by_list(path: Path, head: bytes) -> str:
    """A bare list of Features: HoverFast's, CellViT's (one a class), or QuPath's."""
    if b'"nucleusGeometry"' in head:
        return "qupath"
    if path.name.endswith(".json.gz") and (b'"object_type"' in head or b'"centroid"' in head):
        return "hoverfast"
    if b'"centroid"' in head and b'"MultiPo' not in head:
        return "hoverfast"
    if b'"MultiPo' in head and b'"Polygon"' not in head and b'"Point"' not in head:
        # QuPath too writes Multi geometries, for single objects with kinds of their own
        return "qupath" if b'"detection"' in head or b'"cell"' in head else "cellvit"
    return "qupath"


def _by_keys(path: Path, head: bytes) -> str:
    marks = {
        "cellvit": (b'"wsi_metadata"', b'"cells"'),
        "hovernet": (b'"nuc"',),
        "histoplus": (b'"cell_masks"', b'"inference_mpp"'),
        "qupath": (b'"FeatureCollection"', b'"features"', b'"Feature"'),
    }
    found = [name for name, words in marks.items() if any(word in head for word in words)]
    if len(found) == 1:
        return found[0]
    tree = read_json(path)  # long first values hide the keys
    keys = [json.dumps(key).encode() for key in tree] if isinstance(tree, dict) else []
    for name, words in marks.items():
        if any(word in keys for word in words):
            return name
    raise UserError(
        f"{path} is no detection file of a known tool; give format= one of {', '.join(FORMATS)}, "
        f"or convert it to a csv file with the columns x,y,type,score."
    )
