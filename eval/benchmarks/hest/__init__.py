"""HEST: expression of 50 genes of a nucleus from its picture (Xenium slides of HEST-1k, LEMON).

Layout as published at huggingface.co/datasets/MahmoodLab/hest::

    wsis/<id>.tif                                        pyramid, H&E
    metadata/<id>.json                                   pixel_size_um_estimated
    transcripts/<id>_transcripts.parquet
    xenium_seg/<id>_xenium_nucleus_seg.parquet           outlines in level-0 px of the H&E
    HEST_v1_1_0.csv                                      index; only `check` looks at it

The mpp is `pixel_size_um_estimated`; `…_embedded` and the tag of the tif are wrong in many slides.
"""

import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import plans
from eval.benchmarks import DEFAULT, Paper, Request, right_level, task_of
from eval.benchmarks.hest.counts import read, read_places
from eval.benchmarks.hest.facts import SLIDES, differing, left_out, patients
from lemon_muse.data.slides import MPP_RANGE, read_facts
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

GENES = 50
NUCLEI = 10_000  # of each slide [LEMON]
FOLDERS = ("wsis", "metadata", "transcripts", "xenium_seg")


@dataclass(frozen=True)
class Files:
    """The files of one slide."""

    image: Path
    metadata: Path
    transcripts: Path
    outlines: Path

    @property
    def lacking(self) -> list[Path]:
        every = (self.image, self.metadata, self.transcripts, self.outlines)
        return [path for path in every if not path.is_file()]


@dataclass(frozen=True)
class Part:
    """One slide: counts of the drawn nuclei, int32 [n, G], and how much each gene varies [G]."""

    mpp: float
    x: np.ndarray
    y: np.ndarray
    matrix: Any
    genes: tuple[str, ...]
    variance: np.ndarray


class Hest:
    """Predict log1p counts of 50 genes in a nucleus of bowel, breast or lung."""

    name = "hest"
    version = "1"
    tasks = tuple(SLIDES)

    def load(self, root: Path, request: Request = DEFAULT) -> Table:
        """The table of one task, of the slides that are there; minutes where counts are not cached.

        Targets are log1p of the counts, float32 [n, 50]; `label` is 0.

        Raises:
            UserError: fewer than two slides, a damaged file, no mpp, files of different slides.
        """
        root = Path(root)
        task = task_of(self, request)
        slides = _complete_slides(root, task)
        parts = {name: _part(name, files_of(root, name), request) for name in slides}
        genes = top_genes([(part.genes, part.variance) for part in parts.values()])
        if len(genes) < GENES:
            log.warning("the %d slides share only %d genes: all are taken", len(parts), len(genes))
        return _table(root, parts, genes)

    def folds(self, table: Table, request: Request = DEFAULT) -> list[plans.Fold]:
        """One slide is left out, or all slides of one patient."""
        del request
        return plans.leave_out(table, "patient")

    def paper(self, task: str) -> Paper | None:
        """LEMON's protocol."""
        del task
        return Paper(
            source="LEMON (arXiv 2603.25802)",
            probes=("ridge",),
            says="leave-one-slide-out ridge, Pearson's r; it does not say how it ranks genes or "
            "whether slides of one patient are parted: genes are ranked by our reading "
            "(docs/benchmarks/hest.md) and patients stay together.",
        )

    def check(self, root: Path, request: Request = DEFAULT) -> list[str]:
        """What differs from the published slides, one sentence each."""
        root = Path(root)
        task = task_of(self, request)
        slides = _complete_slides(root, task)
        said = []
        absent = [name for name in SLIDES[task] if name not in slides]
        if absent:
            said.append(
                f"{len(absent)} of the {len(SLIDES[task])} slides of {task} are not there "
                f"({', '.join(absent)}): genes and figures are not those of the published set."
            )
            said += [_half(root, name) for name in absent if _is_begun(files_of(root, name))]
        summaries, outside = {}, {}
        for name in slides:
            files = files_of(root, name)
            size = read_facts(files.image).sizes[0]
            said += differing(name, size, _mpp(files, request), root)
            summaries[name], x, y = read_places(files.transcripts, files.outlines, request.cache)
            outside[name] = int((~_inside(size, x, y)).sum())
        return said + left_out(summaries, outside)


def files_of(root: Path, name: str) -> Files:
    """Where the files of a slide are expected."""
    return Files(
        root / "wsis" / f"{name}.tif",
        root / "metadata" / f"{name}.json",
        root / "transcripts" / f"{name}_transcripts.parquet",
        root / "xenium_seg" / f"{name}_xenium_nucleus_seg.parquet",
    )


def top_genes(panels: list[tuple[tuple[str, ...], np.ndarray]], count: int = GENES) -> list[str]:
    """The genes that vary most: ranked in every slide, the `count` with the least sum of ranks.

    Args:
        panels: of each slide the names of its genes, [G], and the variance of each one's log1p
            counts over all nuclei, float [G].

    Returns:
        Genes that all slides have, best first; ties by name.
    """
    from scipy.stats import rankdata

    shared = sorted(set.intersection(*(set(genes) for genes, _ in panels)))
    if not shared:
        raise UserError("the slides share no gene: they were measured with different panels.")
    ranks = np.zeros(len(shared))
    for genes, variance in panels:
        place = {gene: k for k, gene in enumerate(genes)}
        ranks += rankdata(-variance[[place[gene] for gene in shared]])
    return [shared[k] for k in np.argsort(ranks, kind="stable")[:count]]


def _complete_slides(root: Path, task: str) -> list[str]:
    shape = "wsis/, metadata/, transcripts/ and xenium_seg/ of HEST-1k"
    right_level(root, FOLDERS, shape=shape)
    slides = [name for name in SLIDES[task] if not files_of(root, name).lacking]
    absent = [name for name in SLIDES[task] if name not in slides]
    halves = [_half(root, name) for name in absent if _is_begun(files_of(root, name))]
    if len(slides) < 2:
        raise UserError(
            " ".join(
                [
                    f"{root} has {len(slides)} of the {len(SLIDES[task])} slides of {task}, but "
                    f"leave-one-slide-out needs two: fetch {', '.join(absent)}.",
                    *halves,
                ]
            )
        )
    if absent:
        log.warning("%s: slides that are not there are left out: %s", task, ", ".join(absent))
    for sentence in halves:
        log.warning(sentence)
    return slides


def _is_begun(files: Files) -> bool:
    return 0 < len(files.lacking) < 4


def _half(root: Path, name: str) -> str:
    lacking = [str(path.relative_to(root)) for path in files_of(root, name).lacking]
    return f"{name} is left out: {' and '.join(lacking)} {_is(lacking)} missing."


def _is(things: list[str]) -> str:
    return "is" if len(things) == 1 else "are"


def _part(name: str, files: Files, request: Request) -> Part:
    mpp = _mpp(files, request)
    counts = read(files.transcripts, files.outlines, request.cache)
    inside = _inside(read_facts(files.image).sizes[0], counts.x, counts.y)
    if not inside.any():
        raise UserError(
            f"none of the {len(inside)} nuclei of {files.outlines} lies inside {files.image}: they "
            f"are not of one slide; fetch both again."
        )
    kept = np.flatnonzero(inside)
    logged = counts.matrix[kept].log1p()
    mean = np.asarray(logged.mean(0)).ravel()
    variance = np.asarray(logged.multiply(logged).mean(0)).ravel() - mean**2
    # Genes with the same counts tie, whatever the order of summation.
    variance = variance.round(12)
    if len(kept) > NUCLEI:
        # The draw of a slide does not depend on which others are there.
        generator = np.random.default_rng([request.seed, zlib.crc32(name.encode())])
        kept = kept[np.sort(generator.choice(len(kept), NUCLEI, replace=False))]
    drawn = counts.matrix[kept]
    return Part(mpp, counts.x[kept], counts.y[kept], drawn, counts.genes, variance)


def _inside(size: tuple[int, int], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x >= 0) & (x < size[0]) & (y >= 0) & (y < size[1])


def _mpp(files: Files, request: Request) -> float:
    """µm per level-0 pixel, as HEST estimated it; `image_mpp` only where the file states none."""
    stated = _metadata(files.metadata).get("pixel_size_um_estimated", "nothing")
    try:
        mpp = float(stated)
    except (TypeError, ValueError):
        mpp = float("nan")
    if request.image_mpp is not None:
        if np.isnan(mpp):
            mpp = request.image_mpp
        elif abs(mpp / request.image_mpp - 1) > 0.01:
            log.warning("image_mpp= is not for %s: its metadata says %g", files.image, mpp)
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise UserError(
            f"{files.metadata} states no usable pixel_size_um_estimated (it says {stated}); fetch "
            f"it again, or pass image_mpp=, the µm per pixel of {files.image.name}."
        )
    return mpp


def _metadata(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable JSON ({error}); fetch it again.") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path} holds no table of facts; fetch it again.")
    return facts


def _table(root: Path, parts: dict[str, Part], genes: list[str]) -> Table:
    lengths = [len(part.x) for part in parts.values()]
    slide = np.repeat(np.array(list(parts)), lengths)
    people = patients(list(parts))
    targets = []
    for part in parts.values():
        place = {gene: k for k, gene in enumerate(part.genes)}
        chosen = part.matrix[:, [place[gene] for gene in genes]]
        targets.append(np.log1p(chosen.toarray().astype(np.float32)))
    return Table(
        image=np.array([str(files_of(root, name).image) for name in slide.tolist()]),
        x=np.concatenate([part.x for part in parts.values()]),
        y=np.concatenate([part.y for part in parts.values()]),
        mpp=np.repeat([part.mpp for part in parts.values()], lengths),
        label=np.zeros(len(slide), np.int64),
        patient=np.array([people[name] for name in slide.tolist()]),
        slide=slide,
        split=np.full(len(slide), "all"),
        targets=np.concatenate(targets),
        target_names=tuple(genes),
    )
