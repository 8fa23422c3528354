"""The settings of a DINOv2 run on crops; values are those of the DINOv2 reference where it has one.

Its `ssl_default_config.yaml`: weight decay 0.04 to 0.4, clipping at 3, a warm-up of a tenth of the
run, no decay of biases and norms. Its base rate 4e-3 at a batch of 1024 goes with a decay from
layer to layer that there is none of here; the rate is that of its ViT-L/14, which DinoBloom took
for cells, too. That the patch projection learns at a fifth of the rate is left out.
"""

import math

from pydantic import Field

from lemon_muse.backbones import Backbone
from lemon_muse.methods.dinov2 import Dinov2Config
from lemon_muse.recipe import LemonTrain
from lemon_muse.recipe_muse import MuseOptim


class Dinov2Optim(MuseOptim):
    """Optimiser and learning rate; the defaults are DINOv2's."""

    lr: float = Field(
        2e-4,
        gt=0,
        description="peak learning rate for a global batch of 1024; scaled by the root of "
        "batch/1024",
    )

    def rate(self, step: int, steps: int, batch: int) -> float:
        """Learning rate at a step: the root rule of DINOv2 (utils/config.py)."""
        # `Optim` scales by batch / 256; with this batch that is the root of batch / 1024.
        return super().rate(step, steps, 256) * math.sqrt(batch / 1024)


class Dinov2Backbone(Backbone):
    """The encoder network: LEMON's (ViT-S: 12 heads where DINOv2's has 6; MoCo v3's first weights),
    with patch projection and positions learnt, as in DINOv2.
    """

    freeze_patch: bool = Field(
        False, description="ViT: keep the random patch projection fixed (MoCo v3's stability trick)"
    )
    sincos: bool = Field(
        False, description="ViT: fixed 2-D sin-cos positions instead of learnt ones"
    )


class Dinov2Train(LemonTrain):
    """Pretrain a nucleus encoder on crops with DINOv2 (method.name=dinov2)."""

    accumulate: int = Field(
        1,
        gt=0,
        description="parts that a rank's batch is split into; each spreads (and, with sinkhorn, "
        "makes its targets) by itself",
    )
    method: Dinov2Config = Field(Dinov2Config(), description="the method")  # type: ignore[assignment]
    backbone: Dinov2Backbone = Field(Dinov2Backbone(), description="the network")
    optim: Dinov2Optim = Field(Dinov2Optim(), description="optimiser")
