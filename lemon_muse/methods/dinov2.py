"""DINOv2 on crops around nuclei: class tokens (DINO), masked patches (iBOT), spread features.

Oquab et al., "DINOv2" (2023), written anew after its public reference (facebookresearch/dinov2,
train/ssl_meta_arch.py, data/augmentations.py). The LEMON paper (table 5) trains it on 40 px crops:
with local views, without them, and with a kernel density in place of KoLeo; it gives no settings.
A student sees two global views, some of them masked, and local views; an EMA teacher the whole
global views.
"""

from typing import Any, Literal

import torch
from torch import nn

from lemon_muse import dino, ema
from lemon_muse.backbones import build, timm_arguments
from lemon_muse.encoder import Encoder
from lemon_muse.errors import UserError
from lemon_muse.heads import DINOHead
from lemon_muse.masking import TokenViT, draw_masks, masked_images, patch_loss
from lemon_muse.matching import Teacher
from lemon_muse.methods.contract import Method, Setting
from lemon_muse.methods.dinov2_config import Dinov2Config
from lemon_muse.methods.dinov2_views import GLOBALS, Dinov2Views
from lemon_muse.methods.muse_parts import named, verdict
from lemon_muse.schedules import cosine, linear_warmup
from lemon_muse.spread import kde, koleo

Kind = Literal["image", "patch"]
WARM = 0.1  # share of the run after which a loss at chance is reported


class Dinov2(Method):
    """See the module's docstring. Teacher and student are equal at step 0."""

    def __init__(self, settings: Dinov2Config, setting: Setting) -> None:
        super().__init__()
        self.settings, self.setting = settings, setting
        self.views = Dinov2Views(settings, setting)
        backbone = TokenViT(build(setting.backbone, setting.window, seed=setting.seed))
        if settings.locals and settings.local_size % backbone.patch:
            near = max(1, round(settings.local_size / backbone.patch)) * backbone.patch
            raise UserError(
                f"method.local_size={settings.local_size} px cannot be cut into patches of "
                f"{backbone.patch} px (backbone.patch); take {near}."
            )
        counts = {"image": settings.image_prototypes, "patch": settings.patch_prototypes}
        if settings.shared_head:
            counts["patch"] = settings.image_prototypes
        self.prototypes = counts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 1)
            heads = {
                kind: _new_head(settings, backbone.dim, count)
                for kind, count in counts.items()
                if kind == "image" or not settings.shared_head
            }
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        # Not the encoder's: what is exported knows no mask.
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.dim))
        # What a loss that is switched off would have trained must not wait for gradients (DDP).
        if not settings.masks_patches:
            self.mask_token.requires_grad_(False)
        for kind in heads:
            if not self._trained(kind):
                heads[kind].requires_grad_(False)
        self.teacher = ema.momentum_copy(self.student)
        self._net("teacher").without_drops()
        self.centres = nn.ModuleDict(
            {kind: dino.Centre(n, settings.centre_momentum) for kind, n in counts.items()}
        )
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def wants_slides(self) -> bool:
        return self.views.wants_slides

    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """The views, then {'mask': bool [count, 2, N]} of the global views' patches."""
        s = self.settings
        rows = self.views.draw(count, generator)
        if s.masks_patches:
            masks = draw_masks(
                GLOBALS * count, self._net("student").grid, generator,
                share=s.mask_share, ratio=s.mask_ratio, kind=s.masks,
            )  # fmt: skip
            rows.append({"mask": masks.view(count, GLOBALS, -1)})
        return rows

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        s, views = self.settings, self.views.make(batch)
        rows, images = len(views[0]), torch.cat(views[:GLOBALS])
        mask = self._mask(batch)
        token = self.mask_token[0] if mask is not None else None
        on_device = None if mask is None else mask.to(images.device, non_blocking=True)
        with torch.no_grad():
            t_cls, t_patches = self._net("teacher")(images)
        cls, patches = self._net("student")(images, on_device, token)
        seen = cls
        if s.locals:
            seen = torch.cat([cls, self._net("student")(torch.cat(views[GLOBALS:]))[0]])
        out: dict[str, torch.Tensor] = {"features": cls[:rows].detach()}
        loss = cls.new_zeros((), dtype=torch.float32)
        if s.image_weight:
            found = self._image_loss(seen, t_cls, rows, step)
            loss = loss + s.image_weight * found.pop("loss_image_")
            out |= found
        if mask is not None:
            found = self._patch_loss(patches, t_patches, mask, step)
            loss = loss + s.patch_weight * found.pop("loss_patch_")
            out |= found
        if s.weight_of_spread:
            # A view at a time: the two views of a nucleus must not drive each other away.
            spread = torch.stack([self._spread(view) for view in cls.split(rows)]).sum()
            loss = loss + s.weight_of_spread * spread
            out["spread"] = spread.detach()
        return {"loss": loss, **out}

    def _net(self, who: str) -> TokenViT:
        net: TokenViT = getattr(self, who)["backbone"]
        return net

    def _head(self, who: str, kind: str) -> DINOHead:
        head = getattr(self, who)["image" if self.settings.shared_head else kind]
        assert isinstance(head, DINOHead)
        return head

    def _trained(self, kind: str) -> bool:
        """Whether a loss has a gradient for this head."""
        s = self.settings
        uses = {"image": bool(s.image_weight), "patch": s.masks_patches}
        return any(uses.values()) if s.shared_head else uses[kind]

    def _mask(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """Masked patches of the global views, view after view: bool [2 b, N], on the CPU."""
        if not self.settings.masks_patches:
            return None
        mask: torch.Tensor = batch["views"][len(self.views.views)]["mask"]
        return mask.transpose(0, 1).flatten(0, 1)

    def _spread(self, features: torch.Tensor) -> torch.Tensor:
        s = self.settings
        if s.spread == "kde":
            return kde(features, kappa=s.kde_kappa)
        return koleo(features, eps=s.koleo_eps)

    def _image_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, rows: int, step: int
    ) -> dict[str, torch.Tensor]:
        head = self._head("student", "image")
        x = head(student)
        with torch.no_grad():
            y = self._head("teacher", "image")(teacher)
        found = dino.image_loss(
            x.split(rows), y.split(rows), head.prototypes(), self._target("image", y, step),
            temperature=self.settings.temperature, chunk=self.settings.chunk,
        )  # fmt: skip
        return named(found, "image")

    def _patch_loss(
        self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, step: int
    ) -> dict[str, torch.Tensor]:
        # Found on the CPU, so that a GPU need not be asked how many there are.
        at = mask.flatten().nonzero()[:, 0].to(student.device, non_blocking=True)
        head = self._head("student", "patch")
        x = head(student.flatten(0, 1)[at])
        with torch.no_grad():
            y = self._head("teacher", "patch")(teacher.flatten(0, 1)[at])
        found = patch_loss(
            x, y, mask, head.prototypes(), self._target("patch", y, step),
            temperature=self.settings.temperature, chunk=self.settings.chunk,
        )  # fmt: skip
        return named(found, "patch")

    @torch.no_grad()
    def _target(self, kind: Kind, y: torch.Tensor, step: int) -> Teacher:
        """What turns the teacher's bottleneck into targets; notes what moves the centre."""
        s, prototypes = self.settings, self._head("teacher", kind).prototypes()
        first, last = s.teacher_temperature
        warm = round(s.warm_teacher * self.setting.steps)
        temperature = linear_warmup(step, warmup=warm, start=first, end=last)
        if s.centring == "sinkhorn":
            value = dino.sinkhorn_centre(y, prototypes, temperature, chunk=s.chunk)
            return Teacher(prototypes, value, temperature)
        found = dino.logit_sum(y, prototypes)
        before = self._sums.get(kind)  # of the parts of a step before this one
        self._sums[kind] = found if before is None else (before[0] + found[0], before[1] + found[1])
        centre = self.centres[kind]
        assert isinstance(centre, dino.Centre)
        return Teacher(prototypes, centre.value.clone(), temperature)

    def networks(self) -> list[nn.Module]:
        # timm's network is read part by part, and never called itself.
        return [self._net("student"), self._net("teacher")]

    def param_groups(self) -> list[dict[str, Any]]:
        parameters = [self.mask_token, *self.student.parameters()]
        return [{"params": [p for p in parameters if p.requires_grad]}]

    def before_step(self, step: int) -> None:
        frozen = round(self.settings.freeze_last * self.setting.steps)
        for head in self.student.values():
            if isinstance(head, DINOHead):
                dino.cancel_last_layer_gradient(head, step, frozen)

    def after_step(self, step: int) -> dict[str, float]:
        for kind in sorted(self._sums):  # the same order on all ranks: it is a collective
            centre = self.centres[kind]
            assert isinstance(centre, dino.Centre)
            centre.update(*self._sums[kind])
        self._sums = {}
        value = cosine(step, self.setting.steps, start=self.settings.momentum, end=1.0)
        ema.update(self.teacher, self.student, value)
        return {"momentum": value}

    def encoder(self) -> Encoder:
        s = self.setting
        architecture, arguments = timm_arguments(s.backbone, s.window)
        return Encoder(
            self._net(self.settings.export).vit,
            architecture=architecture,
            arguments=arguments,
            image_size=s.window,
            mpp=s.mpp,
            mean=s.mean,
            std=s.std,
        )

    def chance(self) -> float:
        """Of the two cross-entropies; what spreads features has no chance level of its own."""
        s, images = self.settings, GLOBALS * self.setting.batch
        share = masked_images(images, s.mask_share) / images  # the others count as 0
        image = s.image_weight * dino.chance(self.prototypes["image"])
        return image + s.patch_weight * share * dino.chance(self.prototypes["patch"])

    def judge(self, logged: dict[str, float]) -> str | None:
        """`logged` may hold `step`: each loss that still is at chance is then reported, too."""
        late = logged.get("step", 0) > WARM * self.setting.steps
        for kind, count in self.prototypes.items():
            loss = logged.get(f"entropy_{kind}", 0.0) + logged.get(f"kl_{kind}", 0.0)
            # 0 is no loss, or one without a single masked patch.
            if loss and (said := verdict(kind, loss, count, late=late)):
                return said
        return None


def _new_head(settings: Dinov2Config, dim: int, prototypes: int) -> DINOHead:
    return DINOHead(
        dim,
        prototypes,
        hidden=settings.hidden,
        bottleneck=settings.bottleneck,
        layers=settings.head_layers,
        norm_last=settings.norm_last,
    )
