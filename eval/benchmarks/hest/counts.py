"""Nucleus x gene counts of one Xenium slide of HEST-1k, from its transcripts and its nuclei.

Counted is a transcript of quality >= 20 (10x Genomics' own threshold), of a gene and not a control,
that is assigned to a cell and lies inside its nucleus. A Xenium cell reaches up to 15 µm beyond the
nucleus and there takes in transcripts of its neighbours, while an encoder sees the nucleus: hence
`overlaps_nucleus`; where a file lacks that column, all transcripts of the cell count.

Cell ids are int with -1 for none, text with UNASSIGNED, bytes, or text of bytes (b'aagigajm-1'), by
the version of 10x Genomics' software and of HEST: all are compared as text.
"""

import hashlib
import io
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.hest.files import UNASSIGNED, different, read_outlines, read_parquet
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

VERSION = "1"  # raised when the same files give other counts
MIN_QUALITY = 20
CONTROLS = (
    "NegControlProbe_",
    "NegControlCodeword_",
    "BLANK_",
    "UnassignedCodeword_",
    "DeprecatedCodeword_",
    "antisense_",
    "Intergenic_",
)
NUCLEAR = "overlaps_nucleus"
ROWS = 2**20  # transcripts in memory at once
KEYS = 2**23  # pending (nucleus, gene) pairs before they are added up
WIDTH = 2**24  # more than genes of any panel


@dataclass(frozen=True)
class Summary:
    """What was left out.

    Attributes:
        nuclei: outlines with an extent, one a cell.
        shapeless: outlines without.
        silent: nuclei without a counted transcript.
        counted: transcripts in the matrix.
        homeless: transcripts like these whose cell has no outline.
        nuclear: whether only transcripts inside nuclei count.
    """

    nuclei: int
    shapeless: int
    silent: int
    counted: int
    homeless: int
    nuclear: bool


@dataclass(frozen=True)
class Counts:
    """The nuclei of one slide that have a counted transcript, in the order of the outlines.

    Attributes:
        matrix: scipy.sparse.csr_matrix int32 [n, G], transcripts.
        genes: names of the panel, sorted; also those that no nucleus has.
        cell: str [n], ids.
        x, y: float64 [n], centroid of the outline (of its largest part), level-0 px of the image.
        summary: what was left out.
    """

    matrix: Any
    genes: tuple[str, ...]
    cell: np.ndarray
    x: np.ndarray
    y: np.ndarray
    summary: Summary


def read(transcripts: Path, outlines: Path, cache: Path | None = None) -> Counts:
    """The counts of one slide, from the cache folder where they are there.

    Raises:
        UserError: a file is damaged, lacks a column or belongs to another slide.
    """
    kept = None if cache is None else _kept(transcripts, outlines, cache)
    if kept is not None and kept.is_file():
        try:
            return _unpack(kept)
        except Exception as error:  # a damaged zip raises many kinds
            log.warning("%s is damaged (%s) and is made again", kept, error)
    counts = count(transcripts, outlines)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, _pack(counts))
    return counts


def read_places(
    transcripts: Path, outlines: Path, cache: Path | None = None
) -> tuple[Summary, np.ndarray, np.ndarray]:
    """`summary`, `x` and `y` of `read(…)`, without the matrix where a cache has them."""
    if cache is not None:
        try:
            with np.load(_kept(transcripts, outlines, cache), allow_pickle=False) as file:
                return _summary(file["summary"]), file["x"], file["y"]
        except Exception:  # not there, or damaged: `read` says so
            pass
    counts = read(transcripts, outlines, cache)
    return counts.summary, counts.x, counts.y


def count(transcripts: Path, outlines: Path) -> Counts:
    """The counts of one slide, part by part; errors as in `read`."""
    import pyarrow as pa
    from scipy import sparse

    cells, x, y, shapeless = read_outlines(outlines)
    tally, panel = _Tally(), dict[str, int]()
    homeless, nuclear, ids = 0, True, pa.array(cells, pa.string())
    columns, extra = ("cell_id", "feature_name", "qv"), (NUCLEAR, "is_gene")
    for part in read_parquet(transcripts, columns, extra, rows=ROWS):
        nuclear = NUCLEAR in part.schema.names
        gene = _gene_numbers(part, panel, transcripts)
        wanted = (gene >= 0) & (_numbers(part, "qv") >= MIN_QUALITY)
        if nuclear:
            wanted &= _numbers(part, NUCLEAR) == 1
        row, assigned = _rows(part.column("cell_id"), ids, transcripts)
        homeless += int((wanted & assigned & (row < 0)).sum())
        wanted &= row >= 0
        tally.add(row[wanted] * WIDTH + gene[wanted])
    keys, values = tally.total()
    if not len(keys):
        raise UserError(
            f"no transcript of {transcripts} lies in a nucleus of {outlines}: their cell ids do "
            f"not meet ({homeless} transcripts have a cell without outline); fetch both files of "
            f"one slide and one version."
        )
    genes = sorted(panel)
    order = np.empty(len(genes), np.int64)
    order[[panel[name] for name in genes]] = np.arange(len(genes))
    shape = (len(cells), len(genes))
    matrix = sparse.csr_matrix(
        (values.astype(np.int32), (keys // WIDTH, order[keys % WIDTH])), shape=shape
    )
    heard = np.flatnonzero(np.diff(matrix.indptr))
    summary = Summary(
        nuclei=len(cells),
        shapeless=shapeless,
        silent=len(cells) - len(heard),
        counted=int(values.sum()),
        homeless=homeless,
        nuclear=nuclear,
    )
    return Counts(matrix[heard], tuple(genes), cells[heard], x[heard], y[heard], summary)


class _Tally:
    """Adds up int64 keys by sorting, in memory proportional to the number of different keys."""

    def __init__(self) -> None:
        none = np.empty(0, np.int64)
        self.parts: list[tuple[np.ndarray, np.ndarray]] = [(none, none)]
        self.pending = 0

    def add(self, keys: np.ndarray) -> None:
        self.parts.append(_added(keys, np.ones(len(keys), np.int64)))
        self.pending += len(self.parts[-1][0])
        # Only once the new ones outweigh the sum: each key is then sorted a few times at most.
        if self.pending > max(KEYS, len(self.parts[0][0])):
            self.total()

    def total(self) -> tuple[np.ndarray, np.ndarray]:
        """Different keys, ascending, and how often each came."""
        keys, counts = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        self.parts, self.pending = [_added(keys, counts)], 0
        return self.parts[0]


def _added(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else order
    return keys[starts], np.add.reduceat(counts[order], starts) if len(keys) else counts


def _gene_numbers(part: Any, panel: dict[str, int], path: Path) -> np.ndarray:
    """Number of the gene of each transcript, int64 [n], -1 for controls; new genes join `panel`."""
    names, indices = different(part.column("feature_name"), path)
    genes = indices >= 0
    if "is_gene" in part.schema.names:
        genes &= _numbers(part, "is_gene") != 0
    kinds, numbers = names.to_pylist(), np.full(len(names) + 1, -1)
    # A column of categories also lists names that no transcript here has.
    for k in np.flatnonzero(np.bincount(indices[genes])):
        if kinds[k] is not None and not kinds[k].startswith(CONTROLS):
            numbers[k] = panel.setdefault(kinds[k], len(panel))
    return np.where(genes, numbers[indices], -1)


def _rows(column: Any, ids: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Which outline the cell of each transcript has, int64 [n], -1 for none; and if it has a cell.

    Only the different ids of a part are looked up: they are far fewer than its transcripts.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names, indices = different(column, path)
    rows = pc.index_in(names, value_set=ids).fill_null(-1).to_numpy(zero_copy_only=False)
    none = pa.array(UNASSIGNED, pa.string())
    cells = ~pc.is_in(names.fill_null(""), value_set=none).to_numpy(zero_copy_only=False)
    rows, cells = np.append(rows, -1).astype(np.int64), np.append(cells, False)
    return rows[indices], cells[indices]


def _numbers(part: Any, name: str) -> np.ndarray:
    """A column of numbers or truth values, float32 [n], NaN where it has none."""
    import pyarrow as pa

    values: np.ndarray = part.column(name).cast(pa.float32()).to_numpy(zero_copy_only=False)
    return values


def _kept(transcripts: Path, outlines: Path, cache: Path) -> Path:
    """Where the counts of these two files are kept; another file or version, another name."""
    facts = [VERSION]
    for path in (transcripts, outlines):
        there = path.stat()
        facts += [path.name, str(there.st_size), str(there.st_mtime_ns)]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return cache / f"{transcripts.stem}-{digest}.npz"


def _pack(counts: Counts) -> bytes:
    stream = io.BytesIO()
    matrix = counts.matrix
    np.savez(
        stream,
        data=matrix.data,
        indices=matrix.indices,
        indptr=matrix.indptr,
        genes=np.array(counts.genes, str),
        cell=counts.cell,
        x=counts.x,
        y=counts.y,
        summary=np.array([int(getattr(counts.summary, f.name)) for f in fields(Summary)]),
    )
    return stream.getvalue()


def _unpack(path: Path) -> Counts:
    from scipy import sparse

    with np.load(path, allow_pickle=False) as file:
        shape = (len(file["cell"]), len(file["genes"]))
        matrix = sparse.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=shape)
        genes = tuple(file["genes"].tolist())
        summary = _summary(file["summary"])
        return Counts(matrix, genes, file["cell"], file["x"], file["y"], summary)


def _summary(numbers: np.ndarray) -> Summary:
    nuclei, shapeless, silent, counted, homeless, nuclear = numbers.tolist()
    return Summary(nuclei, shapeless, silent, counted, homeless, bool(nuclear))
