"""The table of benchmarks: one file each, one line here; and what a benchmark is."""

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from eval.plans import Fold
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

# name: (module, class); a module is imported when it is asked for.
BENCHMARKS: dict[str, tuple[str, str]] = {
    "brcam2c": ("eval.benchmarks.brcam2c", "BrcaM2C"),
    "folder": ("eval.benchmarks.folder", "Folder"),
    "hest": ("eval.benchmarks.hest", "Hest"),
    "midogpp": ("eval.benchmarks.midogpp", "MidogPP"),
    "nucls": ("eval.benchmarks.nucls", "Nucls"),
    "ocelot": ("eval.benchmarks.ocelot", "Ocelot"),
    "puma": ("eval.benchmarks.puma", "Puma"),
}


@dataclass(frozen=True)
class Request:
    """What the user asks of a benchmark.

    Attributes:
        task: one of its tasks; '' = the first.
        protocol: 'default', or 'paper' for the published division.
        image_mpp: µm per pixel of the images, where neither files nor publication say it.
        slides: folder of the whole slides that the images were cut from; None = images as they are.
        cache: folder for what is made once (fields cut from slides, gene counts); None = none kept.
        seed: of folds and draws.
    """

    task: str = ""
    protocol: Literal["default", "paper"] = "default"
    image_mpp: float | None = None
    slides: Path | None = None
    cache: Path | None = None
    seed: int = 0


DEFAULT = Request()


@dataclass(frozen=True)
class Paper:
    """The published protocol of a task.

    Attributes:
        source: which paper.
        probes: the probes that it used, by our names.
        says: one sentence: what it does that the default does not, its flaws included.
        align: how dense maps are read: 'released' is MUSE's sampler.
    """

    source: str
    probes: tuple[str, ...]
    says: str
    align: Literal["centre", "released"] = "centre"


MUSE = Paper(
    "MUSE",
    ("knn", "linear", "finetune"),
    "the best k is chosen on the test set by accuracy, and dense maps are read with aligned "
    "corners, up to half a token beside the nucleus.",
    align="released",
)


class Benchmark(Protocol):
    """Labelled nuclei and how they are divided.

    `tasks` are the questions that can be asked of one data set, the usual one first; `version` is
    raised when the same files give other rows.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...

    def load(self, root: Path, request: Request = DEFAULT) -> Table:
        """The table of one task; UserError says what is wrong with the folder."""
        ...

    def check(self, root: Path, request: Request = DEFAULT) -> list[str]:
        """What differs from the published data, one sentence each."""
        ...

    def folds(self, table: Table, request: Request = DEFAULT) -> list[Fold]:
        """The division that `plan=auto` means under the request's protocol."""
        ...

    def paper(self, task: str) -> Paper | None:
        """The published protocol of a task; None where there is none."""
        ...


def find(name: str) -> Benchmark:
    """The benchmark of that name, or a UserError with the nearest right one."""
    if name in BENCHMARKS:
        module, kind = BENCHMARKS[name]
        made: Any = getattr(importlib.import_module(module), kind)()
        return made
    near = difflib.get_close_matches(name, list(BENCHMARKS), n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise UserError(f"there is no benchmark '{name}': it is one of {', '.join(BENCHMARKS)}{hint}")


def task_of(benchmark: Benchmark, request: Request) -> str:
    """The task asked for.

    Raises:
        UserError: the benchmark has no such task.
    """
    task = request.task or benchmark.tasks[0]
    if task not in benchmark.tasks:
        raise UserError(
            f"{benchmark.name} has no task '{task}'; use one of: {', '.join(benchmark.tasks)}."
        )
    return task


def right_level(root: Path, marks: tuple[str, ...], *, shape: str) -> None:
    """Refuse a folder that lacks what a data set has.

    Args:
        marks: names (or glob patterns) inside the root, all of which must be there.
        shape: for the sentence: what the right folder holds.

    Raises:
        UserError: no such folder; the level above or below is the right one; a mark is missing.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give root= the folder that holds {shape}.")

    def fits(place: Path) -> bool:
        return all(any(place.glob(mark)) for mark in marks)

    if fits(root):
        return
    below = sorted(p for p in root.iterdir() if p.is_dir())
    for place in [root.parent, *below, *(p for b in below for p in sorted(b.iterdir()))]:
        if place.is_dir() and fits(place):
            raise UserError(f"{root} is the wrong folder level; give root={place} instead.")
    lacking = [mark for mark in marks if not any(root.glob(mark))]
    raise UserError(f"{root} has no {' and no '.join(lacking)}; the folder holds {shape}.")
