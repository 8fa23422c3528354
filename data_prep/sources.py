"""What a job over slides works on: the slides of `prep nuclei`, or the images of a folder."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from data_prep.nuclei_formats.record import nuclei
from data_prep.nuclei_table import write_table
from lemon_muse.config import Config
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

Layout = Literal["auto", "slides", "brcam2c", "folder"]
Split = Literal["train", "val", "test", "all"]


class Where(Config):
    """What a job over slides reads and where it writes."""

    data: Path = Field(
        description="folder of prep nuclei, or of images and nuclei (docs/formats.md has layouts)"
    )
    out: Path = Field(
        description="folder of the shards; the same words go on, new slides are added"
    )
    layout: Layout = Field("auto", description="how the data folder is laid out")
    split: Split = Field("train", description="which images are used, where the folder has a split")
    seed: int = Field(0, ge=0, description="of the choice and the mixing")
    workers: int = Field(2, ge=0, description="processes over slides; 0: this one")

    @field_validator("out")
    @classmethod
    def _a_folder(cls, value: Path) -> Path:
        if value.exists() and not value.is_dir():
            raise ValueError(f"{value} is a file; give a folder")
        return value


class Source(Config):
    """One slide or image and the table of its nuclei."""

    slide: str = Field(description="its name")
    path: Path = Field(description="its file")
    mpp: float = Field(description="µm per level-0 px")
    patient: str = Field(description="'' where unknown")
    table: Path = Field(description="table of its nuclei, Parquet")
    count: int = Field(description="nuclei in the table")
    key: str = Field(description="changes with the nuclei, the mpp or the file")


def open_sources(
    data: Path, *, layout: Layout = "auto", split: Split = "all", tables: Path
) -> tuple[list[Source], str]:
    """The slides of a folder, and the name of its layout.

    Args:
        data: folder of `prep nuclei` ('slides'), or a folder of images with nuclei.
        layout: how it is laid out.
        split: which images of a folder that has a split; all slides otherwise.
        tables: folder to which the tables of images are written.

    Raises:
        UserError: no such folder, no nucleus, or what the layout's reader says.
    """
    if layout == "slides" or (layout == "auto" and (data / "nuclei.json").is_file()):
        return _slides(data), "slides"
    from lemon_muse.data.layouts import read_layout

    table, name = read_layout(data, layout)
    return _images(data, table, split, tables), name


def _slides(data: Path) -> list[Source]:
    path = data / "nuclei.json"
    if not path.is_file():
        raise UserError(f"there is no {path}; make it with prep nuclei, or give its folder.")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = [
            Source(
                slide=name,
                path=Path(about["path"]),
                mpp=about["mpp"],
                patient=about["patient"],
                table=data / about["file"],
                count=about["count"],
                key=about["key"],
            )
            for name, about in index["slides"].items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); run prep nuclei again.") from None
    for what in ("failed", "missing"):
        if index.get(what):
            log.warning("%d slides of %s have no nuclei (%s)", len(index[what]), data, what)
    if not sum(source.count for source in found):
        raise UserError(f"{data} has no nucleus: every table is empty.")
    return found


def _images(data: Path, table: Table, split: Split, tables: Path) -> list[Source]:
    rows = np.arange(len(table)) if split == "all" else table.rows(split)
    if not len(rows):
        raise UserError(f"{data} has no nucleus in split={split}; use split=all.")
    codes = table.image_code[rows]
    order = np.argsort(codes, kind="stable")
    found: dict[str, Source] = {}
    repeated = 0
    for here in np.split(rows[order], np.flatnonzero(np.diff(codes[order])) + 1):
        place = np.stack([table.x[here], table.y[here]], 1)
        first = np.sort(np.unique(place, axis=0, return_index=True)[1])
        repeated += len(here) - len(first)
        source = _image(table, here[first], tables)
        if source.slide in found:
            raise UserError(f"two images are named {source.slide}; give each its own name.")
        found[source.slide] = source
    if repeated:
        log.warning("%d nuclei stand twice at the same place and are taken once", repeated)
    return list(found.values())


def _image(table: Table, rows: np.ndarray, tables: Path) -> Source:
    """Write the table of one image, as `prep nuclei` would."""
    path = Path(table.image[rows[0]])
    label = table.label[rows]
    names = np.array([*table.classes, ""])[np.where(label < 0, len(table.classes), label)]
    xy = np.stack([table.x[rows], table.y[rows]], 1)
    about = {"slide": path.stem, "mpp": float(table.mpp[rows[0]]), "bytes": path.stat().st_size}
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(xy.tobytes() + "\n".join(names.tolist()).encode())
    source = Source(
        slide=path.stem,
        path=path,
        mpp=float(table.mpp[rows[0]]),
        patient=str(table.patient[rows[0]]),
        table=tables / f"{path.stem}.parquet",
        count=len(rows),
        key=digest.hexdigest()[:16],
    )
    tables.mkdir(parents=True, exist_ok=True)
    # Labels of people, not of a detector: the score is certain. The number of a nucleus is its own
    # image's: it must not change when images are added.
    write_table(
        source.table,
        nuclei(xy, kind=names, score=np.ones(len(rows)), ids=np.arange(len(rows))),
        {**about, "key": source.key, "count": len(rows), "patient": source.patient},
    )
    return source
