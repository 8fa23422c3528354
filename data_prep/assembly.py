"""From slides to a mixed set: parts, groups, index. What a part holds is the business of its job.

Each slide gives one *part* in `out/work`, in a random order of its own. Slides are dealt into
*groups* (`plan.json`); the parts of a group are merged into mixed shards, and deleted. The index
sums the groups up. Any piece can be killed and done again; processes started with the same words
share the pieces (`claims`); slides that come later make new groups and leave the old ones alone.
"""

import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.claims import claim, is_held
from data_prep.plan import PLAN, make_plan, read_plan
from data_prep.pool import CRASH, in_processes
from data_prep.sources import Source
from lemon_muse.data.records import has_record, write_index
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between looks at what other processes are doing
BUSY = "busy"


@dataclass(frozen=True)
class Job:
    """What the pieces of a set are, and how they are made; pickled into worker processes.

    Attributes:
        out: folder of the set.
        settings: what decides the content of the set, as JSON; another value is another set.
        cut: makes the part of a slide: (source, path without ending); done when `<path>.npz` is.
        merge: makes the shards of a group: (group, slides).
        bytes_each: bytes that a nucleus takes in a part; 0 if unknown.
        group: slides that are mixed together, at most.
        scratch: bytes of the parts of a group, at most.
        seed: of the deal.
        workers: processes.
    """

    out: Path
    settings: dict[str, Any]
    cut: Callable[[Source, Path], None]
    merge: Callable[[int, list[str]], None]
    bytes_each: int
    group: int
    scratch: int
    seed: int
    workers: int

    def part(self, slide: str) -> Path:
        """Path of a slide's part, without ending; its folder holds nothing else."""
        return self.out / "work" / "parts" / slide / "part"


def assemble(job: Job, sources: list[Source]) -> int:
    """Make the set; returns how many slides were added (0: it was complete already).

    Raises:
        UserError: `out` holds a set of other settings or of other nuclei; a slide cannot be cut.
        RunError: the disk is full.
    """
    plan, added = make_plan(job, sources)
    if not added and _is_complete(job, plan):
        _sweep(job)
        return 0
    known = {source.slide: source for source in sources}
    failed: dict[str, str] = {}
    is_told = False
    while True:
        busy = _round(job, plan, known, failed, first=not is_told)
        left = [g for g in range(len(plan)) if not has_record(job.out, g)]
        if not left or (failed and not busy):
            break
        if not is_told:
            log.warning("waiting for %d pieces that other processes are working on", busy)
            is_told = True
        time.sleep(POLL)
    if left:
        first = next(iter(failed.values()))
        first += "" if first.endswith((".", "!")) else "."
        more = f" ({len(failed) - 1} more slides failed)" if len(failed) > 1 else ""
        raise UserError(
            f"{first}{more} All other slides are done and kept: mend it, or take it out of the "
            f"data, and run the same words again."
        )
    with claim(job.out / "work" / "index", wait=True):
        # Meanwhile another process may have begun, or ended, to extend the set.
        now = list(range(len(read_plan(job)["groups"])))
        is_last = all(has_record(job.out, group) for group in now)
        groups = now if is_last else list(range(len(plan)))
        write_index(job.out, groups, {"source": job.settings})
    if is_last:
        _sweep(job)
    return sum(map(len, plan))


def _sweep(job: Job) -> None:
    """Remove what is of no use beside a finished set: parts, and what killed jobs have left."""
    shutil.rmtree(job.out / "work", ignore_errors=True)
    index = json.loads((job.out / "index.json").read_text(encoding="utf-8"))
    listed = {shard["name"] for shard in index["shards"]}
    left = [p for p in job.out.glob(f"{index['kind']}-[0-9]*-[0-9]*.tar") if p.name not in listed]
    for name in (f"{index['kind']}-*.tar", "index.json", "blocks.npy", PLAN, "groups/*"):
        left += job.out.glob(f"{name}.*.tmp")
    for path in left:
        path.unlink(missing_ok=True)


def _round(
    job: Job,
    plan: list[list[str]],
    known: dict[str, Source],
    failed: dict[str, str],
    *,
    first: bool,
) -> int:
    """Do every piece that nobody else is doing and that did not fail; returns how many others hold.

    After the first round what others hold is looked up here: to start processes only for finding
    that out would keep the processor busy.
    """
    from tqdm import tqdm

    missing = {g: {s for s in slides if not is_cut(job.part(s), known[s])}
               for g, slides in enumerate(plan) if not has_record(job.out, g)}  # fmt: skip
    queue: deque[str] = deque()
    busy = 0
    for group, slides in missing.items():
        for slide in [s for s in plan[group] if s in slides and s not in failed]:
            if not first and is_held(job.part(slide)):
                busy += 1
            else:
                queue.append(f"cut {group} {known[slide].model_dump_json()}")
        if not slides and f"group {group}" not in failed:
            queue.append(f"merge {group}")
    total = sum(known[s].count for g in missing for s in missing[g])
    work = partial(_piece, job=job, plan=plan)
    bar = tqdm(total=total, unit=" nuclei", unit_scale=True, desc="cut", disable=None)
    with bar:
        for item, result, problem in in_processes(work, queue, workers=job.workers):
            verb, rest = item.split(" ", 1)
            busy += result == BUSY
            if verb == "merge":
                if problem:
                    failed[f"group {rest}"] = _named(f"group {rest}", item, problem)
                continue
            group, source = int(rest.split(" ")[0]), _source(rest)
            if problem:
                failed[source.slide] = _named(str(source.path), item, problem)
            elif result != BUSY:
                bar.update(source.count)
                # Others have cut the rest of the group, perhaps: whoever is last merges it, so that
                # the parts of a group, not of the whole set, lie on the disk.
                missing[group].discard(source.slide)
                missing[group] -= {s for s in missing[group] if is_cut(job.part(s), known[s])}
                if not missing[group]:
                    queue.appendleft(f"merge {group}")
    return busy


def _source(text: str) -> Source:
    """The slide of a piece: '<group> <source as JSON>'."""
    return Source.model_validate_json(text.split(" ", 1)[1])


def _named(name: str, item: str, problem: str) -> str:
    """The problem of a piece in the user's words: a piece is no name that they know."""
    if problem == CRASH and name.startswith("group "):
        return f"the process that mixed {name} was killed, perhaps for want of memory."
    return f"{name}: {problem}" if problem == CRASH else problem.replace(f"{item}: ", f"{name}: ")


def _piece(text: str, *, job: Job, plan: list[list[str]]) -> str:
    """One piece of work, as text; returns '' or `BUSY`."""
    verb, rest = text.split(" ", 1)
    if verb == "merge":
        group = int(rest)
        with claim(job.out / "work" / f"group-{group:05d}") as mine:
            if not mine:
                return BUSY
            if not has_record(job.out, group):
                try:
                    job.merge(group, plan[group])
                except FileNotFoundError:
                    # On a file system without locks another process may have been faster.
                    if not has_record(job.out, group):
                        raise
            for slide in plan[group]:
                shutil.rmtree(job.part(slide).parent, ignore_errors=True)
        return ""
    source = _source(rest)
    with claim(job.part(source.slide)) as mine:
        if not mine:
            return BUSY
        # A group that stands has no parts any more: another process was faster.
        is_done = has_record(job.out, int(rest.split(" ")[0]))
        if not is_done and not is_cut(job.part(source.slide), source):
            job.cut(source, job.part(source.slide))
    return ""


def is_cut(part: Path, source: Source) -> bool:
    """Whether a slide's part stands and is of these nuclei."""
    return read_key(part) == source.key


def read_key(part: Path) -> str:
    """The key of the source that a part was cut from; '' where there is none."""
    import zipfile

    import numpy as np

    try:
        with np.load(f"{part}.npz", allow_pickle=False) as members:
            return str(members["key"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return ""


def _is_complete(job: Job, plan: list[list[str]]) -> bool:
    path = job.out / "index.json"
    if not path.is_file() or not (job.out / "blocks.npy").is_file():
        return False
    groups = list(range(len(plan)))
    is_whole = json.loads(path.read_text(encoding="utf-8"))["groups"] == groups
    return bool(is_whole and all(has_record(job.out, group) for group in groups))
