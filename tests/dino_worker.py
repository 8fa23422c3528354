"""One rank of test_dino_distributed.py: its rois of a scene through DDP; writes what it saw."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lemon_muse import dino, distributed
from lemon_muse.heads import DINOHead
from lemon_muse.matching import Teacher

ROIS, SLOTS, WIDTH, K, D = 6, 10, 5, 29, 8
VIEWS, GLOBALS = 4, 2
REDUCTIONS = ("pair", "sqrt", "nucleus", "sum")
# Number of nuclei of each roi; 2 ranks take 3 rois each, 3 ranks take 2.
SCENES = {
    "nothing": (0, 0, 0, 0, 0, 0),
    "unequal": (10, 1, 7, 2, 0, 3),
    "one rank has none": (9, 4, 2, 0, 0, 0),
    "unequal again": (1, 2, 3, 4, 5, 10),
}
Arrays = dict[str, np.ndarray]


class Student(nn.Module):
    """Two heads on a linear encoder; the loss is the whole of what DDP sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.head = DINOHead(WIDTH, K, hidden=16, bottleneck=D, norm_last=False)
        self.image_head = DINOHead(WIDTH, K, hidden=16, bottleneck=D, norm_last=True)
        with torch.no_grad():  # std 0.02 is for wide layers; here it would leave 1e-4 to normalise
            for name, p in self.named_parameters():
                if name.endswith("weight") and "mlp" in name:
                    p.mul_(20)

    def forward(self, scene: "Scene", reduction: dino.Reduction) -> dict[str, torch.Tensor]:
        nuclei = dino.nucleus_loss(
            [self.head(self.encoder(x)) for x in scene.nuclei],
            scene.teacher, scene.keys, self.head.prototypes(), scene.target,
            rois=scene.rois, slots=SLOTS, reduction=reduction, chunk=16,
        )  # fmt: skip
        image = dino.image_loss(
            [self.image_head(self.encoder(x)) for x in scene.images],
            scene.image_teacher, self.image_head.prototypes(), scene.target,
        )  # fmt: skip
        return {**nuclei, "loss": nuclei["loss"] + image["loss"]}


class Scene:
    """Inputs of the rois [first, first + rois) of a scene: ragged nuclei in views, and images."""

    def __init__(self, name: str, first: int, rois: int) -> None:
        rng = np.random.default_rng(list(name.encode()))
        inputs = rng.normal(size=(VIEWS, ROIS * SLOTS, WIDTH)).astype(np.float32)
        outputs = rng.normal(size=(GLOBALS, ROIS * SLOTS, D)).astype(np.float32)
        exists = np.arange(SLOTS) < np.array(SCENES[name])[:, None]
        shown = exists.reshape(-1) & (rng.random((VIEWS, ROIS * SLOTS)) < 0.7)
        inside = np.arange(ROIS * SLOTS) // SLOTS
        mine = (inside >= first) & (inside < first + rois)
        rows = [np.flatnonzero(view & mine) for view in shown]
        images = slice(first, first + rois)
        self.rois = rois
        self.keys = [torch.from_numpy(r - first * SLOTS) for r in rows]
        self.nuclei = [torch.from_numpy(inputs[v][r]) for v, r in enumerate(rows)]
        unit = F.normalize(torch.from_numpy(outputs), dim=2)
        self.teacher = [unit[t][torch.from_numpy(rows[t])] for t in range(GLOBALS)]
        self.images = list(torch.from_numpy(inputs[:, ::SLOTS][:, images]))
        self.image_teacher = list(unit[:, ::SLOTS][:, images])
        w = F.normalize(torch.from_numpy(rng.normal(size=(K, D)).astype(np.float32)), dim=1)
        self.target = Teacher(w, torch.linspace(-0.1, 0.1, K), 0.06)


def observe(rank: int, world: int) -> Arrays:
    """Loss, gradients, centres and Sinkhorn of every scene, as the optimiser would meet them."""
    student = Student()
    runner = DistributedDataParallel(student) if world > 1 else student
    seen: Arrays = {}
    centre = dino.Centre(K)
    for name in SCENES:
        scene = Scene(name, rank * ROIS // world, ROIS // world)
        for reduction in REDUCTIONS:
            student.zero_grad(set_to_none=True)
            out = runner(scene, reduction)
            out["loss"].backward()
            mean = {n: distributed.mean_over_ranks(v.detach().clone()) for n, v in out.items()}
            seen |= {f"{name}/{reduction}/{n}": v.numpy() for n, v in mean.items()}
            seen |= {
                f"{name}/{reduction}/grad {n}": p.grad.numpy().copy()
                for n, p in student.named_parameters()
                if p.grad is not None
            }
        rows, keys = torch.cat(scene.teacher), scene.keys[:GLOBALS]
        weights = torch.cat([dino.nucleus_weights(k, slots=SLOTS) for k in keys])
        w = scene.target.prototypes
        centre.update(*dino.logit_sum(rows, w, weights))
        seen[f"{name}/centre"] = centre.value.numpy().copy()
        seen[f"{name}/sinkhorn"] = dino.sinkhorn_centre(rows, w, 0.06, chunk=7).numpy()
        weighted = dino.sinkhorn_centre(rows, w, 0.06, weights=weights, iterations=5)
        seen[f"{name}/weighted sinkhorn"] = weighted.numpy()
        seen[f"{name}/rows"] = np.array(len(rows))
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.process_group("cpu", timeout_minutes=1):
        np.savez(
            Path(sys.argv[1]) / f"rank{distributed.rank()}.npz",
            **observe(distributed.rank(), distributed.world()),  # type: ignore[arg-type]
        )
