"""MUSE's linear probe (alibaba-damo-academy/MUSE, linear_knn_eval.py)."""

import numpy as np

from eval.probes import Outcome, Part, Protocol, softmax


def linear(
    train: Part,
    val: Part,
    test: Part,
    *,
    classes: int,
    epochs: int = 100,
    batch: int = 256,
    lr: float = 0.01,
    protocol: Protocol = "default",
    seed: int = 0,
    device: str = "cpu",
) -> Outcome:
    """MUSE's linear probe: a layer on raw features, SGD, best epoch by val accuracy (ties: later).

    Weights N(0, 0.01), bias 0, momentum 0.9, no weight decay, cosine to 0 over `epochs`, shuffled
    batches without the ragged last one. A train split smaller than `batch` is one batch. Without
    val the last epoch counts. Both protocols are the same.
    """
    del protocol
    import torch

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, train.x.shape[1], generator=generator) * 0.01
    layer = torch.nn.Linear(train.x.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.zero_()
    layer.to(device)
    x, x_val, x_test = (
        torch.from_numpy(np.ascontiguousarray(part.x, np.float32)).to(device)
        for part in (train, val, test)
    )
    target = torch.from_numpy(train.label).to(device)
    val_target = torch.from_numpy(val.label).to(device)
    batch = min(batch, len(train))
    optimiser = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    best, scores, at = -1, (np.empty(0), np.empty(0)), 0
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator).to(device)
        for start in range(0, len(train) - batch + 1, batch):
            rows = order[start : start + batch]
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(layer(x[rows]), target[rows]).backward()
            optimiser.step()
        schedule.step()
        with torch.no_grad():
            guess = layer(x_val)
            right = int((guess.argmax(1) == val_target).sum())
            if right >= best:
                best, at = right, epoch + 1
                scores = (guess.cpu().numpy(), layer(x_test).cpu().numpy())
    chosen = "val" if len(val) else "nothing"
    return Outcome(softmax(scores[0]), softmax(scores[1]), {"epoch": at, "chosen_on": chosen})
