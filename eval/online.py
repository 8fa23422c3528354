"""The online probe: how well an encoder separates classes, in a second or two, during training."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from eval import benchmarks, metrics
from eval.dense import Windows, joined, windows_of
from eval.dense import encode as encode_nuclei
from eval.features import encode
from eval.probes.knn import knn_votes
from eval.samplers import VALID
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

K = 20
DRAWS = 512
# Most pixels on each side of a dense probe, in windows of 224 px, which bounds its time; and the
# least number of windows, whatever their size.
WINDOWS, FEWEST = 24, 8


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
    dense: bool = False,
    window: int | None = None,
    valid: int | None = None,
) -> Callable[[nn.Module], dict[str, float]]:
    """A probe on held-out patients whose crops or windows are read once and kept in memory.

    Its labels never reach the training: pretraining has the returned numbers to log, nothing else.

    Args:
        benchmark, root: as for `lemon-muse eval`.
        size, mpp: window of the encoder that will be given, px and µm/px.
        cap: most nuclei on each side. Of a dense probe whole windows are drawn until there are as
            many, at most as many pixels as 24 windows of 224 px (or 8 windows).
        seed: of the division of patients and the draw of nuclei.
        bank: 'val': val patients in two halves, alike in class counts, each the bank of the other;
            'train': train nuclei are the bank of all val nuclei. With a single val patient 'train'.
        bf16: run the encoder under bfloat16 autocast.
        dense: nuclei are read off the map of a `DenseEncoder`.
        window, valid: of a dense probe, px, as for `lemon-muse eval`; none = `size`, and 224 or the
            window where that is smaller.

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
    if dense:
        side = window or size
        parts = [
            draw_windows(
                table,
                rows,
                window=side,
                valid=valid or min(side, VALID),
                mpp=mpp,
                cap=cap,
                generator=generator,
            )
            for rows in sides
        ]
        return DenseProbe(table, parts, directions, bf16=bf16)
    sides = [np.sort(generator.permutation(rows)[:cap]) for rows in sides]
    return OnlineProbe(table, sides, directions, size=size, mpp=mpp, bf16=bf16)


class _Probe(ABC):
    """Labels of some sides, and which side is the bank of which; see `online_probe`."""

    def __init__(
        self,
        table: Table,
        sides: list[np.ndarray],
        directions: list[tuple[int, int]],
        *,
        bf16: bool,
    ) -> None:
        self.bf16, self.directions = bf16, directions
        self.labels = [table.label[rows] for rows in sides]
        self.classes = len(table.classes)

    @abstractmethod
    def features(self, encoder: nn.Module, device: torch.device) -> list[np.ndarray]:
        """Features float32 [n, dim] of every side."""

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        device = next(encoder.parameters()).device
        mode = {module: module.training for module in encoder.modules()}
        encoder.eval()
        try:
            x = self.features(encoder, device)
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


class OnlineProbe(_Probe):
    """Crops of some sides."""

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
        super().__init__(table, sides, directions, bf16=bf16)
        self.size = size
        self.crops = [table.crops(size, mpp, rows) for rows in sides]

    def features(self, encoder: nn.Module, device: torch.device) -> list[np.ndarray]:
        if int(encoder.image_size) != self.size:  # type: ignore[arg-type]
            raise ValueError(f"the probe holds crops of {self.size} px, not {encoder.image_size}")
        return [encode(encoder, part, device=device, bf16=self.bf16) for part in self.crops]


class DenseProbe(_Probe):
    """Windows of some sides with the nuclei in them."""

    def __init__(
        self,
        table: Table,
        windows: list[Windows],
        directions: list[tuple[int, int]],
        *,
        bf16: bool,
    ) -> None:
        super().__init__(table, [part.rows for part in windows], directions, bf16=bf16)
        self.windows = windows

    def features(self, encoder: nn.Module, device: torch.device) -> list[np.ndarray]:
        return [encode_nuclei(encoder, w, device=device, bf16=self.bf16) for w in self.windows]


def draw_windows(
    table: Table,
    rows: np.ndarray,
    *,
    window: int,
    valid: int,
    mpp: float,
    cap: int,
    generator: np.random.Generator,
) -> Windows:
    """Windows drawn from those that these nuclei lie in: at most `cap` nuclei, and bounded pixels.

    At least one window is drawn, whatever it holds. No more images are read than are needed twice.
    """
    most = max(FEWEST, int(WINDOWS * (224 / window) ** 2))
    images = generator.permutation(np.unique(table.image[rows]))[: 2 * most]
    rows = rows[np.isin(table.image[rows], images)]
    found = joined(list(windows_of(table, rows, window=window, valid=valid, mpp=mpp)))
    order = generator.permutation(len(found))[:most]
    held = np.cumsum(np.bincount(found.owner, minlength=len(found))[order])
    return found.part(np.sort(order[: max(1, int((held <= cap).sum()))]))


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
