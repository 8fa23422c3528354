"""MUSE: DINO on the views of a ROI, and NuLo on the nuclei that two views share.

"MUSE" (arXiv 2511.05170), sections 3.2 to 3.4: a student sees all views of a ROI, an EMA teacher
the global ones; the class token of the encoder is matched between views of the ROI (L_image), the
feature of the decoder's map at a nucleus between views of the nucleus (L_nu). No trainer was ever
published; what the paper leaves open follows the DINO reference (facebookresearch/dino).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lemon_muse import dino, ema
from lemon_muse.backbones.muse import MuseNet, ResNetTaps, ViTTaps, build_muse
from lemon_muse.backbones.muse_decoder import Decoder
from lemon_muse.backbones.sampling import sample
from lemon_muse.data import roi_nuclei, roi_views
from lemon_muse.data.roi_views_config import RoiViewConfig
from lemon_muse.errors import UserError
from lemon_muse.heads import DINOHead
from lemon_muse.matching import Teacher
from lemon_muse.methods.contract import Method, Setting
from lemon_muse.methods.muse_config import MuseConfig
from lemon_muse.methods.muse_parts import Nuclei, named, spread, verdict
from lemon_muse.schedules import cosine, linear_warmup

WARM = 0.1  # share of the run after which a loss at chance is reported


class Muse(Method):
    """See the module's docstring. Teacher and student are equal at step 0."""

    reads: Literal["crops", "rois"] = "rois"

    def __init__(self, settings: MuseConfig, setting: Setting) -> None:
        super().__init__()
        self.settings, self.setting = settings, setting
        self.view: RoiViewConfig = setting.view
        backbone = build_muse(setting.backbone, seed=setting.seed)
        _check_sizes(backbone, self.view)
        common = {
            "hidden": settings.hidden,
            "bottleneck": settings.bottleneck,
            "layers": settings.head_layers,
            "norm_last": settings.norm_last,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 1)
            image = DINOHead(backbone.dim, settings.image_prototypes, **common)  # type: ignore[arg-type]
            nucleus = DINOHead(backbone.map_dim, settings.nucleus_prototypes, **common)  # type: ignore[arg-type]
        self.student = nn.ModuleDict({"backbone": backbone, "image": image, "nucleus": nucleus})
        # What a loss that is switched off would have trained must not wait for gradients (DDP).
        if not settings.image_weight:
            image.requires_grad_(False)
        if not settings.nucleus_weight:
            nucleus.requires_grad_(False)
            if backbone.decoder is not None:
                backbone.decoder.requires_grad_(False)
        self.teacher = ema.momentum_copy(self.student)
        self._net("teacher").without_drops()
        self.centres = nn.ModuleDict(
            {
                "image": dino.Centre(settings.image_prototypes, settings.centre_momentum),
                "nucleus": dino.Centre(settings.nucleus_prototypes, settings.centre_momentum),
            }
        )
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        return roi_views.draw(self.view, count, generator)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        return self._dense(batch, self.make_views(batch), step)[0]

    def _dense(
        self, batch: dict[str, Any], views: list[roi_views.View], step: int
    ) -> tuple[dict[str, torch.Tensor], Nuclei | None]:
        """What `forward` returns, and the nuclei that it has compared."""
        globals_ = self.view.globals
        seen = [roi_nuclei.keys(view) for view in views]
        with torch.no_grad():
            t_cls, t_nuclei = self._pass("teacher", views[:globals_], seen[:globals_])
        parts = [
            self._pass("student", views[at], seen[at])
            for at in (slice(globals_), slice(globals_, None))
            if views[at]
        ]
        s_cls = [row for part in parts for row in part[0]]
        s_nuclei = [row for part in parts for row in part[1]]
        out: dict[str, torch.Tensor] = {"features": s_cls[0].detach()}
        loss = s_cls[0].new_zeros((), dtype=torch.float32)
        if self.settings.image_weight:
            found = self._image_loss(s_cls, t_cls, step)
            loss = loss + self.settings.image_weight * found.pop("loss_image_")
            out |= found
        nuclei = None
        if self.settings.nucleus_weight:
            slots = max(1, batch["points"].shape[1])
            keys = [key for key, _, _ in seen]
            nuclei = self._nuclei(
                "nucleus", s_nuclei, t_nuclei, keys, step, rois=len(batch["points"]), slots=slots
            )
            found = self._nucleus_loss(nuclei, "nucleus")
            loss = loss + self.settings.nucleus_weight * found.pop("loss_nucleus_")
            out |= {**found, "nucleus_std": spread(torch.cat(s_nuclei))}
        return {"loss": loss, **out}, nuclei

    @torch.no_grad()
    def make_views(self, batch: dict[str, Any]) -> list[roi_views.View]:
        s = self.setting
        return roi_views.make(batch, self.view, mpp=s.mpp, mean=s.mean, std=s.std)[0]

    def _net(self, who: str) -> MuseNet:
        net: MuseNet = getattr(self, who)["backbone"]
        return net

    def _pass(
        self, who: str, views: Sequence[roi_views.View], seen: Sequence[tuple[torch.Tensor, ...]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Views of one size: image features [b, D] and nucleus features [m_v, C] of each view."""
        net = self._net(who)
        images = torch.cat([view.images for view in views])
        images = images.contiguous(memory_format=torch.channels_last)
        rows = len(views[0].images)
        if not self.settings.nucleus_weight:
            return list(net.encoder(images)[0].split(rows)), []
        cls, maps = net(images)
        device = images.device
        points = torch.cat([points for _, points, _ in seen]).to(device, non_blocking=True)
        owner = torch.cat([row + rows * v for v, (_, _, row) in enumerate(seen)])
        size = (images.shape[-2], images.shape[-1])
        found = sample(
            maps, points, owner.to(device, non_blocking=True), size=size,
            convention=net.settings.convention,
        )  # fmt: skip
        return list(cls.split(rows)), list(found.split([len(key) for key, _, _ in seen]))

    def _image_loss(
        self, student: list[torch.Tensor], teacher: list[torch.Tensor], step: int
    ) -> dict[str, torch.Tensor]:
        rows = len(teacher[0])
        x = self.student["image"](torch.cat(student))
        with torch.no_grad():
            y = self.teacher["image"](torch.cat(teacher))
        target = self._target("image", y, None, step)
        found = dino.image_loss(
            x.split(rows), y.split(rows), self.student["image"].prototypes(), target,  # type: ignore[operator]
            temperature=self.settings.temperature, chunk=self.settings.chunk,
        )  # fmt: skip
        return named(found, "image")

    def _nuclei(
        self,
        kind: str,
        student: list[torch.Tensor],
        teacher: list[torch.Tensor],
        keys: list[torch.Tensor],
        step: int,
        *,
        rois: int,
        slots: int,
    ) -> Nuclei:
        """Features of the nuclei of views, through the heads of that name, and their targets."""
        s, lengths = self.settings, [len(key) for key in keys]
        x = self.student[kind](torch.cat(student))
        with torch.no_grad():
            y = self.teacher[kind](torch.cat(teacher))
            weights = [
                dino.nucleus_weights(key, slots=slots, reduction=s.reduction)
                for key in keys[: len(teacher)]
            ]
        target = self._target(kind, y, torch.cat(weights).to(y.device), step)
        t_rows = list(y.split(lengths[: len(teacher)]))
        return Nuclei(list(x.split(lengths)), t_rows, keys, target, rois, slots)

    def _nucleus_loss(self, nuclei: Nuclei, kind: str) -> dict[str, torch.Tensor]:
        s, n = self.settings, nuclei
        found = dino.nucleus_loss(
            n.student, n.teacher, n.keys, self.student["nucleus"].prototypes(), n.target,  # type: ignore[operator]
            rois=n.rois, slots=n.slots,
            temperature=s.temperature, reduction=s.reduction, chunk=s.chunk,
        )  # fmt: skip
        return named(found, kind)

    @torch.no_grad()
    def _target(
        self, kind: str, y: torch.Tensor, weights: torch.Tensor | None, step: int
    ) -> Teacher:
        """What turns the teacher's bottleneck into targets; notes what moves the centre."""
        s, head, centre = self.settings, self.teacher[kind], self.centres[kind]
        assert isinstance(head, DINOHead) and isinstance(centre, dino.Centre)
        prototypes = head.prototypes()
        first, last = s.teacher_temperature
        warm = round(s.warm_teacher * self.setting.steps)
        temperature = linear_warmup(step, warmup=warm, start=first, end=last)
        if s.centring == "sinkhorn":
            value = dino.sinkhorn_centre(y, prototypes, temperature, weights=weights, chunk=s.chunk)
            return Teacher(prototypes, value, temperature)
        total, weight = dino.logit_sum(y, prototypes, weights)
        if kind in self._sums:
            before = self._sums[kind]
            total, weight = total + before[0], weight + before[1]
        self._sums[kind] = (total, weight)
        return Teacher(prototypes, centre.value.clone(), temperature)

    def networks(self) -> list[nn.Module]:
        # The parts: a timm network inside them is read block by block, and never called itself.
        return [m for m in self.modules() if isinstance(m, ViTTaps | ResNetTaps | Decoder)]

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.student.parameters() if p.requires_grad]}]

    def before_step(self, step: int) -> None:
        frozen = round(self.settings.freeze_last * self.setting.steps)
        for kind in ("image", "nucleus"):
            dino.cancel_last_layer_gradient(self.student[kind], step, frozen)  # type: ignore[arg-type]

    def after_step(self, step: int) -> dict[str, float]:
        for kind in sorted(self._sums):  # the same order on all ranks: it is a collective
            self.centres[kind].update(*self._sums[kind])  # type: ignore[operator]
        self._sums = {}
        value = cosine(step, self.setting.steps, start=self.settings.momentum, end=1.0)
        ema.update(self.teacher, self.student, value)
        return {"momentum": value}

    def encoder(self) -> Any:
        return self._dense_encoder(self.settings.export)

    def _dense_encoder(self, who: str) -> Any:
        from lemon_muse.dense import DenseEncoder

        s = self.setting
        return DenseEncoder(
            self._net(who),
            image_size=self.view.global_size,
            mpp=max(self.view.global_mpp),
            mpp_range=self.view.global_mpp,
            mean=s.mean,
            std=s.std,
        )

    def chance(self) -> float:
        """Of the whole loss; with reduction='sum', of pairs with one nucleus each."""
        s = self.settings
        image = s.image_weight * dino.chance(s.image_prototypes)
        return image + s.nucleus_weight * dino.chance(s.nucleus_prototypes)

    def judge(self, logged: dict[str, float]) -> str | None:
        """`logged` may hold `step`: each loss that still is at chance is then reported, too."""
        s = self.settings
        late = logged.get("step", 0) > WARM * self.setting.steps
        for kind, count in (("image", s.image_prototypes), ("nucleus", s.nucleus_prototypes)):
            if f"kl_{kind}" not in logged or (kind == "nucleus" and not logged["matched"]):
                continue  # a loss of nothing is 0, and is no collapse
            # Cross-entropy of a comparison; the loss itself is larger with reduction='sum'.
            loss = logged[f"entropy_{kind}"] + logged[f"kl_{kind}"]
            if said := verdict(kind, loss, count, late=late):
                return said
        if logged.get("nucleus_std", 1.0) < 0.01:
            return (
                "uniform collapse: the features of all nuclei are nearly equal. Lower optim.lr, or "
                "set optim.clip=0.3."
            )
        return None

    def start_from(self, source: Path) -> None:
        """Take the weights of a run, an encoder folder or a released file; see `muse_start`."""
        from lemon_muse.methods.muse_start import start_from

        start_from(self, source)


def _check_sizes(net: MuseNet, view: RoiViewConfig) -> None:
    """A view that a ViT cannot cut into patches is said before a run folder is made."""
    if not isinstance(net.encoder, ViTTaps):
        return
    patch, used = net.encoder.patch, {"global_size": view.global_size}
    used |= {"local_size": view.local_size} if view.locals else {}
    for key, size in used.items():
        if size % patch:
            near = max(1, round(size / patch)) * patch
            raise UserError(
                f"view.{key}={size} px cannot be cut into patches of {patch} px "
                f"(backbone.patch); take {near}."
            )
