"""`lemon-muse demo`: the whole way from images to a report, on generated tissue or on real nuclei."""

import os
import sys
import time
from pathlib import Path

from pydantic import Field

from lemon_muse.config import Config


class Demo(Config):
    """Prepare, pretrain, probe, export and report in one go; killed, it goes on with the same words."""

    data: Path | None = Field(
        None, description="folder in BRCA-M2C's layout or with slides.csv; none = tissue is generated"
    )
    out: Path = Field(Path("runs/demo"), description="where everything is written")
    recipe: str | None = Field(
        None, description="training recipe; none = demo.yaml, or demo_brca.yaml with data="
    )
    steps: int | None = Field(None, gt=0, description="steps of pretraining; none = as in the recipe")
    slides: int = Field(24, ge=3, description="generated slides (without data=)")
    side: int = Field(1024, ge=256, description="side of a generated slide, px at 0.25 µm/px")
    seed: int = Field(0, ge=0, description="of tissue, weights, order, views and probes")
    workers: int = Field(2, ge=0, description="reading threads")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")


def run(cfg: Demo) -> Path:
    """Run all parts and return the report's folder."""
    began = time.monotonic()
    _announce(cfg)
    data = cfg.data or _generate(cfg)
    shards = _prepare(cfg, data)
    run_folder = _train(cfg, data, shards)
    benchmark = _benchmark(data)
    _evaluate(cfg, run_folder, benchmark, data)
    _export(cfg, run_folder)
    _report(cfg, run_folder, data)
    minutes = (time.monotonic() - began) / 60
    print(f"\ndone in {minutes:.1f} min on {_cores()} cores. Open {cfg.out / 'report' / 'report.html'}")
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


def _prepare(cfg: Demo, data: Path) -> Path:
    from data_prep import check, crops
    from lemon_muse.config import load

    _part("2/6 prepare: crops around nuclei, positions only, no types")
    recipe = load(_train_model(), [_recipe_name(cfg), "data=x"])
    stored = crops.stored_size(recipe.window)
    # Pretraining must not see a class: the types are not even written.
    made = crops.run(
        crops.Crops(
            data=data, out=cfg.out / "crops", split="train", types=False, mpp=_mpp(cfg),
            size=stored, seed=cfg.seed, workers=cfg.workers,
        )
    )  # fmt: skip
    check.run(check.Check(data=made, batch=recipe.batch, out=cfg.out / "check"))
    return made
