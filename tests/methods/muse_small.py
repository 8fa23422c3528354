"""A MUSE run that fits into a test, as words and as a loop, and its losses as plain loops."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lemon_muse.config import load
from lemon_muse.methods.muse import Muse
from lemon_muse.recipe import Train
from lemon_muse.train import Loop

VIT = "{name: vit_tiny, patch: 8, image: 32, drop_path: 0, args: {depth: 2, embed_dim: 32}}"
WORDS = [
    "steps=20",
    "batch=8",
    "precision=fp32",
    "method={name: muse, image_prototypes: 48, nucleus_prototypes: 40, hidden: 32, bottleneck: 16}",
    f"backbone={VIT}",
    "view={global_size: 32, local_size: 16, locals: 2, margin: 2}",
    "shuffle_blocks=8",
    "watch={every: 1, collapse: 'off'}",
    "workers=0",
    "device=cpu",
]
TEMPERATURE = 0.1


def open_loop(data: Path, out: Path, *words: str) -> Loop:
    cfg = load(Train, [f"data={data}", f"out={out}", *WORDS, *words])
    return Loop(cfg, cfg.open_data(), torch.device("cpu"), None)


def method_of(loop: Loop) -> Muse:
    assert isinstance(loop.method, Muse)
    return loop.method


def a_batch(loop: Loop, step: int = 0) -> dict[str, Any]:
    loop.step = step
    return loop._parts(loop.batches.batch_at(step))[0]


class Plain:
    """Logits of every view of a batch, one network pass per size as DINO's, in plain torch."""

    def __init__(self, method: Muse, batch: dict[str, Any]) -> None:
        views, globals_ = method.make_views(batch), method.view.globals
        self.globals, self.rois = globals_, len(batch["pixels"])
        self.inside = [view.inside for view in views]
        self.student = self._pass(method.student, views[:globals_])
        self.student += self._pass(method.student, views[globals_:])
        with torch.no_grad():
            self.teacher = self._pass(method.teacher, views[:globals_])

    def _pass(self, nets: Any, views: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each view: logits of its images [b, K] and of all nuclei, seen or not, [b, n, K]."""
        if not views:
            return []
        cls, maps = nets["backbone"](torch.cat([v.images for v in views]))
        out = []
        for at, view in enumerate(views):
            rows = slice(at * self.rois, (at + 1) * self.rois)
            # The released convention: 2 x / W - 1, corners of map and image on each other.
            grid = view.points.nan_to_num(0) * 2 / view.images.shape[-1] - 1
            read = F.grid_sample(
                maps[rows], grid[:, :, None], align_corners=True, padding_mode="border"
            )
            nuclei = read[..., 0].transpose(1, 2)
            out.append((logits(nets["image"], cls[rows]), logits(nets["nucleus"], nuclei)))
        return out

    def image_loss(self, centre: torch.Tensor, temperature: float) -> torch.Tensor:
        parts = []
        for t in range(self.globals):
            for s in range(len(self.student)):
                if s == t:
                    continue
                for row in range(self.rois):
                    y, x = self.teacher[t][0][row], self.student[s][0][row]
                    parts.append(cross_entropy(y, x, centre, temperature))
        return torch.stack(parts).mean()

    def nucleus_loss(
        self, centre: torch.Tensor, temperature: float, reduction: str = "pair"
    ) -> torch.Tensor:
        """Nucleus by nucleus; `found` keeps what each (roi, t, s) with a shared nucleus gave."""
        self.found: list[torch.Tensor] = []
        for t in range(self.globals):
            for s in range(len(self.student)):
                for row in range(self.rois) if s != t else ():
                    both = self.inside[t][row] & self.inside[s][row]
                    found = [
                        cross_entropy(
                            self.teacher[t][1][row, n], self.student[s][1][row, n],
                            centre, temperature,
                        )
                        for n in both.nonzero()[:, 0].tolist()
                    ]  # fmt: skip
                    if found:
                        self.found.append(torch.stack(found))
        if reduction == "pair":
            return torch.stack([f.mean() for f in self.found]).mean()
        if reduction == "nucleus":
            return torch.cat(self.found).mean()
        if reduction == "sum":
            return torch.cat(self.found).sum() / len(self.found)
        weights = [math.sqrt(len(f)) for f in self.found]
        return sum(w * f.mean() for w, f in zip(weights, self.found, strict=True)) / sum(weights)  # type: ignore[return-value]


def logits(head: Any, features: torch.Tensor) -> torch.Tensor:
    """DINO's head: MLP, length 1, weight-normalised prototypes."""
    for layer in head.mlp:
        linear = isinstance(layer, nn.Linear)
        features = F.linear(features, layer.weight, layer.bias) if linear else F.gelu(features)
    features = features / features.norm(dim=-1, keepdim=True)
    last = head.last_layer
    weight = last.weight_g * last.weight_v / last.weight_v.norm(dim=1, keepdim=True)
    return features @ weight.T


def cross_entropy(
    teacher: torch.Tensor, student: torch.Tensor, centre: torch.Tensor, temperature: float
) -> torch.Tensor:
    target = ((teacher - centre) / temperature).softmax(0)
    return -(target * (student / TEMPERATURE).log_softmax(0)).sum()
