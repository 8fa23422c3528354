"""Which detection file belongs to which slide: by the names that the tools give their files.

<slide>.json.gz (HoverFast), <slide>.json (HoVer-Net), <slide>/cells.json and <slide>_cells.json
(CellViT), <slide>/cell_masks.json (HistoPLUS), <slide>.geojson (QuPath), <slide>.csv, ...
"""

from pathlib import Path

from data_prep.nuclei_formats import ENDINGS
from lemon_muse.errors import UserError

# What the tools append to the slide's name or call their file in the slide's folder; best first.
TAILS = ("", "cells", "cell_masks", "nuclei", "detections", "cell_detection", "detection")


def match(folder: Path, slides: dict[str, Path]) -> tuple[dict[str, Path], list[Path]]:
    """Detection files of slides.

    Args:
        folder: searched with everything below it.
        slides: name of each slide, and its file.

    Returns:
        The file of each slide that has one, and the files that belong to no slide. Of several
        files of one slide the best counts (outlines before points).

    Raises:
        UserError: there is no such folder, no slide has a file, or two files claim the same slide.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give detections= the detector's output.")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _ending(p) is not None)
    claims: dict[str, list[tuple[int, int, Path]]] = {}
    for path in files:
        for name, rank in _names(path, folder):
            claims.setdefault(name, []).append((rank, ENDINGS.index(_ending(path) or ""), path))
    found: dict[str, Path] = {}
    claimed: set[Path] = set()
    for slide, source in slides.items():
        keys = dict.fromkeys((slide, source.stem, source.name))
        mine = sorted({claim for key in keys for claim in claims.get(key, [])})
        claimed |= {path for _, _, path in mine}
        if not mine:
            continue
        if len(mine) > 1 and mine[0][:2] == mine[1][:2]:
            raise UserError(
                f"the slide {slide} has two detection files, {mine[0][2]} and {mine[1][2]}; "
                f"take one away."
            )
        found[slide] = mine[0][2]
    if slides and not found:
        seen = ", ".join(p.name for p in files[:3]) or "no detection file"
        raise UserError(
            f"no file below {folder} is named like a slide: it holds {seen}, the first slide is "
            f"{next(iter(slides))}; name the files <slide>.json, <slide>.csv, or as the tools do."
        )
    return found, [path for path in files if path not in claimed]


def _ending(path: Path) -> str | None:
    fits = [ending for ending in ENDINGS if path.name.endswith(ending)]
    return max(fits, key=len) if fits else None


def _names(path: Path, folder: Path) -> list[tuple[str, int]]:
    """Slide names that a file may belong to, each with the rank of its tail."""
    stem = path.name.removesuffix(_ending(path) or "")
    names = [(stem, 0)]
    for rank, tail in enumerate(TAILS):
        if tail and stem == tail:
            # <slide>/cells.json, and <slide>/cell_detection/cells.json of the first CellViT
            above = [p.name for p in path.parents if p != folder and p.is_relative_to(folder)]
            names += [(name, rank) for name in above[:2]]
        elif tail and stem.endswith(f"_{tail}"):
            names.append((stem.removesuffix(f"_{tail}"), rank))
    return names
