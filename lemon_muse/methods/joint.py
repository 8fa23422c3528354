"""Joint training: MUSE's dense map and LEMON's crop encoder share one space of nuclei.

MUSE as it is (`methods.muse`), and a crop encoder that sees the same nuclei one by one. Crops and
dense features go through a head each to the same nucleus prototypes. Three losses are added:

- `crop`: DINO between the two views of a crop;
- `to_crop`: the dense teacher's target of a nucleus for the crop student: context to the crop;
- `to_dense`: the crop teacher's target for the dense student: detail to the map.

Crops are cut from the ROI before any augmentation and have colours, turns and blur of their own.
Otherwise the stain that a crop shares with its ROI would be the easiest thing to agree on. No paper
describes this; dino.nucleus_loss and its weights per ROI and pair of views are MUSE's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lemon_muse import dino, ema
from lemon_muse.backbones import arguments_of, build
from lemon_muse.data import augment, roi_crops, roi_views
from lemon_muse.data import augment_ops as ops
from lemon_muse.encoder import encoder_of
from lemon_muse.errors import UserError
from lemon_muse.heads import DINOHead
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.joint_config import JointConfig
from lemon_muse.methods.muse import WARM, Muse
from lemon_muse.methods.muse_parts import Nuclei, named, spread, verdict

CROP_VIEWS = 2
ADDED = ("crop", "to_crop", "to_dense")


@dataclass(frozen=True)
class Crops:
    """The crops of a batch.

    Attributes:
        views: float32 [b * k, 3, w, w] each, normalised; crops of a ROI are together.
        keys: int64 [m], on the CPU: the nuclei of the crops that count, as in `Nuclei`.
        rows: int64 [m], on the device: their rows in `views`.
    """

    views: list[torch.Tensor]
    keys: torch.Tensor
    rows: torch.Tensor


class Joint(Muse):
    """See the module's docstring. Teachers and students are equal at step 0."""

    settings: JointConfig

    def __init__(self, settings: JointConfig, setting: Setting) -> None:
        super().__init__(settings, setting)
        s = settings
        encoder = _build_crops(s, seed=setting.seed + 2)
        width = int(cast(int, encoder.num_features))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed + 3)
            head = DINOHead(
                width, s.nucleus_prototypes, hidden=s.hidden, bottleneck=s.bottleneck,
                layers=s.head_layers, norm_last=s.norm_last,
            )  # fmt: skip
        for nets in (self.student, self.teacher):
            mine = nets is self.student
            nets["crop_backbone"] = encoder if mine else _without_drops(ema.momentum_copy(encoder))
            nets["crop"] = head if mine else ema.momentum_copy(head)
            # One module under two names: the space that both kinds of features share.
            nets["crop"].last_layer = nets["nucleus"].last_layer
        self.centres["crop"] = dino.Centre(s.nucleus_prototypes, s.centre_momentum)
        self._stored = augment.stored_size(s.crop_view, s.crop_window)

    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """MUSE's views, then those of the crops with rows [count, crops_per_roi, …]."""
        dense = super().draw(count, generator)
        s, many = self.settings, self.settings.crops_per_roi
        drawn = [
            augment.draw(
                s.crop_view, count * many, stored=self._stored, window=s.crop_window,
                generator=generator, view=view,
            )
            for view in range(CROP_VIEWS)
        ]  # fmt: skip
        crops = [{k: v.unflatten(0, (count, many)) for k, v in row.items()} for row in drawn]
        return [*dense, *crops]

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        views = self.make_views(batch)
        out, dense = self._dense(batch, views, step)
        assert dense is not None
        crops = self.make_crops(batch, views)
        near, features = self._crop_nuclei(crops, dense, step)
        s, loss = self.settings, out["loss"]
        for kind, weight, make in (
            ("crop", s.crop_weight, lambda: self._nucleus_loss(near, "crop")),
            ("to_crop", s.to_crop_weight, lambda: self._across(dense, near, "to_crop")),
            ("to_dense", s.to_dense_weight, lambda: self._across(near, dense, "to_dense")),
        ):
            if weight:
                found = make()
                loss = loss + weight * found.pop(f"loss_{kind}_")
                out |= found
        return {**out, "loss": loss, "crop_std": spread(features)}

    @torch.no_grad()
    def make_views(self, batch: dict[str, Any]) -> list[roi_views.View]:
        return super().make_views({**batch, "views": batch["views"][: self.view.views]})

    @torch.no_grad()
    def make_crops(self, batch: dict[str, Any], views: list[roi_views.View]) -> Crops:
        """Cut and augment the crops: nuclei that a global view shows, then others of the ROI."""
        s, told = self.settings, self.setting
        pixels, points, counts = batch["pixels"], batch["points"].cpu(), batch["counts"].cpu()
        seen = torch.stack([view.inside for view in views[: self.view.globals]]).any(0)
        seed = batch["views"][0]["priority_seed"].cpu()
        chosen = roi_crops.choose(
            seen, counts, seed, counts.new_full(counts.shape, -1), most=s.crops_per_roi
        )
        stored = roi_crops.cut(
            pixels, points, chosen, size=self._stored, mpp=told.mpp, wanted=s.crop_mpp
        )
        made = [
            augment.apply(
                stored, {k: v.flatten(0, 1) for k, v in row.items()}, s.crop_view,
                window=s.crop_window, mean=told.mean, std=told.std,
                dtype=ops.autocast_dtype(pixels.device),
            )
            for row in batch["views"][self.view.views :]
        ]  # fmt: skip
        rows = chosen.real.flatten().nonzero()[:, 0].to(pixels.device, non_blocking=True)
        return Crops(made, chosen.keys(max(1, points.shape[1])), rows)

    def _crop_nuclei(self, crops: Crops, dense: Nuclei, step: int) -> tuple[Nuclei, torch.Tensor]:
        """The crops in the space of nuclei, and the student's features of the first view."""
        images = torch.cat(crops.views).contiguous(memory_format=torch.channels_last)
        # All crops, also those that do not count: batch norm then sees as many on every rank.
        features = self.student["crop_backbone"](images).chunk(CROP_VIEWS)
        with torch.no_grad():
            taught = self.teacher["crop_backbone"](images).chunk(CROP_VIEWS)
        student = [view[crops.rows] for view in features]
        teacher = [view[crops.rows] for view in taught]
        keys = [crops.keys] * CROP_VIEWS
        size = {"rois": dense.rois, "slots": dense.slots}
        return self._nuclei("crop", student, teacher, keys, step, **size), student[0]

    def _across(self, teacher: Nuclei, student: Nuclei, kind: str) -> dict[str, torch.Tensor]:
        """The loss over all (view of one branch's teacher, view of the other branch's student).

        `nucleus_loss` compares one teacher's view with one student's here: a pair of views stands
        in them as ROIs of its own, so that each (ROI, pair) is weighed as in MUSE's own loss.
        """
        s = self.settings
        pairs = list(product(range(len(teacher.teacher)), range(len(student.student))))
        step = teacher.rois * teacher.slots
        y = torch.cat([teacher.teacher[t] for t, _ in pairs])
        x = torch.cat([student.student[v] for _, v in pairs])
        keys_t = torch.cat([teacher.keys[t] + p * step for p, (t, _) in enumerate(pairs)])
        keys_s = torch.cat([student.keys[v] + p * step for p, (_, v) in enumerate(pairs)])
        # The loss wants the teacher's view among the student's, too; nothing is compared with it.
        found = dino.nucleus_loss(
            [y, x], [y], [keys_t, keys_s],
            self.student["nucleus"].prototypes(), teacher.target,  # type: ignore[operator]
            rois=len(pairs) * teacher.rois, slots=teacher.slots,
            temperature=s.temperature, reduction=s.reduction, chunk=s.chunk,
        )  # fmt: skip
        return named(found, kind)

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), self.student["crop_backbone"], self.teacher["crop_backbone"]]

    def encoder(self) -> Any:
        return self.crop_encoder() if self.settings.export == "crop" else self.dense_encoder()

    def dense_encoder(self) -> Any:
        """MUSE's teacher, a `DenseEncoder`."""
        return self._dense_encoder("teacher")

    def crop_encoder(self) -> Any:
        """The teacher of the crops, an `Encoder`."""
        s, told = self.settings, self.setting
        architecture, arguments = arguments_of(s.crop_backbone, s.crop_window)
        return encoder_of(
            self.teacher["crop_backbone"],
            architecture=architecture,
            arguments=arguments,
            image_size=s.crop_window,
            mpp=s.crop_mpp,
            mean=told.mean,
            std=told.std,
        )

    def chance(self) -> float:
        s = self.settings
        added = s.crop_weight + s.to_crop_weight + s.to_dense_weight
        return super().chance() + added * dino.chance(s.nucleus_prototypes)

    def judge(self, logged: dict[str, float]) -> str | None:
        if said := super().judge(logged):
            return said
        late = logged.get("step", 0) > WARM * self.setting.steps
        for kind in ADDED:
            if not logged.get(f"matched_{kind}"):
                continue  # switched off, or a batch without nuclei
            loss = logged[f"entropy_{kind}"] + logged[f"kl_{kind}"]
            if said := verdict(kind, loss, self.settings.nucleus_prototypes, late=late):
                return said
        if logged.get("crop_std", 1.0) < 0.01:
            return (
                "uniform collapse: the features of all crops are nearly equal. Lower optim.lr, or "
                "set optim.clip=0.3."
            )
        return None


def _build_crops(settings: JointConfig, *, seed: int) -> nn.Module:
    try:
        return build(settings.crop_backbone, settings.crop_window, seed=seed)
    except UserError as error:
        raise UserError(f"method.crop_backbone, window={settings.crop_window}: {error}") from None


def _without_drops(network: nn.Module) -> nn.Module:
    """Switch off every dropping for good: a teacher's targets are of the whole network."""
    modules: Iterable[Any] = network.modules()
    for module in modules:
        if isinstance(module, DropPath | DropBlock2d):
            module.drop_prob = 0.0
        elif isinstance(module, PatchDropout):
            module.prob = 0.0
        elif isinstance(module, _DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_rate"):  # timm's CNNs drop features by a function, not a module
            module.drop_rate = 0.0
    return network
