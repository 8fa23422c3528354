"""MUSE's linear probe (alibaba-damo-academy/MUSE, linear_knn_eval.py)."""

import copy

import numpy as np
import torch
from torch import nn

from eval.probes import Outcome, Part, Protocol, softmax

EPOCHS, BATCH, RATE = 100, 256, 0.01


def linear(
    train: Part,
    val: Part,
    test: Part,
    *,
    classes: int,
    epochs: int = EPOCHS,
    protocol: Protocol = "default",
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """A layer on raw features, as `fit_layer` trains it. Both protocols are the same."""
    del protocol
    layer, epoch = fit_layer(train, val, classes=classes, epochs=epochs, seed=seed, device=device)
    with torch.no_grad():
        scores = [softmax(layer(_on(part, device)).cpu().numpy()) for part in (val, test)]
    chosen = "val" if len(val) else "nothing"
    return Outcome(scores[0], scores[1], {"epoch": epoch, "chosen_on": chosen})


def fit_layer(
    train: Part,
    val: Part,
    *,
    classes: int,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[nn.Linear, int]:
    """The layer of the best epoch by val accuracy (ties: later), and that epoch, from 1.

    Weights N(0, 0.01), bias 0; SGD, lr 0.01, momentum 0.9, no weight decay, cosine to 0 over
    `epochs`; shuffled batches of 256 without the ragged last one. A train split smaller than that
    is one batch. Without val the last epoch counts.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(train.x.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.01)
        layer.bias.zero_()
    layer.to(device)
    x, x_val = _on(train, device), _on(val, device)
    target = torch.from_numpy(train.label).to(device)
    val_target = torch.from_numpy(val.label).to(device)
    batch = min(BATCH, len(train))
    optimiser = torch.optim.SGD(layer.parameters(), lr=RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    best, kept, at = -1, layer, 0
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator).to(device)
        for start in range(0, len(train) - batch + 1, batch):
            rows = order[start : start + batch]
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(layer(x[rows]), target[rows]).backward()
            optimiser.step()
        schedule.step()
        with torch.no_grad():
            right = int((layer(x_val).argmax(1) == val_target).sum())
        if right >= best:
            best, at, kept = right, epoch + 1, copy.deepcopy(layer)
    return kept.requires_grad_(True), at


def _on(part: Part, device: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(part.x, np.float32)).to(device)
