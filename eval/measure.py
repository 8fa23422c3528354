"""One source through the probes of a job: folds, scores, rows. What is on disk is not repeated."""

import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import bootstrap, breakdown, probes, results
from eval.features import rate
from eval.plans import Fold, column
from eval.probes import Outcome, Part, Protocol
from lemon_muse.data.table import Table
from lemon_muse.errors import RunError

if TYPE_CHECKING:
    from eval.sources import Source

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What is measured, whatever the source.

    Attributes:
        benchmark, task, version, protocol, split, seed: as in the rows.
        table: all nuclei; folds: how they are divided.
        probes: names, in order.
        out: folder of results.jsonl, predictions/, features/.
        device, workers, batch: of feature passes and probes.
    """

    benchmark: str
    task: str
    version: str
    table: Table
    folds: tuple[Fold, ...]
    probes: tuple[str, ...]
    protocol: Protocol
    split: str
    seed: int
    out: Path
    device: str
    workers: int
    batch: int

    @cached_property
    def scored(self) -> np.ndarray:
        """Rows that are scored, int64 [n], fold by fold; a row may come twice."""
        return np.concatenate([fold.test for fold in self.folds])

    @property
    def classes(self) -> int:
        return len(self.table.classes)

    @property
    def is_regression(self) -> bool:
        return self.table.targets is not None

    @property
    def crosses(self) -> str:
        """The column of a plan 'cross:…', else ''."""
        return self.task.rpartition(" cross:")[2] if " cross:" in self.task else ""

    @cached_property
    def headline_count(self) -> int:
        """Predictions behind the plain metrics; of a cross plan those of other values."""
        if not self.crosses:
            return len(self.scored)
        groups = column(self.table, self.crosses)
        return sum(int((groups[fold.test] != fold.name).sum()) for fold in self.folds)

    def key(self, source: "Source", probe: str) -> results.Key:
        return results.Key(
            source.hash,
            self.benchmark,
            self.version,
            self.protocol,
            probe,
            self.seed,
            self.split,
            self.task,
        )

    def features(self, source: "Source") -> np.ndarray:
        """Features of every row, from the cache or made now, float32 [n, d]."""
        return source.load(self.table, **self.place)

    def costs(self, source: "Source") -> results.Params:
        """What the features of a source cost: GMACs, parameters, nuclei a second."""
        if source.features is None:
            return {}
        return {**source.cost, **rate(source.path(self.table, **self.place))}

    @property
    def place(self) -> dict[str, Any]:
        """Where features of this data are kept."""
        version = self.version.partition("+")[0]
        return {"benchmark": self.benchmark, "version": version, "folder": self.out / "features"}


def measure(source: "Source", job: Job) -> list[Row]:
    """The rows of one source under every probe of the job that it can take."""
    rows: list[Row] = []
    known = results.read(job.out / "results.jsonl")
    x: np.ndarray | None = None
    for probe in job.probes:
        if not possible(source, probe):
            continue
        key = job.key(source, probe)
        file = results.predictions_path(job.out, key, encoder=source.name)
        done = results.complete(known, key)
        if done and (probe == "robustness" or results.has_predictions(file, key)):
            rows += [{**row, "encoder": source.name} for row in done]
            continue
        if x is None and source.features is not None:
            x = job.features(source)
        began = time.perf_counter()
        found, params = _found(source, job, probe, x, key, file)
        seconds = time.perf_counter() - began
        if not done:
            facts = {**params, **source.params, **job.costs(source)}
            done = results.make_rows(
                key, found, encoder=source.name, n=job.headline_count, seconds=seconds, params=facts
            )
            # The rows come last: a key that has rows has its predictions.
            results.append(job.out / "results.jsonl", done)
        print(f"{source.name}: {probe} in {seconds:.1f} s", file=sys.stderr, flush=True)
        # Two names may have one hash (an encoder that was not trained, and random weights).
        rows += [{**row, "encoder": source.name} for row in done]
    return rows


def possible(source: "Source", probe: str) -> bool:
    """Whether a source can take a probe: some need a network, some need features."""
    if probe == "finetune":
        return source.network is not None and not source.name.startswith("random:")
    return source.features is not None or probe not in ("ridge", "robustness")


def _found(
    source: "Source",
    job: Job,
    probe: str,
    x: np.ndarray | None,
    key: results.Key,
    file: Path,
) -> tuple[dict[str, bootstrap.Interval], results.Params]:
    """The metrics of one probe, and what it has chosen; predictions are written on the way."""
    if probe == "robustness":
        from eval import robustness

        found = robustness.measure(
            source,
            job.table,
            folds=job.folds,
            seed=job.seed,
            device=job.device,
            **job.place,
        )
        return found, {}
    outcomes = _outcomes(source, job, probe, x)
    for fold, outcome in zip(job.folds, outcomes, strict=True):
        if not np.isfinite(outcome.test).all():
            raise RunError(
                f"{source.name}: probe={probe} gives scores that are not finite ({fold.name}); the "
                f"features are too large for it."
            )
    params = together([outcome.params for outcome in outcomes])
    if job.is_regression:
        scores = np.concatenate([outcome.test for outcome in outcomes])
        return _regression(source, job, scores, key, file), params
    parts = [
        breakdown.Scored(fold.name, fold.test, outcome.test)
        for fold, outcome in zip(job.folds, outcomes, strict=True)
    ]
    # Of a cross plan the headline is about nuclei of another value than the trained one.
    away = breakdown.outside(job.table, parts, by=job.crosses) if job.crosses else parts
    rows = np.concatenate([part.rows for part in away])
    scores = np.concatenate([part.scores for part in away])
    results.write_predictions(file, key, job.table, rows, scores, encoder=source.name)
    return _classes(job, parts), params


def _outcomes(source: "Source", job: Job, probe: str, x: np.ndarray | None) -> list[Outcome]:
    table, common = job.table, {"protocol": job.protocol, "seed": job.seed, "device": job.device}
    function = probes.get(probe)
    if probe == "ridge":
        assert x is not None and table.targets is not None
        return function(x, table.targets, table.patient, job.folds, **common)  # type: ignore[return-value]
    if probe == "finetune":
        given = (source.network, source.look, table, job.folds)
        found = function(*given, x=x, batch=job.batch, workers=job.workers, **common)
        return found  # type: ignore[return-value]
    if x is None:
        return [_majority(job, fold) for fold in job.folds]
    out = []
    for fold in job.folds:
        parts = [
            Part(x[rows], table.label[rows], table.patient[rows])
            for rows in (fold.train, fold.val, fold.test)
        ]
        out.append(function(*parts, classes=job.classes, **common))
    return out


def _majority(job: Job, fold: Fold) -> Outcome:
    from eval.floors import majority_scores

    labels = job.table.label[fold.train]
    val, test = (
        majority_scores(labels, len(rows), classes=job.classes) for rows in (fold.val, fold.test)
    )
    return Outcome(val, test, {})


def _classes(job: Job, parts: list[breakdown.Scored]) -> dict[str, bootstrap.Interval]:
    """Pooled metrics with intervals over patients, then those of folds and groups."""
    table = job.table
    if job.crosses:
        found = breakdown.crossed(table, parts, by=job.crosses, seed=job.seed)
    else:
        found = breakdown.pooled(table, parts, seed=job.seed)
        found |= breakdown.by_group(table, parts, seed=job.seed)
    return {**breakdown.by_fold(table, parts), **found} if len(parts) > 1 else found


def _regression(
    source: "Source", job: Job, predicted: np.ndarray, key: results.Key, file: Path
) -> dict[str, bootstrap.Interval]:
    from eval import regression

    table, rows = job.table, job.scored
    assert table.targets is not None
    slides, first, owner = np.unique(table.slide[rows], return_index=True, return_inverse=True)
    # Slides of one patient are drawn together.
    patients = table.patient[rows][first]
    values = regression.pearson(table.targets[rows], predicted, owner, len(slides))
    results.write_pearson(
        file,
        key,
        values,
        slides=slides,
        patient=patients,
        genes=table.target_names,
        predicted=predicted,
        rows=rows,
        encoder=source.name,
    )
    return regression.intervals(values, table.target_names, patient=patients, seed=job.seed)


def together(params: list[results.Params]) -> results.Params:
    """What the folds have chosen: one value where they agree, else all of them in words."""
    out: results.Params = {}
    for name in dict.fromkeys(name for part in params for name in part):
        every = [part.get(name, "") for part in params]
        out[name] = every[0] if len(set(every)) == 1 else ", ".join(map(str, every))
    return out
