"""Which slides are embedded, and where the nuclei of each come from."""

import hashlib
import io
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep import nuclei_formats
from data_prep.manifest import ENDINGS
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

if TYPE_CHECKING:
    from launch.embed import Embed
    from lemon_muse.data.slides import Slide

log = logging.getLogger(__name__)

SCHEMA = 1
NO_DETECTIONS = "nuclei= has no file named like it"


@dataclass(frozen=True)
class Task:
    """One slide: its name, file, patient ('' unknown), detection file (None: the built-in detector)
    and the hash of all that its features depend on."""

    slide: str
    path: Path
    patient: str
    source: Path | None
    key: str


@dataclass(frozen=True)
class Points:
    """Nuclei of one slide that are embedded, columns of equal length n.

    Attributes:
        number: int64 [n], running number in the detections as they were read.
        xy: float64 [n, 2], level-0 px of the slide.
        type: str [n], '' unknown.
        score: float32 [n], NaN unknown.
        facts: path, mpp, width, height, bounds and counts; plain values.
    """

    number: np.ndarray
    xy: np.ndarray
    type: np.ndarray
    score: np.ndarray
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.number)

    def take(self, rows: np.ndarray) -> "Points":
        """The nuclei of these rows, int64 [m], in that order."""
        return Points(
            self.number[rows], self.xy[rows], self.type[rows], self.score[rows], self.facts
        )


def tasks_of(cfg: "Embed", way: str) -> tuple[list[Task], dict[str, str]]:
    """The slides to do, by name, and those that cannot be with the reason.

    Args:
        way: hash of how features are made.

    Raises:
        UserError: no slide is there, two have the same name, or no detection file fits.
    """
    paths = _paths(cfg.slide)
    sources: dict[str, Path] = {}
    if cfg.nuclei is not None and cfg.nuclei.is_dir():
        from data_prep.nuclei_formats.matching import match

        sources = match(cfg.nuclei, paths)[0]
    elif cfg.nuclei is not None:
        if not cfg.nuclei.is_file():
            raise UserError(f"there is no detection file nuclei={cfg.nuclei}.")
        if len(paths) > 1:
            raise UserError(
                f"nuclei={cfg.nuclei} is one file and {cfg.slide} has {len(paths)} slides; give "
                f"the folder of the detection files."
            )
        sources = dict.fromkeys(paths, cfg.nuclei)
    failed = {
        name: NO_DETECTIONS for name in paths if cfg.nuclei is not None and name not in sources
    }
    tasks = [
        _task(cfg, name, path, sources.get(name), way)
        for name, path in paths.items()
        if name not in failed
    ]
    return tasks, failed


def _paths(given: Path) -> dict[str, Path]:
    """Slides by name, sorted."""
    if given.is_file():
        return {given.stem: given}
    if not given.is_dir():
        raise UserError(f"there is no slide or folder slide={given}.")
    found: dict[str, Path] = {}
    for path in sorted(given.rglob("*")):
        if path.suffix.lower() not in ENDINGS or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            raise UserError(
                f"{found[path.stem]} and {path} have the same name, which stands in the ids of "
                f"their nuclei; rename one, or embed them one by one."
            )
        found[path.stem] = path
    if not found:
        raise UserError(f"slide={given} has no slide; known endings are {' '.join(ENDINGS)}.")
    return dict(sorted(found.items()))


def _task(cfg: "Embed", name: str, path: Path, source: Path | None, way: str) -> Task:
    hit = re.search(cfg.patient, path.name)
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in (path, source) if p]
    asked = (cfg.format, cfg.slide_mpp, cfg.min_score, cfg.merge, cfg.seed)
    patient = (hit.group(1) or "") if hit else ""
    return Task(name, path, patient, source, key_of(SCHEMA, way, name, files, asked))


def key_of(*parts: Any) -> str:
    """16 hex digits of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def find_points(task: Task, cfg: "Embed", slide: "Slide", file: Path) -> Points:
    """The nuclei of a slide in the order of the detections; kept in `file`, so found only once.

    Raises:
        UserError: the detection file is wrong.
    """
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            facts = json.loads(str(kept["facts"]))
            return Points(kept["number"], kept["xy"], kept["type"], kept["score"], facts)
    points = _detect(task, cfg, slide)
    stream = io.BytesIO()
    np.savez(
        stream,
        number=points.number,
        xy=points.xy,
        type=points.type,
        score=points.score,
        facts=json.dumps(points.facts),
    )
    write_atomic(file, stream.getvalue())
    return points


def _detect(task: Task, cfg: "Embed", slide: "Slide") -> Points:
    from data_prep import nuclei_sanity
    from data_prep.detector import detect_slide
    from data_prep.nuclei_table import distinct, inside

    if task.source is None:
        found = detect_slide(slide, workers=max(1, cfg.workers), seed=cfg.seed)
    else:
        facts = nuclei_formats.SlideFacts(slide.width, slide.height, slide.mpp, slide.bounds)
        found = nuclei_formats.read(task.source, slide=facts, kind=cfg.format)
        if warning := nuclei_sanity.check(slide, found, seed=cfg.seed).warning:
            log.warning("%s: %s", task.slide, warning)
    rows = np.flatnonzero(inside(found, slide.width, slide.height))
    if cfg.min_score is not None:
        rows = rows[~(found.score[rows] < cfg.min_score)]
    rows = rows[distinct(found.take(rows), mpp=slide.mpp, radius=cfg.merge)]
    if not len(rows):
        log.warning("%s has no nucleus (of %d read)", task.slide, len(found))
    about = {
        "path": str(task.path),
        "mpp": float(slide.mpp),
        "width": int(slide.width),
        "height": int(slide.height),
        "bounds_x": float(slide.bounds[0]),
        "bounds_y": float(slide.bounds[1]),
        "nuclei": str(task.source or "built-in detector"),
        "read": len(found),
        "kept": len(rows),
    }
    xy = np.stack([found.x[rows], found.y[rows]], 1)
    return Points(rows, xy, found.type[rows], found.score[rows], about)
