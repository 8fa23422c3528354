"""The probes of frozen features: one file each, one line here.

A probe takes features and labels of train, val and test and returns class scores of val and test.
All fit on train alone, so they see the same data; val, where a fold has one, serves to choose k and
the epoch. `protocol='paper'` repeats what the publication of a benchmark did, its flaws included:
such figures serve only for comparison with published ones.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Protocol = Literal["default", "paper"]


@dataclass(frozen=True)
class Part:
    """One split: features float32 [n, d], labels int64 [n], patient [n] (any type)."""

    x: np.ndarray
    label: np.ndarray
    patient: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Outcome:
    """Scores float32 [n, K] of val and test (higher is likelier) and what the probe has chosen."""

    val: np.ndarray
    test: np.ndarray
    params: dict[str, float | int | str] = field(default_factory=dict)


# (train, val, test, *, classes, protocol, seed, device) -> Outcome
Probe = Callable[..., Outcome]

# name: (module, function, what it measures: 'class' or 'regression')
PROBES: dict[str, tuple[str, str, str]] = {
    "knn": ("eval.probes.knn", "knn", "class"),
    "logistic": ("eval.probes.logistic", "logistic", "class"),
    "linear": ("eval.probes.linear", "linear", "class"),
    "uni": ("eval.probes.uni", "uni", "class"),
    "ridge": ("eval.probes.ridge", "ridge", "regression"),
    "finetune": ("eval.probes.finetune", "finetune", "class"),
}
# What probe=all means: `uni` and `finetune` cost minutes to hours and are asked for by name.
USUAL = ("knn", "logistic", "linear", "ridge")


def get(name: str) -> Probe:
    """The function of a probe."""
    module, function, _ = PROBES[name]
    found: Probe = getattr(importlib.import_module(module), function)
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True)) if logits.size else logits
    return (shifted / shifted.sum(1, keepdims=True)).astype(np.float32)
