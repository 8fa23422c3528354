"""From slides to checked shards in one command: manifest, nuclei, crops, ROIs, check."""

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from data_prep import check, manifest, nuclei
from data_prep.crops import Crops, CropSettings
from data_prep.rois import Rois, RoiSettings
from lemon_muse.config import Config


class Chain(Config):
    """Slides (and detections) in, checked crop and ROI shards out; killed, the same words go on.

    Writes out/manifest.csv, out/nuclei, out/crops, out/rois and the pictures of the checks. For
    words that are not here, run the jobs one by one.
    """

    data: str = Field(description="folders of slides and csv files, as for prep manifest")
    out: Path = Field(description="folder of everything that is made")
    detections: Path | None = Field(
        None, description="folder of a detector's files; none = the built-in detector"
    )
    mpp: float | None = Field(
        None, ge=0.05, le=10, description="µm per level-0 px of all slides that state none"
    )
    patient: str = Field(
        manifest.TCGA, description="regular expression with one group, searched in the file name"
    )
    make: Literal["both", "crops", "rois"] = Field("both", description="which shards are made")
    crops: CropSettings = Field(CropSettings(), description="of the crops")
    rois: RoiSettings = Field(RoiSettings(), description="of the ROIs")
    seed: int = Field(0, ge=0, description="of every choice and of the mixing")
    workers: int = Field(2, ge=0, description="processes over slides; 0: this one")


def run(cfg: Chain) -> Path:
    """Run the jobs one after the other and return the folder.

    Raises:
        UserError, RunError: as the jobs do.
    """
    table, found = cfg.out / "manifest.csv", cfg.out / "nuclei"
    cfg.out.mkdir(parents=True, exist_ok=True)
    _say("manifest")
    manifest.run(
        manifest.Manifest(
            data=cfg.data, out=table, mpp=cfg.mpp, patient=cfg.patient, workers=cfg.workers
        )
    )
    _say("nuclei")
    nuclei.run(
        nuclei.Nuclei(
            data=table,
            out=found,
            detections=cfg.detections,
            seed=cfg.seed,
            workers=cfg.workers,
        )
    )
    where = {"data": found, "layout": "slides", "seed": cfg.seed, "workers": cfg.workers}
    for job, settings in ((Crops, cfg.crops), (Rois, cfg.rois)):
        name = job.__name__.lower()
        if cfg.make not in ("both", name):
            continue
        _say(name)
        made = sys.modules[job.__module__].run(
            job.model_validate({**where, "out": cfg.out / name, **settings.model_dump()})
        )
        check.run(check.Check(data=made, seed=cfg.seed, workers=cfg.workers))
    return cfg.out


def _say(part: str) -> None:
    print(f"== {part}", file=sys.stderr, flush=True)
