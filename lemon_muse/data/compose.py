"""What a run trains on: a part of the slides, patients, organs or nuclei of a set, or a draw.

LEMON's figure 3 asks how many nuclei and how many slides a run needs. Parts are chosen when shards
are read, by a seed: no shard is written for them. With the same seed the larger part holds the
smaller one, so that such curves differ in size alone.
"""

import csv
import hashlib
import io
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from lemon_muse import distributed
from lemon_muse.config import Config
from lemon_muse.data.ahead import map_ahead
from lemon_muse.data.files import write_atomic
from lemon_muse.data.reader import open_reader
from lemon_muse.data.selection import Selection, by_block, ends, weighted
from lemon_muse.data.shards import Index
from lemon_muse.data.weights import read_weights
from lemon_muse.errors import RunError, UserError

Reads = Literal["crops", "rois"]
READERS = 4  # threads that read the slides of blocks


class Subset(Config):
    """Train on a part of the shards: organs, then patients, slides, nuclei; then weights."""

    nuclei: int | None = Field(
        None, gt=0, description="nuclei: whole blocks at random, of the last one a part"
    )
    slides: int | None = Field(None, gt=0, description="slides, at random")
    patients: int | None = Field(None, gt=0, description="patients, at random; all their slides")
    organs: tuple[str, ...] = Field((), description="organs; needs table=")
    table: Path | None = Field(
        None, description="csv with the columns slide and organ; the manifest is one"
    )
    weights: Path | None = Field(
        None, description="file of prep balance: each pass draws nuclei with its weights"
    )
    seed: int = Field(0, ge=0, description="of the choice; a larger part holds the smaller one")
    cache: Path | None = Field(
        None, description="folder of the table of every nucleus' slide; none = data/subset"
    )

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return not (self.by_slide or self.nuclei or self.weights)

    @property
    def by_slide(self) -> bool:
        """Whether slides are left out."""
        return bool(self.slides or self.patients or self.organs)


def select(index: Index, subset: Subset, *, reads: Reads = "crops") -> Selection | None:
    """The samples that a run sees; None: all.

    All ranks of a run call it together: rank 0 writes the table of slides.

    Args:
        index: of the set, as the method reads it.
        subset: what is chosen.
        reads: what a sample is, a nucleus or a whole ROI.

    Raises:
        UserError: more than there is, unknown organs, weights of another set.
        RunError: the metadata of a block is damaged, or the table cannot be written.
    """
    if subset.whole:
        return None
    if reads == "rois" and (subset.nuclei or subset.weights):
        raise UserError(
            "subset.nuclei and subset.weights are for methods that read crops; use subset.slides, "
            "subset.patients or subset.organs."
        )
    sizes = sample_sizes(index, reads)
    counts, slide_of, slides = sizes, None, None
    if subset.by_slide:
        slides = choose_slides(index, subset)
        slide_of = slide_numbers(index, sizes, subset.cache or index.folder / "subset")
        table, chosen = slide_of, slides
        counts = by_block(sizes, lambda here: chosen[table[here]])
    if subset.nuclei:
        counts = first_blocks(counts, subset.nuclei, subset.seed)
    found = Selection(sizes, counts, subset.seed, slide_of, slides)
    if subset.weights:
        weights = read_weights(subset.weights, index)
        try:
            found = weighted(found, weights.code, weights.weight)
        except ValueError:
            raise UserError(
                f"no nucleus of the subset has a weight in {subset.weights}; choose more of them."
            ) from None
    return found


def sample_sizes(index: Index, reads: Reads) -> np.ndarray:
    """Samples of each block, int64 [n_blocks]."""
    if reads == "rois":
        return np.ones(len(index.blocks), np.int64)
    return index.blocks["count"].astype(np.int64)


def first_blocks(counts: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """How many nuclei each block gives, int64 [n_blocks], so that they are `wanted` in all.

    Blocks come in a random order of the seed until the number is reached, so a larger number has
    the same blocks and more. Whole blocks, because a block is read as a whole; each is a random
    draw from the slides of its group.

    Raises:
        UserError: there are fewer.
    """
    have = int(counts.sum())
    if wanted > have:
        raise UserError(
            f"subset.nuclei={wanted}, but there are {have} to choose from; ask for fewer."
        )
    order = np.random.default_rng([seed, len(counts)]).permutation(len(counts))
    before = ends(counts[order])[:-1]
    out = np.zeros(len(counts), np.int64)
    out[order] = (wanted - before).clip(0, counts[order])
    return out


def choose_slides(index: Index, subset: Subset) -> np.ndarray:
    """Which slides are chosen, bool [n_slides] in the order of `Index.slides`.

    Raises:
        UserError: an unknown organ, or more patients or slides than there are.
    """
    about = index.slides
    left = [name for name, entry in about.items() if entry["count"]]
    if subset.organs:
        organ = read_organs(subset.table)
        known = sorted({organ[name] for name in left if organ.get(name)})
        unknown = [o for o in subset.organs if o not in known]
        if unknown:
            raise UserError(
                f"subset.organs has {unknown[0]!r}, which no slide of {index.folder} has in "
                f"{subset.table}; the organs are: {', '.join(known) or 'none'}."
            )
        left = [name for name in left if organ.get(name) in subset.organs]
    if subset.patients:
        # A slide of which no patient is known counts as one.
        patient = {name: about[name]["patient"] or f"/{name}" for name in left}
        mine = set(_first(sorted(set(patient.values())), subset.patients, subset.seed, "patients"))
        left = [name for name in left if patient[name] in mine]
    if subset.slides:
        left = _first(left, subset.slides, subset.seed, "slides")
    chosen = set(left)
    return np.array([name in chosen for name in about])


def read_organs(table: Path | None) -> dict[str, str]:
    """Organ of each slide, of a csv with the columns slide and organ.

    Raises:
        UserError: no such file or columns.
    """
    if table is None:
        raise UserError(
            "subset.organs needs subset.table=FILE.csv with the columns slide and organ: the "
            "manifest of prep manifest, where it has organs."
        )
    try:
        rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"subset.table={table} cannot be read as a csv ({error}).") from None
    if not rows or not {"slide", "organ"} <= set(rows[0]):
        raise UserError(f"subset.table={table} needs the columns slide and organ, and rows.")
    return {(row["slide"] or "").strip(): (row["organ"] or "").strip() for row in rows}


def slide_numbers(index: Index, sizes: np.ndarray, folder: Path) -> np.ndarray:
    """Number of the slide of every sample (place in `Index.slides`), unsigned [n], mapped.

    The metadata of all blocks are read once, by rank 0, and kept in `folder`.

    Raises:
        RunError: a block is damaged, or the folder cannot be written to.
    """
    key = zlib.crc32("\n".join(index.slides).encode(), index.header["blocks_crc"])
    path = folder / f"slide_of-{zlib.crc32(np.ascontiguousarray(sizes).data, key):08x}.npy"
    problem: str | None = None
    if distributed.rank() == 0 and not path.is_file():
        try:
            _write_numbers(index, sizes, path)
        except RunError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"{folder} cannot be written to ({error.strerror}); give subset.cache=FOLDER for "
                f"the table of every nucleus' slide."
            )
    problem = next((p for p in distributed.objects_of_ranks(problem) if p), None)
    if problem:
        raise RunError(problem)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _write_numbers(index: Index, sizes: np.ndarray, path: Path) -> None:
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    out = np.empty(int(sizes.sum()), np.uint16 if len(index.slides) < 2**16 else np.uint32)
    reader, starts = open_reader(index), ends(sizes)
    blocks = np.flatnonzero(sizes).tolist()
    bar = tqdm(total=len(out), unit=" samples", unit_scale=True, desc="slides", disable=None)
    with bar:
        numbers = map_ahead(reader.slides, blocks, workers=READERS)
        for block, found in zip(blocks, numbers, strict=True):
            if len(found) != sizes[block]:
                raise RunError(
                    f"the metadata of block {block} have {len(found)} rows instead of "
                    f"{sizes[block]}; 'lemon-muse prep check data={index.folder}' lists the damage."
                )
            out[starts[block] : starts[block + 1]] = found
            bar.update(len(found))
    reader.close()
    buffer = io.BytesIO()
    np.save(buffer, out, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def _first(names: list[str], count: int, seed: int, what: str) -> list[str]:
    """The first `count` in a random order in which a name's place hangs on the seed and it alone.

    So the choice of a grown set has most of the slides of the smaller one.
    """
    if count > len(names):
        raise UserError(
            f"subset.{what}={count}, but there are {len(names)} to choose from; ask for fewer."
        )

    def place(name: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), name

    return sorted(names, key=place)[:count]


def describe(index: Index, chosen: Selection | None) -> str:
    """What a run sees, for its log and its card."""
    what = "ROIs" if index.kind == "rois" and "roi" not in index.header else "nuclei"
    if chosen is None:
        return f"{index.count} nuclei in {len(index.blocks)} blocks"
    said = f"{chosen.total} of {int(chosen.sizes.sum())} {what}"
    if what == "nuclei":
        said += f" in {int((chosen.counts > 0).sum())} of {len(index.blocks)} blocks"
    if chosen.slides is not None:
        said += f", {int(chosen.slides.sum())} of {len(index.slides)} slides"
    return said + (", drawn by weight" if chosen.draw is not None else "")
