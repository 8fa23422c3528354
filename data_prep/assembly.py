"""From slides to a mixed set: parts, groups, index. What a part holds is the business of its job.

Each slide gives one *part* in `out/work`, in a random order of its own. Slides are dealt into
*groups* (`plan.json`); the parts of a group are merged into mixed shards, and deleted. The index
sums the groups up. Any piece can be killed and done again; processes started with the same words
share the pieces (`claims`); slides that come later make new groups and leave the old ones alone.
"""

import hashlib
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

from data_prep.claims import claim
from data_prep.pool import in_processes
from data_prep.sources import Source
from lemon_muse.data.files import write_atomic
from lemon_muse.data.writer import has_record, write_index
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

PLAN = "plan.json"
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
    plan, added = _plan(job, sources)
    if not added and _is_complete(job, plan):
        shutil.rmtree(job.out / "work", ignore_errors=True)
        return 0
    known = {source.slide: source for source in sources}
    failed: dict[str, str] = {}
    is_told = False
    while True:
        busy = _round(job, plan, known, failed)
        left = [g for g in range(len(plan)) if not has_record(job.out, g)]
        if not left or (failed and not busy):
            break
        if not is_told:
            log.warning("waiting for %d pieces that other processes are working on", busy)
            is_told = True
        time.sleep(POLL)
    if failed:
        first = next(iter(failed.values()))
        more = f" ({len(failed) - 1} more slides failed)" if len(failed) > 1 else ""
        raise UserError(
            f"{first}{more} All other slides are done and kept: mend it, or take it out of the "
            f"data, and run the same words again."
        )
    with claim(job.out / "work" / "index", wait=True):
        write_index(job.out, list(range(len(plan))), {"source": job.settings})
    shutil.rmtree(job.out / "work", ignore_errors=True)
    return sum(map(len, plan))


def _round(
    job: Job, plan: list[list[str]], known: dict[str, Source], failed: dict[str, str]
) -> int:
    """Do every piece that nobody else is doing; returns how many others hold."""
    from tqdm import tqdm

    missing = {g: {s for s in slides if not is_cut(job.part(s), known[s])}
               for g, slides in enumerate(plan) if not has_record(job.out, g)}  # fmt: skip
    queue: deque[str] = deque()
    for group, slides in missing.items():
        queue += [f"cut {known[s].model_dump_json()}" for s in plan[group] if s in slides]
        if not slides:
            queue.append(f"merge {group}")
    of_slide = {s: g for g in missing for s in plan[g]}
    total = sum(known[s].count for g in missing for s in missing[g])
    busy = 0
    work = partial(_piece, job=job, plan=plan)
    bar = tqdm(total=total, unit=" nuclei", unit_scale=True, desc="cut", disable=None)
    with bar:
        for item, result, problem in in_processes(work, queue, workers=job.workers):
            verb, rest = item.split(" ", 1)
            busy += result == BUSY
            if verb == "merge":
                if problem:
                    failed[f"group {rest}"] = problem
                continue
            source = Source.model_validate_json(rest)
            if problem:
                failed[source.slide] = problem
            elif result != BUSY:
                bar.update(source.count)
                group = of_slide[source.slide]
                missing[group].discard(source.slide)
                if not missing[group]:
                    queue.appendleft(f"merge {group}")  # its parts make room
    return busy


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
    source = Source.model_validate_json(rest)
    with claim(job.part(source.slide)) as mine:
        if not mine:
            return BUSY
        if not is_cut(job.part(source.slide), source):
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


def _plan(job: Job, sources: list[Source]) -> tuple[list[list[str]], int]:
    """Groups of slides, and how many slides are new; a plan grows, merged groups never change."""
    job.out.mkdir(parents=True, exist_ok=True)
    path = job.out / PLAN
    with claim(job.out / "work" / "plan", wait=True):
        old: dict[str, Any] = {"groups": [], "keys": {}}
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            _compare(job, old["settings"])
        elif (job.out / "index.json").is_file() or has_record(job.out, 0):
            raise UserError(f"{job.out} holds shards of another making; give another out=.")
        keys = {source.slide: source.key for source in sources if source.count}
        groups: list[list[str]] = []
        for number, slides in enumerate(old["groups"]):
            if has_record(job.out, number):
                changed = [s for s in slides if s in keys and keys[s] != old["keys"][s]]
                if changed:
                    raise UserError(
                        f"the nuclei of {changed[0]} have changed since they were cut into "
                        f"{job.out}; give another out=, or delete that folder."
                    )
                groups.append(slides)
            else:
                groups.append([s for s in slides if s in keys])
        there = {slide for slides in groups for slide in slides}
        new = [source for source in sources if source.count and source.slide not in there]
        groups += _deal(job, new)
        gone = len([s for s in there if s not in keys])
        if gone:
            log.warning("%d slides of %s are no longer in the data; they stay", gone, job.out)
        plan = {"settings": job.settings, "groups": groups, "keys": old["keys"] | keys}
        write_atomic(path, json.dumps(plan, indent=1).encode())
    return groups, len(new)


def _deal(job: Job, sources: list[Source]) -> list[list[str]]:
    """Groups of slides in a random order that depends on nothing but their names and the seed."""

    def draw(source: Source) -> bytes:
        return hashlib.blake2b(f"{job.seed}/{source.slide}".encode()).digest()

    groups: list[list[str]] = []
    size = 0
    for source in sorted(sources, key=draw):
        each = source.count * job.bytes_each
        if not groups or len(groups[-1]) >= job.group or (size and size + each > job.scratch):
            groups.append([])
            size = 0
        groups[-1].append(source.slide)
        size += each
    return groups


def _compare(job: Job, before: dict[str, Any]) -> None:
    now = job.settings
    changed = [f"{k}: {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
    if changed:
        raise UserError(
            f"{job.out} holds shards made with other settings ({'; '.join(changed[:3])}); "
            f"give another out=, or delete that folder."
        )


def _is_complete(job: Job, plan: list[list[str]]) -> bool:
    path = job.out / "index.json"
    if not path.is_file() or not (job.out / "blocks.npy").is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8"))["groups"] == list(range(len(plan))))
