"""Parts of MUSE that joint training takes, too: nuclei in prototype space, names, alarms."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lemon_muse import dino
from lemon_muse.matching import Teacher

ONE_HOT = 0.05  # of the chance level: no healthy run gets there
NEAR = 0.01  # a loss this near to chance, as a share of it, has learnt nothing
SOME = 1024  # features whose spread is looked at


@dataclass(frozen=True)
class Nuclei:
    """The nuclei of a batch's views, as the heads see them.

    Attributes:
        student: bottlenecks of each view, fp32 [m_v, d], with gradient.
        teacher: the same of the teacher's views, which come first, fp32 [m_t, d].
        keys: of each view, int64 [m_v] on the CPU, ascending: roi * slots + nucleus.
        target: what turns the teacher's bottlenecks into targets.
        rois, slots: ROIs of this rank, and room for nuclei in each.
    """

    student: list[torch.Tensor]
    teacher: list[torch.Tensor]
    keys: list[torch.Tensor]
    target: Teacher
    rois: int
    slots: int


def named(found: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Names for the log; the loss with its gradient under a name that is taken out of it."""
    plain = kind == "nucleus"
    rest = {
        k if plain and ("pairs" in k or k == "matched") else f"{k}_{kind}": v.detach()
        for k, v in found.items()
    }
    return {f"loss_{kind}_": found["loss"], **rest}


def spread(features: torch.Tensor) -> torch.Tensor:
    """`collapse.measure`'s feature_std of nucleus features [n, C]; 1 where there are too few."""
    few = features.detach()[:SOME].float()
    if len(few) < 2:
        return features.new_ones((), dtype=torch.float32)
    unit = F.normalize(few, dim=1)
    return unit.std(0).mean() * few.shape[1] ** 0.5


def verdict(what: str, loss: float, prototypes: int, *, late: bool) -> str | None:
    """A sentence when a cross-entropy says that its targets have collapsed.

    Args:
        what: name of the loss.
        loss: mean cross-entropy of a comparison.
        prototypes: how many, which gives the chance level.
        late: whether a loss at chance is to be reported.
    """
    chance = dino.chance(prototypes)
    if loss < ONE_HOT * chance:
        return (
            f"one-hot collapse: the {what} loss is {loss:.3f}, which only targets that are the "
            f"same for all give. Lower method.teacher_temperature or optim.lr, or raise "
            f"method.momentum."
        )
    if late and abs(loss - chance) < NEAR * chance:
        return (
            f"the {what} loss {loss:.3f} still is chance level {chance:.3f}: its targets are "
            f"uniform, nothing is learnt. Lower method.teacher_temperature, or raise optim.lr."
        )
    return None
