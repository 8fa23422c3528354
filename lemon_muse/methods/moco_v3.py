"""MoCo v3 on crops around nuclei: the method of LEMON.

Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers" (2021); values
from its public reference (facebookresearch/moco-v3: moco/builder.py, main_moco.py, CONFIG.md),
written anew. Two views of each crop; queries through encoder, projector and predictor, keys through
the momentum copies of encoder and projector; symmetric InfoNCE over the keys of all ranks.

Beyond LEMON, all off by default: the surroundings of the nucleus (`context`, see there), and keys
of nuclei of the query's own slide that are no negatives (`same_slide`). Two nuclei of a slide often
are of one kind and always of one stain: pushed apart, they teach the wrong thing. VOLTA
(AIMLab-UBC/VOLTA) masks pairs of its loss for a like reason.
"""

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn

from lemon_muse import ema
from lemon_muse.backbones import arguments_of, build
from lemon_muse.encoder import Encoder, encoder_of
from lemon_muse.errors import UserError
from lemon_muse.heads import mlp
from lemon_muse.losses import group_info_nce_chance, info_nce, info_nce_chance, same_group
from lemon_muse.methods.context import ContextConfig, ContextViews, Environment
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
    same_slide: Literal["keep", "drop"] = Field(
        "keep", description="keys of other nuclei of the query's slide: negatives, or left out"
    )
    context: ContextConfig = Field(ContextConfig(), description="the surroundings")


class MoCoV3(Method):
    """See the module's docstring. Teacher (momentum) and student (query) are equal at step 0."""

    def __init__(self, settings: MoCoV3Config, setting: Setting) -> None:
        super().__init__()
        self.settings, self.setting = settings, setting
        self.views = ContextViews(settings.context, setting)
        _check(settings, setting)
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
        self.environment: Environment | None = None
        if settings.context.mode == "environment":
            self.environment = Environment(
                setting,
                layers=settings.projector_layers,
                hidden=settings.hidden,
                out_dim=settings.out_dim,
                last_norm=settings.predictor_norm,
            )

    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        return self.views.draw(count, generator)

    @property
    def wants_slides(self) -> bool:
        return self.settings.same_slide == "drop" or self.views.wants_slides

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        x1, x2, *further = self.views.make(batch)
        # The order of the passes is the reference's: each view has its own BN statistics.
        f1 = self.base["backbone"](x1)
        f2 = self.base["backbone"](x2)
        q1 = self.predictor(self.base["projector"](f1))
        q2 = self.predictor(self.base["projector"](f2))
        with torch.no_grad():
            k1 = self.momentum["projector"](self.momentum["backbone"](x1))
            k2 = self.momentum["projector"](self.momentum["backbone"](x2))
        out: dict[str, torch.Tensor] = {"features": f1.detach()}
        common: dict[str, Any] = {"temperature": self.settings.temperature, "groups": None}
        if self.settings.same_slide == "drop":
            common["groups"] = batch["slide"].to(f1.device)
            out["negatives"] = (~same_group(common["groups"])).float().mean()
        loss = info_nce(q1, k2, **common) + info_nce(q2, k1, **common)
        if self.environment is not None:
            around = self.environment(*further, [f1, f2], **common)
            loss = loss + self.settings.context.weight * around
            out["loss_environment"] = around.detach()
        return {"loss": loss, **out}

    def param_groups(self) -> list[dict[str, Any]]:
        modules = [m for m in (self.base, self.predictor, self.environment) if m is not None]
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
        architecture, arguments = arguments_of(s.backbone, s.window)
        return encoder_of(
            source["backbone"],
            architecture=architecture,
            arguments=arguments,
            image_size=s.window,
            mpp=s.mpp,
            mean=s.mean,
            std=s.std,
        )

    def chance(self) -> float:
        """Exact but for same_slide=drop: there as if batches were random parts of the set."""
        batch, temperature = self.setting.batch, self.settings.temperature
        one = info_nce_chance(batch, temperature)
        if self.settings.same_slide == "drop" and self.setting.slides is not None:
            one = group_info_nce_chance(batch, temperature, _sizes(self.setting))
        weight = 0.0 if self.environment is None else self.settings.context.weight
        return 2 * one * (1 + weight)


def _sizes(setting: Setting) -> list[int]:
    """Nuclei of each slide of the set; slides without any are left out."""
    return [int(s["count"]) for s in (setting.slides or {}).values() if s["count"]]


def _check(settings: MoCoV3Config, setting: Setting) -> None:
    if settings.same_slide == "drop" and setting.slides is not None and len(_sizes(setting)) < 2:
        raise UserError(
            "method.same_slide=drop leaves no negatives: all nuclei of the set are of one slide; "
            "use method.same_slide=keep, or several slides (data=, subset.slides=)."
        )
    if setting.backbone.inner is not None and not setting.view.centred:
        raise UserError(
            f"backbone.inner={setting.backbone.inner} looks for the nucleus in the middle of the "
            f"window, and the views of view.policy={setting.view.policy} move it; use "
            f"view.policy=size, or view.centred=true."
        )
