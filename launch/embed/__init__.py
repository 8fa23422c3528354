"""`lemon-muse embed`: the nuclei of slides through a frozen encoder, into one table of features."""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from data_prep.manifest import TCGA, one_group
from lemon_muse.config import Config
from lemon_muse.errors import RunError, UserError

if TYPE_CHECKING:
    from launch.embed.work import Way

log = logging.getLogger(__name__)

KINDS = (".h5ad", ".parquet", ".zarr")


class Classify(Config):
    """Predict the type of every nucleus: a logistic probe on the labelled nuclei of a benchmark."""

    benchmark: str = Field(description="brcam2c, folder, nucls, … (docs/benchmarks)")
    root: Path = Field(description="folder of the benchmark's data")
    task: str = Field("", description="task of the benchmark; empty = its first")
    image_mpp: float | None = Field(
        None, gt=0, description="µm per pixel of its images, where the data set does not say"
    )


class Embed(Config):
    """Features of every nucleus of slides; killed, the same words go on."""

    encoder: str = Field(
        description="as in lemon-muse eval: a folder, a released file, timm:NAME …"
    )
    slide: Path = Field(description="slide or image, or a folder of them (walked)")
    out: Path = Field(description="table to write: .h5ad, .parquet or .zarr")
    nuclei: Path | None = Field(
        None, description="detection file, or a folder of them; none = the built-in detector"
    )
    format: Literal["auto", "hoverfast", "cellvit", "hovernet", "qupath", "histoplus", "tables"] = (
        Field("auto", description="which tool wrote nuclei=")
    )
    slide_mpp: float | None = Field(
        None, ge=0.05, le=10, description="µm per level-0 px of slides that state none"
    )
    mpp: float | None = Field(
        None, gt=0, description="µm per px of what the encoder sees; none = the encoder's"
    )
    window: int | None = Field(
        None, gt=0, description="dense encoders: side of what it sees, px; none = the encoder's"
    )
    valid: int | None = Field(
        None,
        gt=0,
        description="dense encoders: side of the middle of a window in which nuclei are read, px; "
        "none = about half of the window",
    )
    min_score: float | None = Field(
        None, description="detections with a lower score are left out; those without one stay"
    )
    merge: float = Field(2.0, ge=0, le=20, description="nuclei within this distance are one, µm")
    patient: str = Field(
        TCGA, description="regular expression with one group, searched in the slide's file name"
    )
    classify: Classify | None = Field(None, description="predict a type for every nucleus")
    geojson: Path | None = Field(
        None, description="also write the nuclei with their types: .geojson file, or a folder"
    )
    geojson_style: Literal["qupath", "cellvit"] = Field(
        "qupath", description="one detection a nucleus, or CellViT's one feature a class"
    )
    seed: int = Field(0, ge=0, description="of the detector's sample places and the probe's folds")
    workers: int = Field(1, ge=0, description="threads that read the slide ahead of the network")
    device: str = Field("auto", description="cpu, cuda, cuda:N; auto = cuda where there is one")
    batch: int = Field(256, ge=1, description="nuclei per pass; a window of 224 px counts as 8")
    bf16: bool = Field(False, description="the network runs under bfloat16 autocast")

    @field_validator("out")
    @classmethod
    def _known_kind(cls, value: Path) -> Path:
        if value.suffix not in KINDS:
            raise ValueError(f"it must end in {', '.join(KINDS)}")
        return value

    _one_group = field_validator("patient")(one_group)


def run(cfg: Embed) -> Path:
    """Write the table and return its path.

    Features are kept in parts beside it (`OUT.parts/`) until the table is whole. A slide that
    cannot be done does not stop the others.

    Raises:
        UserError: words, files or the only slide are wrong, or `out` was made with other words.
        RunError: some slides could not be done (the table has the others), or no nucleus is there.
    """
    from launch.embed import slides, store, work

    store.check_extra(cfg.out)
    way = work.open_way(cfg)
    tasks, failed = slides.tasks_of(cfg, way.key)
    key = slides.key_of([task.key for task in tasks], sorted(failed), _words(cfg))
    folder = cfg.out.with_name(f"{cfg.out.name}.parts")
    if store.is_finished(cfg.out, key):
        shutil.rmtree(folder, ignore_errors=True)  # of a job that was killed at its very end
        print(f"{cfg.out} is finished already")
        return cfg.out
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for task in tasks:
        try:
            done.append(work.embed_slide(task, cfg, way, folder / f"{task.slide}-{task.key}"))
        except UserError as error:
            if len(tasks) + len(failed) == 1:
                raise
            failed[task.slide] = str(error)
            log.warning("%s cannot be done: %s", task.slide, error)
    if not sum(len(slide) for slide in done):
        raise RunError(_said(failed) or "no nucleus was found; look at nuclei= and min_score= .")
    _write(cfg, way, done, failed, folder, key)
    if failed:
        raise RunError(_said(failed) + f" {cfg.out} has the {len(done)} others.")
    shutil.rmtree(folder)
    return cfg.out


def _write(
    cfg: Embed, way: "Way", done: list[Any], failed: dict[str, str], folder: Path, key: str
) -> None:
    from launch.embed import labels, store

    about, predicted = _about(cfg, way, done, failed, key), None
    if cfg.classify is not None:
        probe = labels.fit_probe(cfg, way, folder)
        predicted = [probe.of_slide(slide) for slide in done]
        about["probe"] = probe.facts
    table = store.Output(done, dim=way.dim, about=about, predicted=predicted)
    if cfg.geojson is not None:
        labels.write_geojson(cfg.geojson, table, style=cfg.geojson_style)
    store.write(cfg.out, table, folder)
    types = f", {len(predicted[0].classes)} classes predicted" if predicted else ""
    print(f"{cfg.out}: {len(table)} nuclei of {len(done)} slides, {way.dim} features{types}")


def _about(
    cfg: Embed, way: "Way", done: list[Any], failed: dict[str, str], key: str
) -> dict[str, Any]:
    """What the table says of its making: plain values only, so that every reader takes it."""
    from lemon_muse import __version__

    shown = cfg.model_dump(mode="json", exclude_defaults=True, exclude={"workers"})
    nested = shown.pop("classify", {})
    shown |= {f"classify.{k}": v for k, v in nested.items()}
    return {
        "encoder": way.card,
        "version": __version__,
        "command": " ".join(["lemon-muse embed", *(f"{k}={v}" for k, v in shown.items())]),
        "slides": {slide.task.slide: slide.facts for slide in done},
        "failed": ", ".join(sorted(failed)),
        "key": key,
    }


def _words(cfg: Embed) -> dict[str, Any]:
    """The settings, beside those of each slide, that change the table."""
    return cfg.model_dump(mode="json", include={"classify", "geojson", "geojson_style", "seed"})


def _said(failed: dict[str, str]) -> str:
    """One sentence about the slides that could not be done; '' where there are none."""
    if not failed:
        return ""
    name, why = next(iter(sorted(failed.items())))
    more = f" (and {len(failed) - 1} more: {', '.join(sorted(failed)[1:4])})"
    return f"the slide {name} could not be done: {why}{more if len(failed) > 1 else ''}"
