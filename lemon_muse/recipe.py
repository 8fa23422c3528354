"""The settings of a training run and what they must satisfy; their defaults are LEMON's recipe."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lemon_muse import distributed
from lemon_muse.backbones import Backbone
from lemon_muse.config import Config
from lemon_muse.data.augment import ViewConfig, stored_size
from lemon_muse.data.shards import Index, open_index
from lemon_muse.errors import UserError
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.moco_v3 import MoCoV3Config
from lemon_muse.optim import Optim

# LEMON's released statistics (mean_std.json) and ImageNet's, the MoCo v3 reference's.
NORMS = {
    "lemon": ((0.5626309, 0.3856308, 0.5453570), (0.1810322, 0.1668266, 0.1369456)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class ProbeSettings(Config):
    """Online probe: KNN on labelled nuclei of held-out patients while training."""

    benchmark: str | None = Field(None, description="name of the benchmark; none = no online probe")
    root: Path | None = Field(None, description="its folder")
    every: int = Field(500, gt=0, description="steps between two probes")


class Watch(Config):
    """Logging and the collapse monitors."""

    every: int = Field(10, gt=0, description="steps between two log lines")
    collapse: Literal["warn", "stop", "off"] = Field(
        "warn", description="what to do when features collapse or the loss stays at chance"
    )


class Train(Config):
    """Pretrain a nucleus encoder on crop shards. The defaults are LEMON's recipe."""

    data: Path = Field(description="folder of crop shards (prep crops) or ROI shards (prep rois)")
    out: Path = Field(Path("runs/train"), description="run folder; the same words continue the run")
    steps: int = Field(36600, gt=0, description="optimiser steps (LEMON: 150 M samples at 4096)")
    batch: int = Field(4096, gt=1, description="global batch: all ranks, all accumulation parts")
    accumulate: int = Field(
        1, gt=0, description="parts that a rank's batch is split into; negatives come from one part"
    )
    window: int = Field(
        40, gt=0, description="side of the window the network sees, px of the shards"
    )
    normalise: Literal["shards", "lemon", "imagenet"] = Field(
        "shards", description="mean and std: of these shards, LEMON's released ones, ImageNet's"
    )
    seed: int = Field(0, ge=0, description="of weights, order and views")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="autocast; losses are always fp32"
    )
    shuffle_blocks: int = Field(
        64, gt=0, description="blocks (or ROIs) of the shards that are shuffled together"
    )
    roi_edge: Literal["drop", "reflect"] = Field(
        "drop", description="crops from ROI shards: nuclei at a ROI's border out, or mirrored"
    )
    method: MoCoV3Config = Field(MoCoV3Config(), description="the method")
    backbone: Backbone = Field(Backbone(), description="the network")
    view: ViewConfig = Field(ViewConfig(), description="augmentation")
    optim: Optim = Field(Optim(), description="optimiser")
    probe: ProbeSettings = Field(ProbeSettings(), description="online probe")
    watch: Watch = Field(Watch(), description="logging")
    save_every: int = Field(500, gt=0, description="steps between two checkpoints")
    keep: int = Field(2, gt=0, description="checkpoints that are kept")
    workers: int = Field(2, ge=0, description="reading threads per rank")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    compile: bool = Field(False, description="torch.compile the networks (pays on long GPU runs)")
    name: str = Field("encoder", description="name of the exported encoder, for tables")

    @model_validator(mode="after")
    def _fits(self) -> "Train":
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} is not divisible by accumulate={self.accumulate}."
            )
        if self.probe.benchmark and not self.probe.root:
            raise ValueError("probe.benchmark needs probe.root=FOLDER, the benchmark's folder.")
        return self


# What may change when a run is continued: nothing that has a part in the result.
FREE = (
    "data",
    "out",
    "save_every",
    "keep",
    "workers",
    "device",
    "compile",
    "watch",
    "probe",
    "name",
)


def open_data(cfg: Train) -> Index:
    """The shards as the method wants them; a set of ROIs is read as crops too."""
    index = open_index(cfg.data)
    if index.kind == "rois":
        size = stored_size(cfg.view, cfg.window)
        return index.as_crops(size, edge=cfg.roi_edge)
    return index


def check(cfg: Train, index: Index) -> None:
    """Mistakes that would only show after minutes."""
    world = distributed.world()
    if index.count < cfg.batch:
        raise UserError(
            f"{cfg.data} holds {index.count} nuclei, fewer than batch={cfg.batch}; "
            f"set batch={2 ** (index.count.bit_length() - 1)} or smaller, or prepare more data."
        )
    if cfg.window > index.size:
        raise UserError(
            f"window={cfg.window} px is larger than the stored crops of {index.size} px; "
            f"set window={index.size} or prepare crops with size={cfg.window} or more."
        )
    if cfg.batch % (world * cfg.accumulate):
        raise UserError(
            f"batch={cfg.batch} is not divisible by ranks × accumulate = {world} × "
            f"{cfg.accumulate}."
        )
    if cfg.batch // (world * cfg.accumulate) < 2:
        raise UserError(
            "fewer than 2 crops per rank and part: batch norm needs more; raise batch=."
        )


def setting(cfg: Train, index: Index) -> Setting:
    """What the method is told, from the settings and the shards."""
    mean, std = _three(index.header["mean"]), _three(index.header["std"])
    if cfg.normalise != "shards":
        mean, std = NORMS[cfg.normalise]
    return _setting(cfg, {"stored": index.size, "mpp": index.mpp, "mean": mean, "std": std})


def shard_facts(told: Setting) -> dict[str, Any]:
    """What a checkpoint keeps of the shards, so that it can be opened without them."""
    return {"stored": told.stored, "mpp": told.mpp, "mean": told.mean, "std": told.std}


def setting_again(cfg: Train, facts: dict[str, Any]) -> Setting:
    """The setting of a run, from its settings and `shard_facts`."""
    return _setting(cfg, {**facts, "mean": _three(facts["mean"]), "std": _three(facts["std"])})


def _setting(cfg: Train, facts: dict[str, Any]) -> Setting:
    return Setting(
        steps=cfg.steps,
        batch=cfg.batch // cfg.accumulate,
        window=cfg.window,
        seed=cfg.seed,
        view=cfg.view,
        backbone=cfg.backbone,
        **facts,
    )


def _three(values: list[float]) -> tuple[float, float, float]:
    r, g, b = values
    return r, g, b
