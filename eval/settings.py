"""The settings of `lemon-muse eval`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from lemon_muse.config import Config


class Eval(Config):
    """Measure a frozen encoder on a benchmark, beside floors, with intervals over patients."""

    encoder: str = Field(
        "",
        description="encoder folder or run folder; released MUSE or LEMON file; timm folder; "
        "timm:NAME[,checkpoint_path=FILE]; torchvision:NAME[,weights=FILE]; "
        "python:MODULE.FUNCTION; random:ENCODER = the same network untrained; floor:majority, "
        "floor:colour, floor:histogram, floor:pixel_pca (optionally @40px0.25)",
    )
    benchmark: str = Field(
        "", description="brcam2c, folder, hest, midogpp, nucls, ocelot or puma (docs/benchmarks)"
    )
    root: Path = Field(Path(), description="folder of the benchmark's data, as it was unpacked")
    task: str = Field("", description="task of the benchmark; empty = its first")
    plan: str = Field(
        "auto",
        description="auto: the benchmark's own; official: its stated split; folds: 5 folds by "
        "patient; leave_out:GROUP and cross:GROUP: by hospital, scanner, domain …",
    )
    probe: str = Field(
        "all",
        description="knn, logistic, linear, uni, finetune, ridge, robustness, or several with "
        "commas; all = knn, logistic and linear for classes, ridge for genes",
    )
    protocol: Literal["default", "paper"] = Field(
        "default",
        description="default: grouped by patient, nothing chosen on test; paper: what the "
        "benchmark's publication did, its flaws included",
    )
    split: Literal["test", "val"] = Field(
        "test",
        description="split that is scored; val to compare settings without touching test: k and "
        "epoch are then not chosen on it",
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
    resize: bool = Field(
        False,
        description="sampler=crop: enlarge a window of window= px at mpp= to what the network "
        "takes, as the LEMON paper gives 40 px crops to tile models",
    )
    pos_resample: bool | None = Field(
        None,
        description="released MUSE ViTs: resample positions at load as the published evaluation "
        "does; none = under protocol=paper",
    )
    image_mpp: float | None = Field(
        None, gt=0, description="µm per pixel of the images, where the data set does not say"
    )
    slides: Path | None = Field(
        None,
        description="folder of the whole slides that the images were cut from: nuclei get their "
        "true surroundings (brcam2c, ocelot; puma: the context ROIs)",
    )
    floors: bool = Field(True, description="also run every floor with the same probes")
    sweep: Path | None = Field(
        None, description="YAML of encoders, benchmarks and probes: all of them, one after another"
    )
    out: Path = Field(Path("runs/eval"), description="folder for rows, predictions and features")
    seed: int = Field(0, ge=0, description="folds, SGD, PCA, random encoder, bootstrap")
    workers: int = Field(1, ge=0, description="threads that read images ahead")
    device: str = Field("auto", description="cpu, cuda, cuda:N; auto = cuda where there is one")
    batch: int = Field(
        256, ge=1, description="nuclei per forward pass; a window of 224 px counts as 8"
    )

    @model_validator(mode="after")
    def _complete(self) -> "Eval":
        lacking = [n for n in ("encoder", "benchmark", "root") if n not in self.model_fields_set]
        if lacking and self.sweep is None:
            raise ValueError(f"{lacking[0]}= is needed (or sweep=FILE.yaml)")
        return self
