"""Nuclei of slides: a detector's files, or the built-in detector, into one table for each slide."""

import hashlib
import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_prep import nuclei_formats
from data_prep.manifest_file import read_manifest
from data_prep.nuclei_formats.matching import match
from data_prep.nuclei_table import distinct, inside, read_about, write_table
from data_prep.pool import CRASH, in_processes
from lemon_muse.config import Config
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

SCHEMA = 1
INDEX = "nuclei.json"


class Nuclei(Config):
    """Tables of nuclei, one a slide, from detection files or the built-in detector."""

    data: Path = Field(description="manifest.csv of prep manifest, or its folder")
    out: Path = Field(description="folder of the tables; slides that are done are left alone")
    detections: Path | None = Field(
        None, description="folder of the detector's files, named like the slides"
    )
    format: Literal["auto", "hoverfast", "cellvit", "hovernet", "qupath", "histoplus", "tables"] = (
        Field("auto", description="which tool wrote the detections")
    )
    detector: Literal["builtin"] = Field(
        "builtin", description="what finds the nuclei where detections= is not given"
    )
    merge: float = Field(
        2.0, ge=0, le=20, description="nuclei within this distance are one, µm; 0: none merged"
    )
    seed: int = Field(0, ge=0, description="of the places at which stain and points are looked at")
    workers: int = Field(
        2, ge=0, description="processes over slides, or threads over tiles of few; 0: this process"
    )


class Task(Config):
    """One slide of the manifest and where its nuclei come from."""

    slide: str = Field(description="its name in the manifest")
    path: Path = Field(description="its file")
    mpp: float = Field(description="µm per level-0 px")
    patient: str = Field(description="'' where unknown")
    magnification: float | None = Field(description="objective power of level 0, where known")
    source: Path | None = Field(description="detection file; None: the built-in detector")
    out: Path = Field(description="the table")
    key: str = Field(description="hash of everything that the table depends on")


def run(cfg: Nuclei) -> Path:
    """Write the tables and their index `nuclei.json`, and return the folder.

    A slide that cannot be done does not stop the others; the job then ends with its error.

    Raises:
        UserError: the manifest, a detection file or a slide is wrong.
    """
    rows, unusable = slides_of(cfg.data)
    if unusable and not rows:
        why = next(iter(unusable.values()))
        raise UserError(f"{cfg.data} has no slide that can be used; of the first it says: {why}")
    sources: dict[str, Path] = {}
    unused: list[Path] = []
    if cfg.detections is not None:
        sources, unused = match(cfg.detections, {s: path for s, (path, _) in rows.items()})
    cfg.out.mkdir(parents=True, exist_ok=True)
    missing = sorted(set(rows) - set(sources)) if cfg.detections is not None else []
    tasks = [_task(cfg, s, row, sources.get(s)) for s, row in rows.items() if s not in missing]
    todo = [task for task in tasks if not _is_done(task)]
    failed = _do(cfg, todo)
    index = _index(cfg, [task for task in tasks if task.slide not in failed])
    index |= {"missing": missing, "unusable": unusable, "failed": failed}
    index["unused"] = [str(path) for path in unused]
    write_atomic(cfg.out / INDEX, json.dumps(index, indent=1).encode())
    _tell(cfg, index, len(tasks) - len(todo))
    if failed:
        first = next(iter(failed.values()))
        more = f" ({len(failed) - 1} more slides failed, see {INDEX})" if len(failed) > 1 else ""
        raise UserError(f"{first}{more}")
    return cfg.out


def slides_of(path: Path) -> tuple[dict[str, tuple[Path, dict[str, str]]], dict[str, str]]:
    """Slides of a manifest: (file, row) by name; and those that cannot be used with the reason.

    Raises:
        UserError: the file is missing or no manifest, or a name stands there twice.
    """
    path = path / "manifest.csv" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"there is no manifest {path}; make it with prep manifest.")
    rows: dict[str, tuple[Path, dict[str, str]]] = {}
    unusable: dict[str, str] = {}
    for line in read_manifest(path, status=""):
        name = line["slide"]
        if line["status"] != "ok":
            unusable[line["path"]] = line.get("reason") or line["status"]
        elif name in rows:
            raise UserError(f"{path} names the slide {name} twice; give each its own name.")
        elif not name or Path(name).name != name:
            raise UserError(f"{path}: the slide name '{name}' cannot be a file's name; change it.")
        else:
            rows[name] = (path.parent / line["path"], line)
    return rows, unusable


def _number(line: dict[str, str], column: str) -> float | None:
    try:
        value = float(line.get(column) or "nan")
    except ValueError:
        value = math.nan
    return value if 0 < value < math.inf else None


def _task(cfg: Nuclei, slide: str, row: tuple[Path, dict[str, str]], source: Path | None) -> Task:
    path, line = row
    mpp = _number(line, "mpp")
    if mpp is None:
        raise UserError(
            f"the slide {slide} has no mpp in the manifest; give prep manifest its µm per pixel."
        )
    power = _number(line, "magnification")
    stamp: list[Any] = [cfg.format, cfg.detector, cfg.merge, cfg.seed, slide, mpp, power]
    stamp += [line.get("patient") or "", SCHEMA, _size(path, slide)]
    stamp += [source.name, source.stat().st_mtime_ns, source.stat().st_size] if source else []
    return Task(
        slide=slide,
        path=path,
        mpp=mpp,
        patient=line.get("patient") or "",
        magnification=power,
        source=source,
        out=cfg.out / f"{slide}.parquet",
        key=hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:16],
    )


def _size(path: Path, slide: str) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(
            f"the slide {slide} is not at {path} ({error.strerror}); make the manifest again."
        ) from None


def _is_done(task: Task) -> bool:
    if not task.out.is_file():
        return False
    try:
        return bool(read_about(task.out).get("key") == task.key)
    except UserError:
        return False


def _do(cfg: Nuclei, todo: list[Task]) -> dict[str, str]:
    """Do the slides; returns the sentence of each that failed."""
    from tqdm import tqdm

    # Where slides are fewer than workers, threads share the tiles of each.
    threads = max(1, cfg.workers // max(1, len(todo)))
    waiting = {task.model_dump_json(): task.slide for task in todo}
    work = partial(_do_text, cfg=cfg, threads=threads)
    failed = {}
    with tqdm(total=len(todo), unit="slide", desc="nuclei", disable=None) as bar:
        for text, warning, problem in in_processes(work, list(waiting), workers=cfg.workers):
            if problem:
                # The piece of work as text is no name that the user knows.
                slide = waiting[text]
                problem = f"the slide {slide}: {CRASH}" if problem == CRASH else problem
                failed[slide] = problem = problem.replace(f"{text}: ", f"the slide {slide}: ")
                log.warning("%s failed: %s", waiting[text], problem)
            elif warning:
                log.warning("%s: %s", waiting[text], warning)
            bar.update()
    return dict(sorted(failed.items()))


def _do_text(text: str, *, cfg: Nuclei, threads: int) -> str:
    """`do_slide` for a task as JSON; returns the warning about its points, '' if none."""
    return do_slide(Task.model_validate_json(text), cfg, threads=threads)


def do_slide(task: Task, cfg: Nuclei, *, threads: int = 1) -> str:
    """Read or detect the nuclei of one slide, merge, check, and write its table.

    Returns:
        The warning about its points, '' if they lie where nuclei are.

    Raises:
        UserError: the slide or its detection file is wrong.
    """
    from data_prep import nuclei_sanity
    from data_prep.detector import detect_slide
    from lemon_muse.data.slides import open_slide

    with open_slide(task.path, mpp=task.mpp) as slide:
        facts = nuclei_formats.SlideFacts(
            slide.width, slide.height, slide.mpp, slide.bounds, task.magnification
        )
        kind: str = cfg.detector
        if task.source is None:
            found = detect_slide(slide, workers=threads, seed=cfg.seed)
        else:
            kind = nuclei_formats.detect(task.source) if cfg.format == "auto" else cfg.format
            found = nuclei_formats.read(task.source, slide=facts, kind=kind)
        sanity = nuclei_sanity.check(slide, found, seed=cfg.seed)
    here = found.take(inside(found, facts.width, facts.height))
    kept = here.take(distinct(here, mpp=facts.mpp, radius=cfg.merge))
    outside = len(found) - len(here)
    warning = sanity.warning
    if outside > 0.01 * len(found) and not warning:
        warning = f"{outside} of {len(found)} points lie outside the slide"
    about = {
        "schema": SCHEMA,
        "slide": task.slide,
        "path": str(task.path),
        "mpp": facts.mpp,
        "width": facts.width,
        "height": facts.height,
        "patient": task.patient,
        "source": str(task.source) if task.source else "",
        "format": kind,
        "read": len(found),
        "outside": outside,
        "merged": len(here) - len(kept),
        "count": len(kept),
        "darker": _rounded(sanity.darker),
        "on_tissue": _rounded(sanity.on_tissue),
        "warning": warning,
        "key": task.key,
    }
    write_table(task.out, kept, about)
    return warning


def _rounded(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def _index(cfg: Nuclei, tasks: list[Task]) -> dict[str, Any]:
    """The index: what the metadata of every table says."""
    slides = {}
    for task in sorted(tasks, key=lambda task: task.slide):
        # The slide may have moved since its table was written.
        about = {**read_about(task.out), "path": str(task.path.absolute())}
        slides[task.slide] = {"file": task.out.name, **about}
    totals = {
        name: sum(about[name] for about in slides.values())
        for name in ("read", "outside", "merged", "count")
    }
    settings = cfg.model_dump(mode="json", exclude={"out", "workers"})
    return {"schema": SCHEMA, "settings": settings, **totals, "slides": slides}


def _tell(cfg: Nuclei, index: dict[str, Any], before: int) -> None:
    warned = sum(bool(about["warning"]) for about in index["slides"].values())
    notes = [
        f"{before} slides done before" if before else "",
        f"{len(index['missing'])} slides without detections" if index["missing"] else "",
        f"{len(index['unusable'])} unusable slides" if index["unusable"] else "",
        f"{len(index['unused'])} files of no slide" if index["unused"] else "",
        f"{warned} with a warning" if warned else "",
    ]
    said = "".join(f"; {note}" for note in notes if note)
    print(
        f"{cfg.out}: {index['count']} nuclei of {len(index['slides'])} slides "
        f"({index['merged']} duplicates merged, {index['outside']} outside){said}"
    )
