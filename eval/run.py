"""`lemon-muse eval`: a frozen encoder and its floors through the probes of a benchmark."""

import sys
from typing import TYPE_CHECKING, Any

from eval.settings import Eval
from lemon_muse.errors import UserError

if TYPE_CHECKING:
    from eval.benchmarks import Benchmark, Request
    from eval.measure import Job
    from eval.sources import Source
    from lemon_muse.data.table import Table

__all__ = ["Eval", "run"]

# Bytes of crops in gallery.npz: with large windows it holds fewer nuclei.
GALLERY_BYTES = 64_000_000


def run(cfg: Eval) -> list[dict[str, Any]]:
    """Evaluate; append new rows to `out/results.jsonl` and print a table.

    Returns:
        The rows of this encoder and its floors, old and new.

    Raises:
        UserError: an unknown benchmark, a data folder or encoder that cannot be read, a split
            without nuclei, a probe that the task or the protocol does not have.
    """
    if cfg.sweep is not None:
        from eval.sweep import run_sweep

        return run_sweep(cfg)
    from eval import benchmarks, sources
    from eval.measure import measure
    from eval.samplers import Words
    from eval.summary import summary

    benchmark = benchmarks.find(cfg.benchmark)
    device = _device(cfg.device)
    request = _request(cfg, benchmark)
    paper = _paper(cfg, benchmark, request)
    settings: dict[str, Any] = {"workers": cfg.workers, "device": device, "batch": cfg.batch}
    align: Any = paper.align if paper else "centre"
    words = Words(cfg.sampler, cfg.window, cfg.valid, cfg.mpp, align, cfg.resize, cfg.pos_resample)
    subject = sources.resolve(cfg.encoder, words=words, seed=cfg.seed, **settings)
    table = benchmark.load(cfg.root, request)
    job = _job(cfg, benchmark, request, table, device=device)
    _refuse_idle(subject, job)
    _describe(benchmark, job, cfg, request)
    rows: list[dict[str, Any]] = []
    floors = sources.floors_of(subject, seed=cfg.seed, **settings) if cfg.floors else []
    for source in [subject, *floors]:
        rows += measure(source, job)
    if subject.network is not None and not subject.is_floor and table.targets is None:
        _write_gallery(cfg, subject, job)
    print(f"\n{_heading(job)}\n")
    print(summary(rows, encoder=subject.name, out=cfg.out, seed=cfg.seed))
    print(
        f"\nrows: {cfg.out / 'results.jsonl'}\npredictions: {cfg.out / 'predictions'}", flush=True
    )
    return rows


def _request(cfg: Eval, benchmark: "Benchmark") -> "Request":
    from eval.benchmarks import Request, task_of

    asked = Request(cfg.task, cfg.protocol, cfg.image_mpp, cfg.slides, cfg.out / "cache", cfg.seed)
    task_of(benchmark, asked)
    return asked


def _paper(cfg: Eval, benchmark: "Benchmark", request: "Request") -> Any:
    """The published protocol, said aloud; None under the default one."""
    from eval.benchmarks import task_of

    if cfg.protocol == "default":
        return None
    task = task_of(benchmark, request)
    paper = benchmark.paper(task)
    if paper is None:
        raise UserError(f"nothing is published on {benchmark.name} {task}; use protocol=default.")
    print(f"note: protocol=paper ({paper.source}): {paper.says}", file=sys.stderr)
    return paper


def _job(
    cfg: Eval, benchmark: "Benchmark", request: "Request", table: "Table", *, device: str
) -> "Job":
    from eval import plans
    from eval.benchmarks import task_of
    from eval.measure import Job

    task = task_of(benchmark, request)
    if cfg.split == "val":
        if cfg.plan not in ("auto", "official"):
            raise UserError(
                f"split=val scores the val part of the stated split, and plan={cfg.plan} divides "
                f"otherwise; leave one of them out."
            )
        if not len(table.rows("val")):
            raise UserError(f"{cfg.root} has no val nucleus; use split=test.")
        folds = plans.official(table, scored="val")
    elif cfg.plan == "auto":
        folds = benchmark.folds(table, request)
    else:
        folds = plans.from_word(cfg.plan, table, seed=cfg.seed)
    if cfg.protocol == "default":
        folds = plans.apart(table, folds)
    # The same benchmark on other files is another measurement.
    return Job(
        benchmark=benchmark.name,
        task=task if cfg.plan == "auto" else f"{task} {cfg.plan}",
        version=f"{benchmark.version}+{table.content_hash[:8]}",
        table=table,
        folds=tuple(folds),
        probes=_probes(cfg, benchmark, task, table),
        protocol=cfg.protocol,
        split=cfg.split,
        seed=cfg.seed,
        out=cfg.out,
        device=device,
        workers=cfg.workers,
        batch=cfg.batch,
    )


def _probes(cfg: Eval, benchmark: "Benchmark", task: str, table: "Table") -> tuple[str, ...]:
    from eval.probes import PROBES, USUAL

    kind = "class" if table.targets is None else "regression"
    known = [name for name, (_, _, measures) in PROBES.items() if measures == kind]
    if kind == "class":
        known.append("robustness")
    usual = [name for name in USUAL if name in known]
    if cfg.protocol == "paper":
        paper = benchmark.paper(task)
        known = list(paper.probes) if paper else []
        usual = [name for name in known if name != "finetune"]
    if cfg.probe == "all":
        return tuple(usual)
    wanted = tuple(dict.fromkeys(word.strip() for word in cfg.probe.split(",") if word.strip()))
    wrong = [name for name in wanted if name not in known]
    if wrong or not wanted:
        what = "protocol=paper" if cfg.protocol == "paper" else f"{benchmark.name} {task}"
        raise UserError(
            f"{what} has no probe '{(wrong or [''])[0]}'; use one or more of "
            f"{', '.join(known)}, or all."
        )
    return wanted


def _refuse_idle(subject: "Source", job: "Job") -> None:
    """Say which probes the encoder cannot take; stop where it can take none."""
    from eval.measure import possible

    idle = [probe for probe in job.probes if not possible(subject, probe)]
    if not idle:
        return
    said = (
        f"{subject.name} cannot take probe={','.join(idle)}: finetune needs a trained network, "
        f"ridge and robustness need features"
    )
    if len(idle) == len(job.probes):
        raise UserError(f"{said}; choose another probe= or encoder=.")
    print(f"note: {said}.", file=sys.stderr)


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


def _describe(benchmark: "Benchmark", job: "Job", cfg: Eval, request: "Request") -> None:
    """Say on stderr what the data lacks; stop where nothing can be measured."""
    import numpy as np

    from eval.plans import shares_patients

    for fold in job.folds:
        for what, rows in (("train", fold.train), (fold.name, fold.test)):
            if not len(rows):
                raise UserError(f"{cfg.root} has no {what} nucleus; eval needs train and test.")
    for sentence in benchmark.check(cfg.root, request):
        print(f"note: {sentence}", file=sys.stderr)
    table, scored = job.table, job.scored
    if shares_patients(table, job.folds):
        print("note: train and test share patients under this plan.", file=sys.stderr)
    if len(np.unique(table.patient[scored])) < 2:
        print(f"note: {cfg.split} has a single patient: there are no intervals.", file=sys.stderr)
    if table.targets is None:
        counts = np.bincount(table.label[scored], minlength=len(table.classes))
        absent = [name for name, n in zip(table.classes, counts, strict=True) if not n]
        if absent:
            print(
                f"note: no {cfg.split} nucleus is {' or '.join(absent)}: left out of the means.",
                file=sys.stderr,
            )


def _heading(job: "Job") -> str:
    people = len(set(job.table.patient[job.scored].tolist()))
    folds = f"{len(job.folds)} folds, " if len(job.folds) > 1 else ""
    return (
        f"{job.benchmark} {job.task}, {job.split}: {len(set(job.scored.tolist()))} nuclei of "
        f"{people} patients, {folds}protocol {job.protocol}, 95 % intervals over patients"
    )


def _write_gallery(cfg: Eval, subject: "Source", job: "Job") -> None:
    """gallery.npz for the pictures of the report: some nuclei with features and pixels."""
    from eval.report.gallery import LIMIT, NAME, choose_rows, write_gallery

    table = job.table
    limit = max(100, min(LIMIT, GALLERY_BYTES // (3 * subject.size**2)))
    rows = choose_rows(table.split, limit=limit, seed=cfg.seed)
    write_gallery(
        cfg.out / NAME,
        features=job.features(subject)[rows],
        crops=table.crops(subject.size, subject.mpp, rows),
        labels=table.label[rows],
        classes=table.classes,
        split=table.split[rows],
        patient=table.patient[rows],
        encoder=subject.name,
        encoder_hash=subject.hash,
        mpp=subject.mpp,
    )
