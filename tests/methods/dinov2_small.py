"""A DINOv2 run that fits into a test, as words and as a loop, and its losses as plain loops."""

from pathlib import Path
from typing import Any

import torch

from lemon_muse.config import load
from lemon_muse.methods.dinov2 import Dinov2
from lemon_muse.recipe import Train
from lemon_muse.train import Loop
from tests.methods.muse_small import cross_entropy, logits

WORDS = [
    "steps=20",
    "batch=16",
    "window=24",
    "precision=fp32",
    "method={name: dinov2, locals: 2, local_size: 16, image_prototypes: 40, patch_prototypes: 30, "
    "hidden: 32, bottleneck: 16}",
    "backbone={name: vit_tiny, patch: 8, heads: 3, args: {depth: 2, embed_dim: 48}}",
    "shuffle_blocks=4",
    "watch={every: 1, collapse: 'off'}",
    "workers=0",
    "device=cpu",
]


def open_loop(data: Path, out: Path, *words: str) -> Loop:
    cfg = load(Train, [f"data={data}", f"out={out}", *WORDS, *words])
    return Loop(cfg, cfg.open_data(), torch.device("cpu"), None)


def method_of(loop: Loop) -> Dinov2:
    assert isinstance(loop.method, Dinov2)
    return loop.method


def a_batch(loop: Loop, step: int = 0) -> dict[str, Any]:
    loop.step = step
    return loop._parts(loop.batches.batch_at(step))[0]


class Plain:
    """Logits of every view of a batch and of every patch of the global ones, in plain torch."""

    def __init__(self, method: Dinov2, batch: dict[str, Any]) -> None:
        views, s = method.views.make(batch), method.settings
        self.rows = len(batch["pixels"])
        self.mask = [batch["views"][-1]["mask"][:, v] for v in (0, 1)]
        student, teacher = method.student, method.teacher
        patch = "image" if s.shared_head else "patch"
        self.cls: list[torch.Tensor] = []
        self.student, self.teacher = [], []
        self.student_patches, self.teacher_patches = [], []
        for v, view in enumerate(views):
            mask = (self.mask[v], method.mask_token[0]) if v < 2 else ()
            cls, patches = student["backbone"](view, *mask)
            self.cls.append(cls)
            self.student.append(logits(student["image"], cls))
            if v < 2:
                self.student_patches.append(logits(student[patch], patches))
                with torch.no_grad():
                    cls, patches = teacher["backbone"](view)
                    self.teacher.append(logits(teacher["image"], cls))
                    self.teacher_patches.append(logits(teacher[patch], patches))

    def image_loss(self, centre: torch.Tensor, temperature: float) -> torch.Tensor:
        parts = [
            cross_entropy(self.teacher[t][i], self.student[v][i], centre, temperature)
            for t in (0, 1)
            for v in range(len(self.student))
            for i in range(self.rows)
            if v != t
        ]
        return torch.stack(parts).mean()

    def patch_loss(self, centre: torch.Tensor, temperature: float) -> torch.Tensor:
        total, images = torch.zeros(()), 0
        for v in (0, 1):
            for i in range(self.rows):
                images += 1
                at = self.mask[v][i].nonzero()[:, 0].tolist()
                for n in at:
                    y, x = self.teacher_patches[v][i, n], self.student_patches[v][i, n]
                    total = total + cross_entropy(y, x, centre, temperature) / len(at)
        return total / images

    def teacher_rows(self, kind: str) -> torch.Tensor:
        """Logits that the targets of a loss come from."""
        if kind == "image":
            return torch.cat(self.teacher)
        return torch.cat([y[m] for y, m in zip(self.teacher_patches, self.mask, strict=True)])

    def spread(self, kind: str, value: float) -> torch.Tensor:
        """Sum over the global views of KoLeo (eps = value) or the density (kappa = value)."""
        total = torch.zeros(())
        for cls in self.cls[:2]:
            unit = cls / cls.norm(dim=1, keepdim=True)
            for i in range(self.rows):
                others = [unit[j] for j in range(self.rows) if j != i]
                if kind == "koleo":
                    nearest = min((unit[i] - o).norm() for o in others)
                    total = total - (nearest + value).log() / self.rows
                else:
                    density = torch.stack([(value * unit[i] @ o).exp() for o in others]).mean()
                    total = total + density.log() / self.rows
        return total


def sinkhorn(rows: torch.Tensor, temperature: float) -> torch.Tensor:
    """The centre that stands for three rounds of Sinkhorn-Knopp, in probabilities, in double."""
    q = (rows.double() / temperature).exp().T
    q = q / q.sum()
    start = q.clone()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    # q = diag(a) start diag(b): log a from any one row of `rows`, up to a constant.
    scale = (q[:, 0] / start[:, 0]).log()
    return (-temperature * scale).float()
