"""`lemon-muse eval`: a frozen encoder and its floors through the probes of a benchmark."""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lemon_muse.config import Config
from lemon_muse.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from eval.benchmarks import Benchmark
    from eval.probes import Outcome
    from eval.sources import Source
    from lemon_muse.data.table import Table

log = logging.getLogger(__name__)

MUSE_PROBES = ("knn", "linear")
# Bytes of crops in gallery.npz: with large windows it holds fewer nuclei.
GALLERY_BYTES = 64_000_000


class Eval(Config):
    """Measure a frozen encoder on a benchmark, beside floors, with intervals over patients."""

    encoder: str = Field(
        description="encoder folder or run folder; released MUSE file (.pth); timm folder; "
        "timm:NAME[,checkpoint_path=FILE]; random:ENCODER = the same network untrained; "
        "floor:majority, floor:colour, floor:histogram, floor:pixel_pca (optionally @40px0.25)"
    )
    benchmark: str = Field(description="name of the benchmark: brcam2c, folder")
    root: Path = Field(description="folder of the benchmark's data, in its published layout")
    probe: Literal["knn", "logistic", "linear", "all"] = Field("all", description="probe")
    protocol: Literal["default", "muse"] = Field(
        "default",
        description="muse: k chosen on the test set by accuracy, tokens read with aligned corners, "
        "as published",
    )
    split: Literal["test", "val"] = Field(
        "test", description="split that is scored; val to compare settings without touching test"
    )
    sampler: Literal["auto", "crop", "map", "tokens", "cls"] = Field(
        "auto",
        description="crop: the encoder's window around a nucleus; map: MUSE's dense map at the "
        "nucleus; tokens: a ViT's last patch tokens at the nucleus; cls: class token of a window "
        "around the nucleus; auto: map or crop, what the encoder is made for",
    )
    window: int | None = Field(
        None, gt=0, description="side of what the network sees, px; none = the encoder's"
    )
    valid: int | None = Field(
        None,
        gt=0,
        description="map, tokens: side of the middle of a window that nuclei are read in, px; "
        "none = 224, or the window where that is smaller",
    )
    mpp: float | None = Field(
        None, gt=0, description="µm per pixel of the window; none = the encoder's"
    )
    floors: bool = Field(True, description="also run every floor with the same probes")
    out: Path = Field(Path("runs/eval"), description="folder for rows, predictions and features")
    seed: int = Field(0, ge=0, description="folds, SGD, PCA, random encoder, bootstrap")
    workers: int = Field(1, ge=0, description="threads that read images ahead")
    device: str = Field("auto", description="cpu, cuda, cuda:N; auto = cuda where there is one")
    batch: int = Field(
        256, ge=1, description="nuclei per forward pass; a window of 224 px counts as 8"
    )


def run(cfg: Eval) -> list[dict[str, Any]]:
    """Evaluate; append new rows to `out/results.jsonl` and print a table.

    Returns:
        The rows of this encoder and its floors, old and new.

    Raises:
        UserError: an unknown benchmark, a data folder or encoder that cannot be read, a split
            without nuclei, a probe that the protocol does not have.
    """
    from eval import benchmarks, sources
    from eval.samplers import Words
    from eval.summary import summary

    benchmark = benchmarks.find(cfg.benchmark)
    probes = _probes(cfg)
    device = _device(cfg.device)
    settings: dict[str, Any] = {"workers": cfg.workers, "device": device, "batch": cfg.batch}
    words = Words(cfg.sampler, cfg.window, cfg.valid, cfg.mpp, _align(cfg))
    subject = sources.resolve(cfg.encoder, words=words, seed=cfg.seed, **settings)
    table = benchmark.load(cfg.root)
    _describe(benchmark, table, cfg)
    # The same benchmark on other files is another measurement.
    version = f"{benchmark.version}+{table.content_hash[:8]}"
    tasks = [subject]
    if cfg.floors:
        tasks += sources.floors_of(subject, seed=cfg.seed, **settings)
    rows: list[dict[str, Any]] = []
    for source in tasks:
        rows += _measure(cfg, source, table, benchmark, probes, version=version, device=device)
    if subject.network is not None and not subject.is_floor:
        _write_gallery(cfg, subject, table, benchmark)
    scored = table.rows(cfg.split)
    print(
        f"\n{benchmark.name}, {cfg.split}: {len(scored)} nuclei of "
        f"{len(set(table.patient[scored]))} patients, protocol {cfg.protocol}, "
        f"95 % intervals over patients\n"
    )
    print(summary(rows, encoder=subject.name, out=cfg.out, seed=cfg.seed))
    print(
        f"\nrows: {cfg.out / 'results.jsonl'}\npredictions: {cfg.out / 'predictions'}", flush=True
    )
    return rows


def _align(cfg: Eval) -> Literal["centre", "released"]:
    """The published evaluation reads tokens with aligned corners, up to half a token beside."""
    return "released" if cfg.protocol == "muse" else "centre"


def _probes(cfg: Eval) -> list[str]:
    from eval.probes import PROBES

    known = [name for name in PROBES if cfg.protocol == "default" or name in MUSE_PROBES]
    if cfg.probe == "all":
        return known
    if cfg.probe not in known:
        raise UserError(
            f"protocol=muse has no probe '{cfg.probe}'; use probe=knn, probe=linear or probe=all."
        )
    return [cfg.probe]


def _device(word: str) -> str:
    import torch

    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=word)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={word} cannot be used ({str(error).splitlines()[0]}); use device=cpu."
        ) from None
    return word


def _describe(benchmark: "Benchmark", table: "Table", cfg: Eval) -> None:
    """Say on stderr what the data lacks; stop where nothing can be measured."""
    import numpy as np

    for split in ("train", cfg.split):
        if not len(table.rows(split)):
            raise UserError(f"{cfg.root} has no {split} nucleus; eval needs train and {cfg.split}.")
    for sentence in benchmark.check(cfg.root):
        print(f"note: {sentence}", file=sys.stderr)
    scored = np.bincount(table.label[table.rows(cfg.split)], minlength=len(table.classes))
    if len(np.unique(table.patient[table.rows(cfg.split)])) < 2:
        print(f"note: {cfg.split} has a single patient: there are no intervals.", file=sys.stderr)
    absent = [name for name, n in zip(table.classes, scored, strict=True) if not n]
    if absent:
        print(
            f"note: no {cfg.split} nucleus is {' or '.join(absent)}: left out of the means.",
            file=sys.stderr,
        )


def _measure(
    cfg: Eval,
    source: "Source",
    table: "Table",
    benchmark: "Benchmark",
    probes: list[str],
    *,
    version: str,
    device: str,
) -> list[dict[str, Any]]:
    """The rows of one source under every probe; what is on disk is not computed again."""
    from eval import bootstrap, results

    path = cfg.out / "results.jsonl"
    known = results.read(path)
    rows: list[dict[str, Any]] = []
    x: np.ndarray | None = None
    for probe in probes:
        key = results.Key(
            source.hash, benchmark.name, version, cfg.protocol, probe, cfg.seed, cfg.split
        )
        file = results.predictions_path(cfg.out, key, encoder=source.name)
        done = results.complete(known, key)
        if done and results.has_predictions(file, key):
            rows += [{**row, "encoder": source.name} for row in done]
            continue
        if x is None and source.features is not None:
            folder = cfg.out / "features"
            x = source.load(
                table, benchmark=benchmark.name, version=benchmark.version, folder=folder
            )
        began = time.perf_counter()
        outcome = _probe(cfg, probe, x, table, device=device)
        seconds = time.perf_counter() - began
        scored = table.rows(cfg.split)
        scores = outcome.test if cfg.split == "test" else outcome.val
        results.write_predictions(file, key, table, scored, scores, encoder=source.name)
        if not done:
            found = bootstrap.intervals(
                table.label[scored],
                scores.argmax(1),
                scores,
                table.patient[scored],
                classes=table.classes,
                seed=cfg.seed,
            )
            done = results.make_rows(
                key,
                found,
                encoder=source.name,
                task=benchmark.task,
                n=len(scored),
                seconds=seconds,
                params={**outcome.params, **source.params},
            )
            # The rows come last: a key that has rows has its predictions.
            have = {row["metric"] for row in known if results.key_of(row) == key}
            results.append(path, [row for row in done if row["metric"] not in have])
        print(f"{source.name}: {probe} in {seconds:.1f} s", file=sys.stderr, flush=True)
        # Two names may have one hash (an encoder that was not trained, and random weights).
        rows += [{**row, "encoder": source.name} for row in done]
    return rows


def _probe(
    cfg: Eval, probe: str, x: "np.ndarray | None", table: "Table", *, device: str
) -> "Outcome":
    from eval.floors import majority_scores
    from eval.probes import PROBES, Outcome, Part

    classes = len(table.classes)
    parts = {split: table.rows(split) for split in ("train", "val", "test")}
    if x is None:
        labels = table.label[parts["train"]]
        val, test = (
            majority_scores(labels, len(parts[s]), classes=classes) for s in ("val", "test")
        )
        return Outcome(val, test, {})
    given = [Part(x[rows], table.label[rows], table.patient[rows]) for rows in parts.values()]
    extra: dict[str, Any] = {"protocol": cfg.protocol} if probe == "knn" else {}
    return PROBES[probe](*given, classes=classes, seed=cfg.seed, device=device, **extra)


def _write_gallery(cfg: Eval, subject: "Source", table: "Table", benchmark: "Benchmark") -> None:
    """gallery.npz for the pictures of the report: some nuclei with features and pixels."""
    from eval.report.gallery import LIMIT, NAME, choose_rows, write_gallery

    limit = max(100, min(LIMIT, GALLERY_BYTES // (3 * subject.size**2)))
    rows = choose_rows(table.split, limit=limit, seed=cfg.seed)
    folder = cfg.out / "features"
    x = subject.load(table, benchmark=benchmark.name, version=benchmark.version, folder=folder)
    write_gallery(
        cfg.out / NAME,
        features=x[rows],
        crops=table.crops(subject.size, subject.mpp, rows),
        labels=table.label[rows],
        classes=table.classes,
        split=table.split[rows],
        patient=table.patient[rows],
        encoder=subject.name,
        encoder_hash=subject.hash,
        mpp=subject.mpp,
    )
