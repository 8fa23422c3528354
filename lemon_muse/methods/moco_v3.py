"""MoCo v3 on crops around nuclei: the method of LEMON.

Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers" (2021); values
from its public reference (facebookresearch/moco-v3: moco/builder.py, main_moco.py, CONFIG.md),
written anew. Two views of each crop; queries through encoder, projector and predictor, keys through
the momentum copies of encoder and projector; symmetric InfoNCE over the keys of all ranks.
"""

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn

from lemon_muse import ema
from lemon_muse.backbones import build, timm_arguments
from lemon_muse.data import augment
from lemon_muse.data import augment_ops as ops
from lemon_muse.encoder import Encoder
from lemon_muse.heads import mlp
from lemon_muse.losses import info_nce, info_nce_chance
from lemon_muse.methods.contract import Method, MethodConfig, Setting
from lemon_muse.schedules import cosine


class MoCoV3Config(MethodConfig):
    """MoCo v3 (LEMON)."""

    name: Literal["moco_v3"] = Field("moco_v3", description="the method")
    temperature: float = Field(0.2, gt=0, description="T of the contrastive loss")
    momentum: float = Field(
        0.99, ge=0, le=1, description="EMA momentum at step 0; rises to 1 along a cosine"
    )
    hidden: int = Field(4096, gt=0, description="width of projector and predictor")
    out_dim: int = Field(256, gt=0, description="width of the contrasted features")
    projector_layers: int = Field(
        3, ge=1, description="layers of the projector (reference: 3 ViT, 2 ResNet)"
    )
    predictor_norm: bool = Field(
        True, description="BN after the predictor (reference: ViT yes, ResNet no)"
    )
    export: Literal["query", "momentum"] = Field(
        "query",
        description="which encoder is probed and exported (LEMON released the query encoder)",
    )


class MoCoV3(Method):
    """See the module's docstring. Teacher (momentum) and student (query) are equal at step 0."""

    def __init__(self, settings: MoCoV3Config, setting: Setting) -> None:
        super().__init__()
        self.settings, self.setting = settings, setting
        backbone = build(setting.backbone, setting.window, seed=setting.seed)
        width = int(cast(int, backbone.num_features))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 1)
            projector = mlp(
                settings.projector_layers,
                in_dim=width,
                hidden=settings.hidden,
                out_dim=settings.out_dim,
            )
            self.predictor = mlp(
                2,
                in_dim=settings.out_dim,
                hidden=settings.hidden,
                out_dim=settings.out_dim,
                last_norm=settings.predictor_norm,
            )
        self.base = nn.ModuleDict({"backbone": backbone, "projector": projector})
        self.momentum = ema.momentum_copy(self.base)

    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        return draw_views(self.setting, count, generator)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        x1, x2 = self._views(batch)
        # The order of the passes is the reference's: each view has its own BN statistics.
        f1 = self.base["backbone"](x1)
        f2 = self.base["backbone"](x2)
        q1 = self.predictor(self.base["projector"](f1))
        q2 = self.predictor(self.base["projector"](f2))
        with torch.no_grad():
            k1 = self.momentum["projector"](self.momentum["backbone"](x1))
            k2 = self.momentum["projector"](self.momentum["backbone"](x2))
        temperature = self.settings.temperature
        loss = info_nce(q1, k2, temperature=temperature) + info_nce(q2, k1, temperature=temperature)
        return {"loss": loss, "features": f1.detach()}

    def _views(self, batch: dict[str, Any]) -> list[torch.Tensor]:
        return make_views(self.setting, batch)

    def param_groups(self) -> list[dict[str, Any]]:
        modules = [self.base, self.predictor]
        return [{"params": [p for m in modules for p in m.parameters() if p.requires_grad]}]

    def after_step(self, step: int) -> dict[str, float]:
        # The reference updates the keys' encoder in the next step's forward pass, after the queries
        # and with that step's momentum; doing it here with step + 1 is the same sequence.
        value = cosine(step + 1, self.setting.steps, start=self.settings.momentum, end=1.0)
        ema.update(self.momentum, self.base, value)
        return {"momentum": value}

    def encoder(self) -> Encoder:
        source = self.base if self.settings.export == "query" else self.momentum
        s = self.setting
        architecture, arguments = timm_arguments(s.backbone, s.window)
        return Encoder(
            source["backbone"],
            architecture=architecture,
            arguments=arguments,
            image_size=s.window,
            mpp=s.mpp,
            mean=s.mean,
            std=s.std,
        )

    def chance(self) -> float:
        return 2 * info_nce_chance(self.setting.batch, self.settings.temperature)


def draw_views(
    setting: Setting, count: int, generator: torch.Generator
) -> list[dict[str, torch.Tensor]]:
    """Parameters of the two views of `count` crops; see `augment.draw`."""
    s = setting
    return [
        augment.draw(
            s.view, count, stored=s.stored, window=s.window, generator=generator, view=view
        )
        for view in (0, 1)
    ]


@torch.no_grad()
def make_views(setting: Setting, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The two views of a batch's crops, float32 [b, 3, w, w] each, blurred in autocast's dtype."""
    s, pixels = setting, batch["pixels"]
    dtype = ops.autocast_dtype(pixels.device)
    return [
        augment.apply(pixels, row, s.view, window=s.window, mean=s.mean, std=s.std, dtype=dtype)
        for row in batch["views"]
    ]
