"""Types of nuclei from a probe trained on a benchmark, and nuclei as GeoJSON."""

import glob
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.nuclei_formats.record import PIXEL_CENTRE
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

if TYPE_CHECKING:
    from launch.embed import Embed
    from launch.embed.store import Output
    from launch.embed.work import Done, Way

# Told apart on pink and violet tissue; types take them in the order of their names.
COLOURS = (
    (0, 158, 115), (230, 159, 0), (0, 114, 178), (204, 0, 0), (240, 228, 66), (86, 180, 233),
    (255, 255, 255), (0, 0, 0), (120, 94, 240), (0, 255, 0),
)  # fmt: skip
_SPACE = uuid.UUID("2b0b6f5e-9d0c-4c55-8a59-4b7a5f0d1c3e")


@dataclass(frozen=True)
class Predicted:
    """For the nuclei of one slide: `names` str [n] of the likeliest class, its `probability`
    float32 [n]; and all `classes`."""

    names: np.ndarray
    probability: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A fitted logistic probe: training features float32 [n, d], that new ones are standardised by,
    weights (`eval.probes.lbfgs.fit`), and what it was fitted on in plain values."""

    train: np.ndarray
    weights: Any
    classes: tuple[str, ...]
    facts: dict[str, Any]

    def of_slide(self, slide: "Done") -> Predicted:
        """Predict part by part."""
        from eval.probes import lbfgs, softmax

        names, sure = [np.zeros(0, str)], [np.zeros(0, np.float32)]
        for part in slide.parts:
            _, x = lbfgs.standardise(self.train, np.load(part))
            scores = softmax(lbfgs.decide(x, self.weights)[0])
            names.append(np.array(self.classes)[scores.argmax(1)])
            sure.append(scores.max(1))
        return Predicted(np.concatenate(names), np.concatenate(sure), self.classes)


def fit_probe(cfg: "Embed", way: "Way", folder: Path) -> Probe:
    """Features of the benchmark's train nuclei, read as those of the slides, and a probe on them.

    Where the data set states no split, all its nuclei train. C is chosen by folds of patients.

    Args:
        folder: keeps the features, so that a killed job has them.

    Raises:
        UserError: no such benchmark or data, or its task has no classes.
    """
    from eval import benchmarks
    from eval.features import cache_key, cached
    from eval.probes import Part, lbfgs, logistic
    from eval.samplers import features_of

    asked = cfg.classify
    assert asked is not None
    benchmark = benchmarks.find(asked.benchmark)
    request = benchmarks.Request(
        task=asked.task, image_mpp=asked.image_mpp, cache=folder / "cache", seed=cfg.seed
    )
    task = benchmarks.task_of(benchmark, request)
    table = benchmark.load(asked.root, request)
    if table.targets is not None:
        raise UserError(f"classify.benchmark={asked.benchmark} {asked.task} has no classes.")
    rows = table.rows("train") if len(table.rows("train")) else np.arange(len(table))
    table = table.take(rows[table.label[rows] >= 0])
    present = np.unique(table.label)
    if len(present) < 2:
        raise UserError(f"{asked.root} has train nuclei of {len(present)} class; two are needed.")
    file = folder / f"train-{cache_key(way.key, table.content_hash)}.npy"
    x = cached(
        file,
        lambda: features_of(
            way.encoder,
            way.look,
            table,
            batch=cfg.batch,
            workers=cfg.workers,
            device=way.device,
            name=f"{way.card['name']} of {asked.benchmark}",
        ),
        rows=len(table),
    )
    # A class without a train nucleus cannot be predicted, so it is not offered.
    label = np.searchsorted(present, table.label)
    part = Part(x, label, table.patient)
    c, how = logistic.choose_c(
        part, classes=len(present), grid=lbfgs.GRID, folds=5, seed=cfg.seed, device=way.device
    )
    weights = lbfgs.fit(
        lbfgs.standardise(x)[0], label, classes=len(present), grid=[c], device=way.device
    )
    classes = tuple(table.classes[i] for i in present)
    facts = {
        "benchmark": asked.benchmark,
        "task": task,
        "classes": ", ".join(classes),
        "train": len(table),
        "C": c,
        "chosen_on": how,
    }
    return Probe(x, weights, classes, facts)


def write_geojson(target: Path, table: "Output", *, style: str) -> None:
    """One file a slide: `target` itself, or target/SLIDE.geojson.

    Coordinates are level-0 px from the corner of the scanned area, as QuPath and CellViT have them.

    Args:
        style: 'qupath': one detection a nucleus with its type, colour and measurements;
            'cellvit': one MultiPoint a type, in pixel indices.

    Raises:
        UserError: a .geojson file for several slides.
    """
    if target.suffix == ".geojson" and len(table.slides) > 1:
        raise UserError(
            f"geojson={target} is one file for {len(table.slides)} slides; a folder is needed."
        )
    target = target if target.suffix == ".geojson" else target / "SLIDE.geojson"
    target.parent.mkdir(parents=True, exist_ok=True)
    kinds = [
        slide.points.type if table.predicted is None else table.predicted[i].names
        for i, slide in enumerate(table.slides)
    ]
    every = sorted({name for names in kinds for name in np.unique(names).tolist() if name})
    colours = {name: list(COLOURS[i % len(COLOURS)]) for i, name in enumerate(every)}
    for i, slide in enumerate(table.slides):
        sure = table.predicted[i].probability if table.predicted is not None else None
        if style == "qupath":
            text = _detections(slide, kinds[i], sure, colours)
        else:
            text = _groups(slide, kinds[i], colours)
        file = target.with_name(f"{slide.task.slide}.geojson") if target.stem == "SLIDE" else target
        for stale in file.parent.glob(f"{glob.escape(file.name)}.*.tmp"):  # of a killed job
            stale.unlink(missing_ok=True)
        write_atomic(file, text.encode())


def _from_corner(slide: "Done") -> np.ndarray:
    corner = (slide.facts["bounds_x"], slide.facts["bounds_y"])
    return np.round(slide.points.xy - corner, 2)


def _detections(
    slide: "Done", kinds: np.ndarray, sure: np.ndarray | None, colours: dict[str, list[int]]
) -> str:
    """A FeatureCollection, one line a nucleus."""
    xy, lines = _from_corner(slide), []
    for row, number in enumerate(slide.points.number.tolist()):
        name, score = str(kinds[row]), float(slide.points.score[row])
        properties: dict[str, Any] = {"objectType": "detection"}
        if name:
            properties["classification"] = {"name": name, "color": colours[name]}
        measured = {"Detection probability": round(score, 4)} if np.isfinite(score) else {}
        measured |= {"Type probability": round(float(sure[row]), 4)} if sure is not None else {}
        if measured:
            properties["measurements"] = measured
        feature = {
            "type": "Feature",
            "id": str(uuid.uuid5(_SPACE, f"{slide.task.slide}:{number}")),
            "geometry": {"type": "Point", "coordinates": xy[row].tolist()},
            "properties": properties,
        }
        lines.append(json.dumps(feature, separators=(",", ":")))
    return '{"type":"FeatureCollection","features":[\n' + ",\n".join(lines) + "\n]}\n"


def _groups(slide: "Done", kinds: np.ndarray, colours: dict[str, list[int]]) -> str:
    """CellViT's list: one feature a type; nuclei without one are under 'unknown'."""
    xy, found = _from_corner(slide) - PIXEL_CENTRE, []
    for name in np.unique(kinds).tolist():
        shown = name or "unknown"
        found.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(_SPACE, f"{slide.task.slide}/{shown}")),
                "geometry": {
                    "type": "MultiPoint",
                    "coordinates": np.round(xy[kinds == name], 2).tolist(),
                },
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": shown, "color": colours.get(name, [128] * 3)},
                },
            }
        )
    return json.dumps(found, separators=(",", ":"))
