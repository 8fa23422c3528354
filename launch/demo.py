"""`lemon-muse demo`: the whole way from images to a report, on generated tissue or real nuclei."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from launch import training
from lemon_muse.config import Config

if TYPE_CHECKING:
    from lemon_muse.recipe import LemonTrain

GENERATED_STEPS = 1200


class Demo(Config):
    """Prepare, pretrain, probe, export and report in one go; killed, the same words go on."""

    data: Path | None = Field(
        None,
        description="folder in BRCA-M2C's layout or with slides.csv; none = tissue is generated",
    )
    out: Path = Field(Path("runs/demo"), description="where everything is written")
    recipe: str = Field("demo.yaml", description="training recipe")
    mpp: float = Field(0.25, gt=0, description="µm per pixel of the crops")
    steps: int | None = Field(
        None, gt=0, description="steps of pretraining; none = as in the recipe, fewer without data="
    )
    slides: int = Field(48, ge=3, description="generated slides (without data=)")
    side: int = Field(1024, ge=256, description="side of a generated slide, px at 0.25 µm/px")
    seed: int = Field(0, ge=0, description="of tissue, weights, order, views and probes")
    workers: int = Field(2, ge=0, description="reading threads")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")


def run(cfg: Demo) -> Path:
    """Run all parts and return the report's folder."""
    began = time.monotonic()
    _announce(cfg)
    data = cfg.data or _generate(cfg)
    benchmark = _benchmark(data)
    recipe = _recipe(cfg, data, benchmark)
    _prepare(cfg, data, recipe)
    _part(f"3/6 pretrain: {recipe.steps} steps of {recipe.batch} crops")
    training.run(recipe)
    _evaluate(cfg, benchmark, data)
    _export(cfg)
    _report(cfg)
    minutes = (time.monotonic() - began) / 60
    print(
        f"\ndone in {minutes:.1f} min on {os.cpu_count()} cores. "
        f"Open {cfg.out / 'report' / 'report.html'}"
    )
    return cfg.out / "report"


def _announce(cfg: Demo) -> None:
    what = f"the nuclei of {cfg.data}" if cfg.data else f"{cfg.slides} slides of generated tissue"
    limit = "20" if cfg.data else "15"
    print(
        f"lemon-muse demo: pretrains a nucleus encoder on {what} without labels, probes it beside "
        f"floors, exports it and writes a report to {cfg.out}. Under {limit} minutes on 2 cores.",
        flush=True,
    )


def _part(title: str) -> None:
    print(f"\n== {title}", file=sys.stderr, flush=True)


def _generate(cfg: Demo) -> Path:
    from lemon_muse.synthetic import write_images

    _part(f"1/6 generate {cfg.slides} slides")
    folder = cfg.out / "tissue"
    write_images(folder, slides=cfg.slides, side=cfg.side, seed=cfg.seed)
    return folder


def _prepare(cfg: Demo, data: Path, recipe: "LemonTrain") -> Path:
    from data_prep import check, crops
    from lemon_muse.data import augment

    _part("2/6 prepare: crops around nuclei; positions only, no types")
    made = crops.run(
        crops.Crops(
            data=data,
            out=cfg.out / "crops",
            split="train",
            types=False,  # pretraining must not see a class: it is not even written
            mpp=cfg.mpp,
            size=augment.stored_size(recipe.view, recipe.window),
            seed=cfg.seed,
            workers=cfg.workers,
        )
    )
    check.run(check.Check(data=made, batch=recipe.batch, out=cfg.out / "check"))
    return made


def _recipe(cfg: Demo, data: Path, benchmark: str) -> "LemonTrain":
    """The training settings: the recipe file with this demo's folders."""
    from lemon_muse.config import load
    from lemon_muse.recipe import LemonTrain

    words = [
        cfg.recipe,
        f"data={cfg.out / 'crops'}",
        f"out={cfg.out / 'run'}",
        f"seed={cfg.seed}",
        f"workers={cfg.workers}",
        f"device={cfg.device}",
        f"probe.benchmark={benchmark}",
        f"probe.root={data}",
    ]
    # Generated tissue is easier than real one: it needs fewer steps.
    steps = cfg.steps or (None if cfg.data else GENERATED_STEPS)
    return load(LemonTrain, words + ([f"steps={steps}"] if steps else []))


def _evaluate(cfg: Demo, benchmark: str, data: Path) -> None:
    from eval import run as evaluation

    _part("4/6 probe: frozen features, beside floors, on patients never seen")
    evaluation.run(
        evaluation.Eval(
            encoder=str(cfg.out / "run"),
            benchmark=benchmark,
            root=data,
            out=cfg.out / "eval",
            seed=cfg.seed,
            workers=cfg.workers,
            device=cfg.device,
        )
    )


def _export(cfg: Demo) -> None:
    from lemon_muse.export import job

    _part("5/6 export")
    job.run(job.Export(run=cfg.out / "run", format="timm", out=cfg.out / "export" / "timm"))


def _report(cfg: Demo) -> None:
    from eval import report

    _part("6/6 report")
    report.run(
        report.Report(results=(str(cfg.out / "eval"),), run=cfg.out / "run", out=cfg.out / "report")
    )


def _benchmark(data: Path) -> str:
    """The benchmark that reads this folder."""
    from lemon_muse.data.layouts import detect

    return detect(data)  # a layout's benchmark has its name
