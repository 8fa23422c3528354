"""`lemon-muse eval sweep=FILE.yaml`: encoders × benchmarks, one row lost at most when killed."""

import sys
import traceback
from pathlib import Path
from typing import Any

from eval.run import run
from eval.settings import Eval
from lemon_muse.config import read, validate
from lemon_muse.errors import RunError, UserError


def run_sweep(cfg: Eval) -> list[dict[str, Any]]:
    """Every encoder on every benchmark; what is in `out/results.jsonl` is not computed again.

    A combination that fails does not stop the others; each failure is told at the end.

    The file::

        encoders:                       # words of encoder=, or with their own settings
          - runs/lemon
          - {encoder: "timm:resnet50,checkpoint_path=r50.pth", window: 224, mpp: 0.5}
        benchmarks:                     # words of eval
          - {benchmark: brcam2c, root: data/brca-m2c}
          - {benchmark: midogpp, root: data/midogpp, task: mitosis, plan: "cross:domain"}
        seeds: [0, 1]                   # optional
        probe: knn,logistic             # optional: any further word, for all

    Raises:
        UserError: the file cannot be read or a combination is no valid set of words.
        RunError: some combinations failed.
    """
    assert cfg.sweep is not None
    jobs = plan(cfg.sweep, {k: getattr(cfg, k) for k in cfg.model_fields_set if k != "sweep"})
    rows: list[dict[str, Any]] = []
    failed = []
    for number, job in enumerate(jobs, start=1):
        name = f"{job.encoder} on {job.benchmark} {job.task}".strip()
        print(f"[{number}/{len(jobs)}] {name}", file=sys.stderr, flush=True)
        try:
            rows += run(job)
        except Exception as error:  # whatever one of them raises, the others are to be done
            if not isinstance(error, UserError | RunError | OSError):
                traceback.print_exc()
            print(f"[{number}/{len(jobs)}] {name} failed: {error}", file=sys.stderr, flush=True)
            failed.append(f"{name} ({error})")
    print(f"\n{len(jobs) - len(failed)} of {len(jobs)} combinations are done; rows in {cfg.out}")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(jobs)} combinations failed: {'; '.join(failed)} "
            f"Mend them and run the same words: the others are not computed again."
        )
    return rows


def plan(path: Path, shared: dict[str, Any]) -> list[Eval]:
    """The settings of every combination, benchmark by benchmark."""
    tree = read(Eval, [str(path)])
    if not tree.get("encoders") or not tree.get("benchmarks"):
        raise UserError(f"sweep={path} needs the lists 'encoders' and 'benchmarks'.")
    seeds = tree.pop("seeds", None) or [None]
    encoders, marks = tree.pop("encoders"), tree.pop("benchmarks")
    jobs = []
    for mark in marks:
        mark = {"benchmark": mark} if isinstance(mark, str) else mark
        for encoder in encoders:
            encoder = {"encoder": encoder} if isinstance(encoder, str) else encoder
            for seed in seeds:
                # What is typed beats the file's common words, as everywhere; not what the file
                # says of one encoder or benchmark.
                words = {**tree, **shared, **mark, **encoder}
                words |= {} if seed is None else {"seed": seed}
                jobs.append(_settings(path, words))
    return jobs


def _settings(path: Path, words: dict[str, Any]) -> Eval:
    if words.get("sweep"):
        raise UserError(f"sweep={path} names another sweep; list its combinations here.")
    try:
        return validate(Eval, words)
    except UserError as error:
        raise UserError(
            f"sweep={path}, {words.get('encoder')} on {words.get('benchmark')}: {error}"
        ) from None
