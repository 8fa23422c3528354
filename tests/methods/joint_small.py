"""A joint run that fits into a test, as words and as a loop, and its losses as plain loops."""

from itertools import product
from pathlib import Path
from typing import Any

import torch

from lemon_muse.methods.joint import Joint
from lemon_muse.train import Loop
from tests.methods.muse_small import Plain, cross_entropy, logits, open_loop

# The crop encoder has batch norm: what a rank without nuclei would upset.
RESNET = "{name: resnet10t, args: {channels: [8, 8, 16, 16], stem_width: 8, zero_init_last: false}}"
VIEW = "{policy: a1, blur: [0, 0], erase: 0}"
JOINT = [
    "method={name: joint, crops_per_roi: 4, crop_window: 16}",
    f"method.crop_backbone={RESNET}",
    f"method.crop_view={VIEW}",
]


def joint_loop(data: Path, out: Path, *words: str) -> Loop:
    return open_loop(data, out, *JOINT, *words)


def joint_of(loop: Loop) -> Joint:
    assert isinstance(loop.method, Joint)
    return loop.method


Rows = list[dict[tuple[int, int], torch.Tensor]]  # of each view: (ROI, nucleus) to logits [K]


class PlainJoint:
    """Logits of every nucleus of every view, dense and crop, student and teacher."""

    def __init__(self, method: Joint, batch: dict[str, Any]) -> None:
        self.plain = Plain(method, {**batch, "views": batch["views"][: method.view.views]})
        crops = method.make_crops(batch, method.make_views(batch))
        slots = batch["points"].shape[1]
        owner = [(int(k) // slots, int(k) % slots) for k in crops.keys]
        both = torch.cat(crops.views)
        self.student = {"dense": self._dense(self.plain.student), "crop": []}
        self.teacher = {"dense": self._dense(self.plain.teacher), "crop": []}
        for nets, into in ((method.student, self.student), (method.teacher, self.teacher)):
            views = nets["crop_backbone"](both).split(len(crops.views[0]))
            for view in views:
                found = logits(nets["crop"], view)
                rows = zip(owner, crops.rows.tolist(), strict=True)
                into["crop"].append({who: found[row] for who, row in rows})

    def _dense(self, views: list[tuple[torch.Tensor, torch.Tensor]]) -> Rows:
        return [
            {(b, n): view[1][b, n] for b, n in inside.nonzero().tolist()}
            for view, inside in zip(views, self.plain.inside, strict=False)
        ]

    def loss(self, teacher: str, student: str, centre: Any, temperature: float) -> torch.Tensor:
        """Mean over (ROI, t, s) with a shared nucleus of the mean over these nuclei."""
        found, self.matched = [], 0
        pairs = product(range(len(self.teacher[teacher])), range(len(self.student[student])))
        for t, s in pairs:
            if teacher == student and t == s:
                continue
            ys, xs = self.teacher[teacher][t], self.student[student][s]
            for roi in range(self.plain.rois):
                shared = [k for k in ys if k[0] == roi and k in xs]
                each = [cross_entropy(ys[k].detach(), xs[k], centre, temperature) for k in shared]
                if each:
                    found.append(torch.stack(each).mean())
                self.matched += len(each)
        return torch.stack(found).mean()
