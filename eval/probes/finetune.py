"""MUSE's fine-tuning probe: encoder and linear head are trained together on labelled nuclei.

Recipe of finetuning_eval.py and ft_eval.sh (alibaba-damo-academy/MUSE): the head starts as the
linear probe of the same seed, AdamW without weight decay at 1e-5 (4e-5 for their ResNet-50), 10
epochs with a cosine to 0, 32 windows a step without the ragged last one, no augmentation, float32,
every weight is trained, best epoch by accuracy on val (ties: the later one). As there, batch norm
uses and updates the statistics of the batch while it trains; stochastic depth, dropout and dropped
skips, which the published evaluation builds its networks without, are off.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from eval.dense import NUCLEI_PER_WINDOW, Windows, joined, windows_of
from eval.plans import Fold
from eval.probes import Outcome, Part, Protocol, softmax
from eval.probes.linear import fit_layer
from eval.progress import Progress
from lemon_muse.data.table import Table
from lemon_muse.errors import RunError

if TYPE_CHECKING:
    from eval.samplers import Look

log = logging.getLogger(__name__)

EPOCHS = 10
LR, LR_CONVOLUTIONAL = 1e-5, 4e-5
# Nuclei of a step, as of the linear probe. Of windows, which count as 8 nuclei each, that is the
# published 32.
BATCH = 256
# Bytes of pixels of train, and of val, that are kept in memory.
HELD = 4 * 2**30


def finetune(
    encoder: Any,
    look: "Look",
    table: Table,
    folds: Sequence[Fold],
    *,
    x: np.ndarray,
    protocol: Protocol = "default",
    seed: int = 0,
    device: str = "cpu",
    workers: int = 0,
    batch: int = BATCH,
    epochs: int = EPOCHS,
    lr: float | None = None,
    held: int = HELD,
) -> list[Outcome]:
    """End-to-end training on each fold; the encoder that is given stays as it is.

    Without val the last epoch counts. Both protocols are the same. The same seed gives the same
    result on a CPU.

    Args:
        encoder: as `Source.network`: of crops, or with `nuclei` where `look` has a `valid`.
        look: how it is read.
        table: labels are indices into `classes`.
        x: float32 [n, dim], its frozen features of all rows, read the same way.
        workers: threads that read images ahead.
        batch: nuclei of a step; a window of a dense encoder counts as 8, whatever its side.
        lr: None = 1e-5, or 4e-5 for a ResNet or the like: batch norm and no patches.
        held: bytes of pixels of train, and of val, that are kept in memory; where there are more,
            images are read again for every step, which takes long.

    Returns:
        One outcome a fold. `params`: epoch, chosen_on, lr, batch (windows or crops of a step) and
        head_epoch, that of the linear probe.

    Raises:
        RunError: a loss that is not finite, or the network does not fit into the device's memory.
    """
    del protocol
    if lr is None:
        convolutional = not getattr(encoder, "patch_size", None) and any(
            map(_is_norm, encoder.modules())
        )
        lr = LR_CONVOLUTIONAL if convolutional else LR
    step = max(1, batch // NUCLEI_PER_WINDOW) if look.valid else batch
    outcomes = []
    for fold in folds:
        what = f"fine-tuning of {getattr(encoder, 'name', 'encoder')}, {fold.name}"
        parts = [Part(x[r], table.label[r], table.patient[r]) for r in (fold.train, fold.val)]
        head, head_epoch = fit_layer(*parts, classes=len(table.classes), seed=seed, device=device)
        if not all(p.isfinite().all() for p in head.parameters()):
            raise RunError("the linear head that fine-tuning starts from is not finite.")
        model = _Model(encoder, look, head).to(device)
        # Test is read once, so it is not held.
        train, val, test = (
            _Pixels(table, rows, look, workers=workers, held=limit)
            for rows, limit in ((fold.train, held), (fold.val, held), (fold.test, 0))
        )
        try:
            scores, at = _train(
                model, train, val, batch=step, epochs=epochs, lr=lr, seed=seed, what=what
            )
            tested = _scores(model, test, batch=step)
        except torch.OutOfMemoryError:
            raise RunError(
                f"{what}: a step of {step} {train.unit} does not fit into the memory of "
                f"{device}; use a smaller batch= or window=."
            ) from None
        params: dict[str, float | int | str] = {"epoch": at, "lr": lr, "batch": step}
        params |= {"head_epoch": head_epoch, "chosen_on": "val" if len(fold.val) else "nothing"}
        outcomes.append(Outcome(scores, tested, params))
    return outcomes


@dataclass(frozen=True)
class _Batch:
    """Pixels uint8 [t, S, S, 3] and their nuclei int64 [n]; `points` and `owner` of windows."""

    pixels: np.ndarray
    rows: np.ndarray
    points: np.ndarray | None = None
    owner: np.ndarray | None = None


class _Pixels:
    """What a network sees of some rows: a crop a nucleus, or windows with the nuclei in them."""

    def __init__(
        self, table: Table, rows: np.ndarray, look: "Look", *, workers: int, held: int
    ) -> None:
        self.table, self.rows, self.look = table, rows, look
        self.crops: np.ndarray | None = None
        self.windows: Windows | None = None
        self.held, self.unit = True, "windows" if look.valid else "crops"
        if look.valid:
            self._cut(workers, held)
        else:
            # Neighbours in the order lie in the same image, which is then read once.
            self.order = rows[np.argsort(table.image_code[rows], kind="stable")]
            self.held = len(rows) * look.window**2 * 3 <= held
            if self.held:
                self.crops = table.crops(look.window, look.mpp, self.order)
        if not self.held and held:
            log.warning(
                "the pixels of %d nuclei take more than %.1f GiB: images are read again for every "
                "step",
                len(rows),
                held / 2**30,
            )

    def _cut(self, workers: int, held: int) -> None:
        """The windows; without their pixels where these are too many."""
        parts: list[Windows] = []
        size = 0
        for part in self._stream(self.rows, workers):
            parts.append(part)
            size += part.pixels.nbytes
            if size > held:
                self.held = False
                parts = [replace(p, pixels=p.pixels[:, :0, :0]) for p in parts]
        self.windows = joined(parts) if parts else None

    def _stream(self, rows: np.ndarray, workers: int = 0) -> Iterator[Windows]:
        look, valid = self.look, int(self.look.valid or 0)
        return windows_of(
            self.table, rows, window=look.window, valid=valid, mpp=look.mpp, workers=workers
        )

    def __len__(self) -> int:
        if self.look.valid:
            return 0 if self.windows is None else len(self.windows)
        return len(self.rows)

    def take(self, units: np.ndarray) -> _Batch:
        """Some crops or windows, in ascending order: held or read again, the batch is the same."""
        units = np.sort(units)
        if self.windows is None:
            rows, look = self.order[units], self.look
            if self.crops is not None:
                return _Batch(self.crops[units], rows)
            return _Batch(self.table.crops(look.window, look.mpp, rows), rows)
        part = self.windows.part(units)
        if not self.held:
            part = joined(list(self._stream(part.rows)))
        return _Batch(part.pixels, part.rows, part.points, part.owner)


class _Model(nn.Module):
    """A copy of the encoder, read one way, and a head; on normalised images."""

    def __init__(self, encoder: Any, look: "Look", head: nn.Linear) -> None:
        from eval.samplers import reader

        super().__init__()
        # The copy comes last: a reader may share the network with the encoder.
        self.reader = copy.deepcopy(reader(encoder, look)).requires_grad_(True)
        self.head = copy.deepcopy(head)

    def forward(self, batch: _Batch) -> torch.Tensor:
        """Logits float [n, K] of the nuclei of a batch, in its order."""
        from lemon_muse.data.augment import prepare

        device = self.head.weight.device
        pixels = torch.from_numpy(batch.pixels).to(device)
        reader: Any = self.reader
        images = prepare(pixels, window=pixels.shape[1], mean=reader.mean, std=reader.std)
        if batch.points is None or batch.owner is None:
            return self.head(reader(images).float())
        points, owner = (torch.from_numpy(v).to(device) for v in (batch.points, batch.owner))
        return self.head(reader.nuclei(images, points, owner).float())

    def training_mode(self) -> None:
        """Batch norm trains; all that is random stays off."""
        self.eval()
        for module in self.modules():
            if _is_norm(module):
                module.train()


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _train(
    model: _Model,
    train: _Pixels,
    val: _Pixels,
    *,
    batch: int,
    epochs: int,
    lr: float,
    seed: int,
    what: str,
) -> tuple[np.ndarray, int]:
    """Leave the model as it was after the best epoch; scores of val, and that epoch (from 1)."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    batch, label = min(batch, len(train)), train.table.label
    best, at, scores = -1, 0, np.empty(0)
    kept: dict[str, torch.Tensor] = {}
    steps = len(train) // batch
    with Progress(epochs * steps * batch, what=what, unit=train.unit) as progress:
        for epoch in range(epochs):
            model.training_mode()
            order = torch.randperm(len(train), generator=generator).numpy()
            for step in range(steps):
                piece = train.take(order[step * batch : (step + 1) * batch])
                target = torch.from_numpy(label[piece.rows]).to(model.head.weight.device)
                loss = nn.functional.cross_entropy(model(piece), target)
                if not loss.isfinite():
                    raise RunError(f"{what}: the loss is {loss.item()} in epoch {epoch + 1}.")
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                progress.update(batch)
            schedule.step()
            found = _scores(model, val, batch=batch)
            right = int((found.argmax(1) == label[val.rows]).sum())
            if right >= best:
                best, at, scores = right, epoch + 1, found
                kept = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return scores, at


@torch.inference_mode()
def _scores(model: _Model, given: _Pixels, *, batch: int) -> np.ndarray:
    """Class probabilities float32 [n, K] in the order of the given rows."""
    model.eval()
    out = np.zeros((len(given.table), model.head.out_features), np.float32)
    for start in range(0, len(given), batch):
        piece = given.take(np.arange(start, min(start + batch, len(given))))
        out[piece.rows] = softmax(model(piece).cpu().numpy())
    return out[given.rows]
