"""What a study has found so far: estimates from predictions, study.json, study.md and study.png."""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval import results
from launch.study import intervals
from launch.study.intervals import Estimate
from launch.study.settings import Study, Trial
from launch.study.work import scored
from lemon_muse.data.files import write_atomic


@dataclass(frozen=True)
class Predicted:
    """What one probe of one encoder says of the scored nuclei; arrays [n]."""

    labels: np.ndarray
    predicted: np.ndarray
    patient: np.ndarray
    row: np.ndarray
    classes: int

    def same_nuclei(self, other: "Predicted") -> bool:
        """Whether both speak of the same nuclei in the same order."""
        pairs = ((self.labels, other.labels), (self.row, other.row), (self.patient, other.patient))
        return self.classes == other.classes and all(np.array_equal(a, b) for a, b in pairs)


@dataclass(frozen=True)
class Line:
    """A recipe (or floor) on one benchmark under one probe and metric."""

    recipe: str
    benchmark: str
    probe: str
    metric: str
    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    estimate: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Cost:
    """What training a recipe took: means over its finished seeds."""

    recipe: str
    seeds: tuple[int, ...]
    steps: int
    batch: int
    per_s: float
    unit: str
    minutes: float


@dataclass
class Found:
    """All lines and costs, how many nuclei and patients each benchmark scores, and notes."""

    lines: list[Line] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    floors: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def line(self, recipe: str, benchmark: str, probe: str, metric: str) -> Line | None:
        """The line of these, or None where it is not measured."""
        wanted = (recipe, benchmark, probe, metric)
        return next((x for x in self.lines
                     if (x.recipe, x.benchmark, x.probe, x.metric) == wanted), None)  # fmt: skip

    def probes(self, benchmark: str) -> list[str]:
        """Probes with a line, in order."""
        return list(dict.fromkeys(x.probe for x in self.lines if x.benchmark == benchmark))


def write(cfg: Study, every: list[Trial], failed: dict[str, str]) -> Path:
    """Write out/study.json, study.md and study.png of what is there; returns study.md."""
    from launch.study.picture import forest
    from launch.study.table import page

    found = collect(cfg, every)
    text = page(cfg, found, failed)
    facts = {
        "reference": cfg.base,
        "lines": [asdict(line) for line in found.lines],
        "floors": list(found.floors.values()),
        "costs": [asdict(cost) for cost in found.costs],
        "notes": found.notes,
        "failed": failed,
    }
    payload = json.dumps(_plain(facts), indent=1, allow_nan=False)
    write_atomic(cfg.out / "study.json", payload.encode())
    picture = forest(cfg, found)
    if picture is not None:
        write_atomic(cfg.out / "study.png", picture)
    path = cfg.out / "study.md"
    write_atomic(path, text.encode())
    return path


def collect(cfg: Study, every: list[Trial]) -> Found:
    """Estimates of all finished runs against the reference on the same nuclei."""
    found = Found(costs=_costs(every))
    cells: dict[tuple[str, str], dict[str, dict[int, Predicted]]] = {}
    left: dict[tuple[str, str], None] = {}
    for trial in every:
        for benchmark, rows in scored(cfg, trial).items():
            predictions = _predictions(cfg, trial, rows)
            left |= {(benchmark, row["probe"]): None for row in rows
                     if _is_mine(row) and row["probe"] not in predictions}  # fmt: skip
            for probe, said in predictions.items():
                runs = cells.setdefault((benchmark, probe), {})
                runs.setdefault(trial.recipe, {})[trial.seed] = said
                found.sizes[benchmark] = (len(said.labels), len(np.unique(said.patient)))
            _add_floors(found, trial, benchmark, rows)
    order = list(cfg.benchmarks)
    for (benchmark, probe), runs in sorted(cells.items(), key=lambda x: order.index(x[0][0])):
        found.lines += _lines(cfg, benchmark, probe, runs, found.notes)
    found.notes += [
        f"{benchmark}, {probe}: not in a table, which only has predictions of classes (not genes, "
        f"not robustness); its numbers are in results.jsonl."
        for benchmark, probe in left
    ]
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _is_mine(row: dict[str, Any]) -> bool:
    """Whether it is of the run's encoder, not of a floor."""
    return not row["encoder"].startswith(("floor:", "random:"))


def _predictions(cfg: Study, trial: Trial, rows: list[dict[str, Any]]) -> dict[str, Predicted]:
    """By probe; probes without predictions of classes are left out."""
    out = {}
    for row in rows:
        if not _is_mine(row) or row["metric"] != "balanced_accuracy":
            continue
        path = results.predictions_path(cfg.out, results.key_of(row), encoder=row["encoder"])
        if not path.is_file():
            continue
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("labels", "predicted", "patient", "row")}
            out[row["probe"]] = Predicted(**arrays, classes=len(file["classes"]))
    return out


def _lines(
    cfg: Study,
    benchmark: str,
    probe: str,
    runs: dict[str, dict[int, Predicted]],
    notes: list[str],
) -> list[Line]:
    """Recipes of one benchmark and probe, in the study's order."""
    lines = []
    drawn: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for recipe, by_seed in runs.items():
        drawn[recipe] = {seed: _values(cfg, said) for seed, said in sorted(by_seed.items())}
    for recipe in [name for name in cfg.recipes if name in runs]:
        both = [seed for seed in drawn[recipe] if seed in drawn.get(cfg.base, {})]
        same = [s for s in both if runs[recipe][s].same_nuclei(runs[cfg.base][s])]
        if len(same) < len(both):
            notes.append(f"{recipe} and {cfg.base} were scored on other nuclei of {benchmark}.")
        for metric in intervals.METRICS:
            mine = np.stack([values[metric] for values in drawn[recipe].values()])
            difference = None
            if same and recipe != cfg.base:
                pairs = [drawn[recipe][s][metric] - drawn[cfg.base][s][metric] for s in same]
                difference = intervals.estimate(np.stack(pairs), cfg.seeds_by)
            per_seed = tuple(float(value) for value in mine[:, 0])
            seeds = tuple(drawn[recipe])
            found = intervals.estimate(mine, cfg.seeds_by)
            lines.append(Line(recipe, benchmark, probe, metric, seeds, per_seed, found, difference))
    return lines


def _values(cfg: Study, said: Predicted) -> dict[str, np.ndarray]:
    return intervals.values(
        said.labels, said.predicted, said.patient, classes=said.classes, draws=cfg.draws
    )


def _add_floors(found: Found, trial: Trial, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Rows of floors as eval gives them: one seed, intervals over patients."""
    for row in rows:
        if not _is_mine(row) and row["metric"] in intervals.METRICS:
            name = row["encoder"].replace(trial.name, trial.recipe)
            facts = {k: row[k] for k in ("probe", "metric", "value", "ci_low", "ci_high")}
            key = (benchmark, f"{name} {row['probe']}", row["metric"])
            found.floors[key] = {"floor": name, "benchmark": benchmark, **facts}


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a line that is being written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _costs(every: list[Trial]) -> list[Cost]:
    """Median rate of each run's log, which it has while the others of `jobs` run beside it."""
    by_recipe: dict[str, list[Trial]] = {}
    for trial in every:
        if trial.encoder_hash is not None:
            by_recipe.setdefault(trial.recipe, []).append(trial)
    costs = []
    for recipe, runs in by_recipe.items():
        lines = [line for run in runs for line in logged(run.folder)[1:]]
        unit = next((k for line in lines for k in line if k.endswith("_per_s")), "crops_per_s")
        rates = [line[unit] for line in lines if unit in line]
        rate = statistics.median(rates) if rates else math.nan
        train = runs[0].train
        minutes = train.steps * train.batch / rate / 60
        seeds = tuple(run.seed for run in runs)
        name = unit.removesuffix("_per_s")
        costs.append(Cost(recipe, seeds, train.steps, train.batch, rate, f"{name}/s", minutes))
    return costs


def _plain(value: Any) -> Any:
    """For JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
