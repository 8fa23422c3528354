"""The settings of a training run and what they must satisfy.

What every method shares is in `Train`; `LemonTrain` is LEMON's recipe and the default,
`recipe_muse.MuseTrain` is MUSE's. `method.name` decides which of them a run's words make.
"""

import importlib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lemon_muse import distributed
from lemon_muse.backbones import Backbone
from lemon_muse.config import Config, flat_keys
from lemon_muse.data.augment import ViewConfig
from lemon_muse.data.compose import Subset, choose_slides, select
from lemon_muse.data.shards import Index, open_index
from lemon_muse.errors import UserError
from lemon_muse.methods.context import ContextConfig, stored_size
from lemon_muse.methods.contract import MethodConfig, Setting
from lemon_muse.methods.moco_v3 import MoCoV3Config
from lemon_muse.optim import Optim

# LEMON's released statistics (mean_std.json) and ImageNet's, the MoCo v3 reference's.
NORMS = {
    "lemon": ((0.5626309, 0.3856308, 0.5453570), (0.1810322, 0.1668266, 0.1369456)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
Normalise = Literal["shards", "lemon", "imagenet"]


class ProbeSettings(Config):
    """Online probe: KNN on labelled nuclei of held-out patients while training."""

    benchmark: str | None = Field(None, description="name of the benchmark; none = no online probe")
    root: Path | None = Field(None, description="its folder")
    every: int = Field(500, gt=0, description="steps between two probes")
    window: int | None = Field(
        None, gt=0, description="MUSE: window that is probed, px; none = the global views' size"
    )
    mpp: float | None = Field(
        None, gt=0, description="MUSE: µm per pixel of it; none = the coarsest of the views"
    )


class Watch(Config):
    """Logging and the collapse monitors."""

    every: int = Field(10, gt=0, description="steps between two log lines")
    collapse: Literal["warn", "stop", "off"] = Field(
        "warn", description="what to do when features collapse or the loss stays at chance"
    )


class Train(Config):
    """What all methods share; see `variant`."""

    data: Path = Field(description="folder of shards, from prep crops or prep rois")
    out: Path = Field(Path("runs/train"), description="run folder; the same words continue the run")
    steps: int = Field(gt=0, description="optimiser steps")
    batch: int = Field(gt=1, description="global batch: all ranks, all accumulation parts")
    accumulate: int = Field(1, gt=0, description="parts that a rank's batch is split into")
    normalise: Normalise = Field(
        description="mean and std: of these shards, LEMON's released ones, ImageNet's"
    )
    seed: int = Field(0, ge=0, description="of weights, order and views")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="autocast; losses are always fp32"
    )
    shuffle_blocks: int = Field(
        64, gt=0, description="blocks (or ROIs) of the shards that are shuffled together"
    )
    subset: Subset = Field(Subset(), description="part of the shards")
    method: MethodConfig = Field(description="the method")
    backbone: Config = Field(description="the network")
    view: Config = Field(description="augmentation")
    optim: Optim = Field(description="optimiser")
    probe: ProbeSettings = Field(ProbeSettings(), description="online probe")
    watch: Watch = Field(Watch(), description="logging")
    save_every: int = Field(500, gt=0, description="steps between two checkpoints")
    keep: int = Field(2, gt=0, description="checkpoints that are kept")
    workers: int = Field(2, ge=0, description="reading threads per rank")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    compile: bool = Field(False, description="torch.compile the networks (pays on long GPU runs)")
    name: str = Field("encoder", description="name of the exported encoder, for tables")

    @classmethod
    def variant(cls, tree: dict[str, Any]) -> type["Train"]:
        """The settings of the method that these words name; LEMON's where they name none."""
        if cls is not Train:
            return cls
        method = tree.get("method")
        name = method.get("name") if isinstance(method, dict) else None
        if name in VARIANTS:
            module, settings = VARIANTS[name]
            found: type[Train] = getattr(importlib.import_module(module), settings)
            return found
        return LemonTrain

    @classmethod
    def elsewhere(cls, key: str) -> str | None:
        here = cls.model_fields["method"].default.name
        names = ["moco_v3", *VARIANTS]
        having = [
            name
            for name in names
            if any(
                known == key or known.startswith(f"{key}.")
                for known in flat_keys(Train.variant({"method": {"name": name}}))
            )
        ]
        if not having:
            return None
        return (
            f"method.name={here} has no such key, it goes with method.name={' or '.join(having)}; "
            f"see lemon-muse train method.name={here} --help"
        )

    @model_validator(mode="after")
    def _fits(self) -> "Train":
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} is not divisible by accumulate={self.accumulate}."
            )
        if self.probe.benchmark and not self.probe.root:
            raise ValueError("probe.benchmark needs probe.root=FOLDER, the benchmark's folder.")
        return self

    def open_data(self) -> Index:
        """The shards, as the method reads them."""
        raise NotImplementedError

    def check(self, index: Index) -> None:
        """Mistakes that would only show after minutes."""
        world = distributed.world()
        samples, what = self.samples(index)
        if samples < self.batch:
            where = self.data if self.subset.whole else f"the subset of {self.data}"
            raise UserError(
                f"{where} holds {samples} {what}, fewer than batch={self.batch}; "
                f"set batch={2 ** max(1, samples.bit_length() - 1)} or smaller, or prepare more "
                f"data."
            )
        if self.batch % (world * self.accumulate):
            raise UserError(
                f"batch={self.batch} is not divisible by ranks × accumulate = {world} × "
                f"{self.accumulate}."
            )
        if self.batch // (world * self.accumulate) < 2:
            raise UserError(
                f"fewer than 2 {what} per rank and part: batch norm needs more; raise batch=."
            )

    def samples(self, index: Index) -> tuple[int, str]:
        """What a batch is made of: how many there are, and what they are called."""
        chosen = select(index, self.subset)
        return index.count if chosen is None else chosen.total, "nuclei"

    def setting(self, index: Index) -> Setting:
        """What the method is told, from the settings and the shards."""
        mean, std = _three(index.header["mean"]), _three(index.header["std"])
        if self.normalise != "shards":
            mean, std = NORMS[self.normalise]
        facts = {"stored": index.size, "mpp": index.mpp, "mean": mean, "std": std}
        return self.told({**facts, "slides": self._slides(index)})

    def _slides(self, index: Index) -> dict[str, dict[str, Any]]:
        """`Index.slides`, with a count of 0 for those that `subset` leaves out."""
        about = index.slides
        if not self.subset.by_slide:
            return about
        pairs = zip(about.items(), choose_slides(index, self.subset), strict=True)
        return {name: slide if mine else {**slide, "count": 0} for (name, slide), mine in pairs}

    def setting_again(self, facts: dict[str, Any]) -> Setting:
        """The setting of a run, from its settings and `shard_facts`."""
        return self.told({**facts, "mean": _three(facts["mean"]), "std": _three(facts["std"])})

    def told(self, facts: dict[str, Any]) -> Setting:
        """What the method is told, with these facts of the shards."""
        return Setting(
            steps=self.steps,
            batch=self.batch // self.accumulate,
            window=self.window_px,
            seed=self.seed,
            view=self.view,
            backbone=self.backbone,
            **facts,
        )

    @property
    def window_px(self) -> int:
        """Side of what the network sees, px."""
        raise NotImplementedError


class LemonTrain(Train):
    """Pretrain a nucleus encoder on crops (method.name=moco_v3). The defaults are LEMON's recipe.

    With method.name=muse the keys are MUSE's: lemon-muse train method.name=muse --help
    """

    steps: int = Field(36600, gt=0, description="optimiser steps (LEMON: 150 M samples at 4096)")
    batch: int = Field(4096, gt=1, description="global batch: all ranks, all accumulation parts")
    accumulate: int = Field(
        1, gt=0, description="parts that a rank's batch is split into; negatives come from one part"
    )
    normalise: Normalise = Field(
        "shards", description="mean and std: of these shards, LEMON's released ones, ImageNet's"
    )
    method: MoCoV3Config = Field(MoCoV3Config(), description="the method")
    backbone: Backbone = Field(Backbone(), description="the network")
    view: ViewConfig = Field(ViewConfig(), description="augmentation")
    optim: Optim = Field(Optim(), description="optimiser")
    window: int = Field(
        40, gt=0, description="side of the window the network sees, px of the shards"
    )
    roi_edge: Literal["drop", "reflect"] = Field(
        "drop", description="crops from ROI shards: nuclei at a ROI's border out, or mirrored"
    )

    def open_data(self) -> Index:
        """The shards; a set of ROIs is read as crops."""
        index = open_index(self.data)
        if index.kind == "rois":
            context = getattr(self.method, "context", ContextConfig())
            side = stored_size(context, self.view, self.window)
            return index.as_crops(side, edge=self.roi_edge)
        return index

    def check(self, index: Index) -> None:
        super().check(index)
        if self.window > index.size:
            raise UserError(
                f"window={self.window} px is larger than the stored crops of {index.size} px; "
                f"set window={index.size} or prepare crops with size={self.window} or more."
            )

    @property
    def window_px(self) -> int:
        return self.window


# Settings of the methods that do not take LEMON's: late imports, because they derive from `Train`.
VARIANTS = {
    "dinov2": ("lemon_muse.recipe_dinov2", "Dinov2Train"),
    "muse": ("lemon_muse.recipe_muse", "MuseTrain"),
    "joint": ("lemon_muse.recipe_joint", "JointTrain"),
}

# What may change when a run is continued: nothing that has a part in the result.
FREE = (
    "data",
    "out",
    "subset.cache",
    "save_every",
    "keep",
    "workers",
    "device",
    "compile",
    "watch",
    "probe",
    "name",
)


def shard_facts(told: Setting) -> dict[str, Any]:
    """What a checkpoint keeps of the shards, so that it can be opened without them."""
    return {"stored": told.stored, "mpp": told.mpp, "mean": told.mean, "std": told.std}


def _three(values: list[float]) -> tuple[float, float, float]:
    r, g, b = values
    return r, g, b
