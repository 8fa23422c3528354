"""The online probe: how well an encoder separates classes, in a second or two, during training."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from eval import benchmarks, metrics
from eval.features import encode
from eval.probes import knn_votes
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

K = 20
DRAWS = 512


def online_probe(
    benchmark: str,
    root: Path,
    *,
    size: int,
    mpp: float,
    cap: int = 2000,
    seed: int = 0,
    bank: str = "val",
    bf16: bool = False,
) -> Callable[[nn.Module], dict[str, float]]:
    """A probe on held-out patients whose crops are read once and kept in memory.

    Its labels never reach the training: pretraining has the returned numbers to log, nothing else.

    Args:
        benchmark, root: as for `lemon-muse eval`.
        size, mpp: window of the encoder that will be given, px and µm/px.
        cap: most nuclei on each side.
        seed: of the division of patients and the draw of nuclei.
        bank: 'val': val patients in two halves, alike in class counts, each the bank of the other;
            'train': train nuclei are the bank of all val nuclei. With a single val patient 'train'.
        bf16: run the encoder under bfloat16 autocast.

    Returns:
        A function of an encoder (DESIGN's contract, window as given here) that leaves it in the
        mode it was in, draws no random number, and gives {'probe/knn_balanced_accuracy': …,
        'probe/knn_macro_f1': …} of a 20-nearest-neighbour vote.

    Raises:
        UserError: as loading the benchmark, or there is no val nucleus.
    """
    table = benchmarks.find(benchmark).load(Path(root))
    val = table.rows("val")
    if not len(val):
        raise UserError(f"{root} has no val nucleus: the online probe needs held-out patients.")
    generator = np.random.default_rng(seed)
    if bank == "val" and len(np.unique(table.patient[val])) > 1:
        sides = list(patient_halves(table, val, generator=generator))
        directions = [(0, 1), (1, 0)]
    else:
        if bank == "val":
            log.warning("val has a single patient: the online probe takes its bank from train")
        sides, directions = [table.rows("train"), val], [(0, 1)]
        if not len(sides[0]):
            raise UserError(f"{root} has no train nucleus for the bank of the online probe.")
    sides = [np.sort(generator.permutation(rows)[:cap]) for rows in sides]
    return OnlineProbe(table, sides, directions, size=size, mpp=mpp, bf16=bf16)


class OnlineProbe:
    """Crops and labels of some sides, and which side is the bank of which; see `online_probe`."""

    def __init__(
        self,
        table: Table,
        sides: list[np.ndarray],
        directions: list[tuple[int, int]],
        *,
        size: int,
        mpp: float,
        bf16: bool,
    ) -> None:
        self.size, self.bf16, self.directions = size, bf16, directions
        self.crops = [table.crops(size, mpp, rows) for rows in sides]
        self.labels = [table.label[rows] for rows in sides]
        self.classes = len(table.classes)

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        if int(encoder.image_size) != self.size:  # type: ignore[arg-type]
            raise ValueError(f"the probe holds crops of {self.size} px, not {encoder.image_size}")
        device = next(encoder.parameters()).device
        mode = {module: module.training for module in encoder.modules()}
        encoder.eval()
        try:
            x = [encode(encoder, part, device=device, bf16=self.bf16) for part in self.crops]
        finally:
            for module, training in mode.items():
                module.training = training
        matrix = np.zeros((self.classes, self.classes), np.int64)
        for i, j in self.directions:
            k = min(K, len(self.labels[i]))
            votes = knn_votes(x[i], self.labels[i], x[j], classes=self.classes, ks=[k])[0]
            matrix += metrics.confusion(self.labels[j], votes.argmax(1), classes=self.classes)
        return {
            "probe/knn_balanced_accuracy": float(metrics.balanced_accuracy(matrix)),
            "probe/knn_macro_f1": float(metrics.macro_f1(matrix)),
        }


def patient_halves(
    table: Table, rows: np.ndarray, *, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two disjoint groups of patients whose class counts are as equal as 512 draws find.

    Needs two patients or more.
    """
    names, owner = np.unique(table.patient[rows], return_inverse=True)
    classes = len(table.classes)
    cells = np.bincount(owner * classes + table.label[rows], minlength=len(names) * classes)
    counts = cells.reshape(len(names), classes)
    share = counts / np.maximum(counts.sum(0), 1)
    side = generator.integers(0, 2, (DRAWS, len(names)))
    # One draw must have patients on both sides.
    side[0] = np.arange(len(names)) % 2
    unequal = np.abs((2 * side - 1) @ share).max(1)
    # np.inf keeps a draw with an empty side from being chosen.
    unequal[(side.sum(1) == 0) | (side.sum(1) == len(names))] = np.inf
    chosen = side[int(np.argmin(unequal))][owner]
    return rows[chosen == 0], rows[chosen == 1]
