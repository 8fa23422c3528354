"""The settings of the `views` job: those of a training run, of each method's kind."""

from pathlib import Path
from typing import Any

from pydantic import Field

from lemon_muse.config import Config
from lemon_muse.recipe import LemonTrain, Train
from lemon_muse.recipe_dinov2 import Dinov2Train
from lemon_muse.recipe_joint import JointTrain
from lemon_muse.recipe_muse import MuseTrain


class _Asked(Config):
    out: Path = Field(Path("runs/views"), description="folder of the pictures and views.json")
    step: int = Field(0, ge=0, description="the step of the run that is drawn")


class Views(_Asked, Train):
    """Draw what a step of a run sees; the words are those of train, or a run's config.yaml."""

    count: int = Field(gt=0, description="samples of the batch that are drawn")

    @classmethod
    def variant(cls, tree: dict[str, Any]) -> type[Config]:  # type: ignore[override]
        """The words of the method that these name."""
        if cls is not Views:
            return cls
        base = Train.variant(tree)
        kinds: tuple[type[Config], ...] = (MuseViews, JointViews, DinoViews, LemonViews)
        return next(kind for kind in kinds if base in kind.__bases__)


class LemonViews(_Asked, LemonTrain):
    """Crops and their views (methods on crops)."""

    count: int = Field(20, gt=0, description="nuclei of the batch that are drawn, spread over it")


class MuseViews(_Asked, MuseTrain):
    """ROIs, their views and the nuclei that they share (method.name=muse)."""

    count: int = Field(4, gt=0, description="ROIs of the batch that are drawn, one picture each")


class JointViews(_Asked, JointTrain):
    """ROIs and their views, those of the dense network (method.name=joint)."""

    count: int = Field(4, gt=0, description="ROIs of the batch that are drawn, one picture each")


class DinoViews(_Asked, Dinov2Train):
    """Crops and their views, global and local ones (method.name=dinov2)."""

    count: int = Field(12, gt=0, description="nuclei of the batch that are drawn, spread over it")


OfRois = MuseViews | JointViews
OfCrops = LemonViews | DinoViews
