"""Which slides make which group: `plan.json`. A plan grows; groups that stand never change."""

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from data_prep.claims import claim
from data_prep.sources import Source
from lemon_muse.data.files import write_atomic
from lemon_muse.data.records import has_record
from lemon_muse.errors import UserError

if TYPE_CHECKING:
    from data_prep.assembly import Job

log = logging.getLogger(__name__)

PLAN = "plan.json"


def make_plan(job: "Job", sources: list[Source]) -> tuple[list[list[str]], int]:
    """Groups of slides, and how many slides are new; the plan is written.

    Raises:
        UserError: `out` holds a set of other settings or of other nuclei.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    with claim(job.out / "work" / "plan", wait=True):
        old = read_plan(job)
        if old["groups"]:
            _compare(job, old["settings"])
        elif (job.out / "index.json").is_file() or has_record(job.out, 0):
            raise UserError(f"{job.out} holds shards of another making; give another out=.")
        keys = {source.slide: source.key for source in sources if source.count}
        groups: list[list[str]] = []
        gone = 0
        for number, slides in enumerate(old["groups"]):
            gone += len([s for s in slides if s not in keys])
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
                if (job.out / "groups" / f"{number:05d}.json").is_file():
                    log.warning("group %d lacks a shard; it is made again", number)
        there = {slide for slides in groups for slide in slides}
        new = [source for source in sources if source.count and source.slide not in there]
        groups += _deal(job, new)
        if gone:
            stay = len([s for s in there if s not in keys])
            log.warning(
                "%d slides of %s are no longer in the data; %d of them stay", gone, job.out, stay
            )
        plan = {"settings": job.settings, "groups": groups, "keys": old["keys"] | keys}
        write_atomic(job.out / PLAN, json.dumps(plan, indent=1).encode())
    return groups, len(new)


def read_plan(job: "Job") -> dict[str, Any]:
    """The plan as it stands; one without groups where there is none."""
    path = job.out / PLAN
    if not path.is_file():
        return {"groups": [], "keys": {}}
    plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return plan


def _deal(job: "Job", sources: list[Source]) -> list[list[str]]:
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


def _compare(job: "Job", before: dict[str, Any]) -> None:
    now = job.settings
    changed = [f"{k}: {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k]]
    if changed:
        raise UserError(
            f"{job.out} holds shards made with other settings ({'; '.join(changed[:3])}); "
            f"give another out=, or delete that folder."
        )
