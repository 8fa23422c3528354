"""The table of benchmarks: one file each, one line here."""

import difflib
from pathlib import Path
from typing import Protocol

from eval.benchmarks.brcam2c import BrcaM2C
from eval.benchmarks.folder import Folder
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError


class Benchmark(Protocol):
    """Labelled nuclei with a split; `task` says what is asked of them ('class')."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def version(self) -> str: ...

    def load(self, root: Path) -> Table:
        """The table of all splits; UserError says what is wrong with the folder."""
        ...

    def check(self, root: Path) -> list[str]:
        """What differs from the published data, one sentence each."""
        ...


BENCHMARKS: dict[str, Benchmark] = {
    "brcam2c": BrcaM2C(),
    "folder": Folder(),
}


def find(name: str) -> Benchmark:
    """The benchmark of that name, or a UserError with the nearest right one."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name, list(BENCHMARKS), n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    raise UserError(f"there is no benchmark '{name}': it is one of {', '.join(BENCHMARKS)}{hint}")
