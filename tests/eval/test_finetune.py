"""Fine-tuning against a loop written here, against the frozen linear probe, and what it must not
do."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval.plans import Fold
from eval.probes import Outcome, Part
from eval.probes.finetune import finetune
from eval.probes.linear import fit_layer, linear
from eval.samplers import Look, Words, choose, features_of
from lemon_muse.data.table import Table
from lemon_muse.encoder import load
from lemon_muse.errors import RunError
from tests.eval.standins import TinyEncoder, dense_encoder, small_encoder

MEAN, STD = (0.6, 0.4, 0.55), (0.2, 0.2, 0.15)
NONE = np.empty(0, np.int64)


class Normed(nn.Module):
    """A crop encoder with batch norm and with a dropout that must stay off."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.name, self.image_size, self.mpp, self.dim = "normed", 16, 0.5, 6
        self.patch_size, self.mean, self.std = None, MEAN, STD
        self.conv, self.norm = nn.Conv2d(3, 6, 5, stride=3), nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(6, 3, 5, 5, generator=generator) * 0.2)
            self.conv.bias.zero_()  # type: ignore[union-attr]
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.norm(self.conv(images)).relu().mean((2, 3)))


def drawn(folder: Path, *, images: int = 6, side: int = 96, per_image: int = 12) -> Table:
    """Discs (0) and rings (1) of similar colour on a pink ground; one patient an image."""
    generator = np.random.default_rng(1)
    y, x = np.mgrid[:side, :side] + 0.5
    paths, points, labels = [], [], []
    for i in range(images):
        pixels = generator.normal((205, 150, 190), 8, (side, side, 3))
        cells = generator.permutation(16)[:per_image]
        for cell in cells:
            at = np.array([cell % 4, cell // 4]) * (side / 4) + side / 8
            label = int(generator.integers(2))
            far = np.hypot(x - at[0], y - at[1])
            inside = (far < 7) & ((label == 0) | (far > 4))
            pixels[inside] = generator.normal((95, 60, 130), 12, (int(inside.sum()), 3))
            paths.append(str(folder / f"{i}.png"))
            points.append(at)
            labels.append(label)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    # Rows of one image must not have to stand together.
    order = generator.permutation(len(labels))
    image = np.array(paths)[order]
    place = np.array(points)[order]
    slide = np.array([Path(p).stem for p in image])
    return Table(
        image,
        place[:, 0],
        place[:, 1],
        np.full(len(order), 0.5),
        np.array(labels)[order],
        slide,
        slide,
        np.full(len(order), "all"),
        classes=("disc", "ring"),
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return drawn(tmp_path_factory.mktemp("drawn"))


def fold_of(table: Table) -> Fold:
    def rows(*names: str) -> np.ndarray:
        return np.flatnonzero(np.isin(table.slide, names))

    return Fold("test", rows("0", "1", "2"), rows("3"), rows("4", "5"))


def frozen(encoder: Any, look: Look, table: Table) -> np.ndarray:
    return features_of(encoder, look, table, batch=64, workers=0, device="cpu", name="x")


def crop_look(encoder: Any) -> Look:
    return Look("crop", encoder.image_size, None, encoder.mpp, "", True)


def parts(table: Table, fold: Fold, x: np.ndarray) -> list[Part]:
    return [Part(x[r], table.label[r], table.patient[r]) for r in (fold.train, fold.val, fold.test)]


def normalised(table: Table, rows: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(table.crops(16, 0.5, rows)).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def plain_linear(train: Part, *, epochs: int, seed: int) -> nn.Linear:
    """MUSE's linear probe up to an epoch, written out."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(train.x.shape[1], 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.01)
        layer.bias.zero_()
    speed = [torch.zeros_like(p) for p in layer.parameters()]
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator)  # one batch: all of train
        loss = nn.functional.cross_entropy(
            layer(torch.from_numpy(train.x)[order]), torch.from_numpy(train.label)[order]
        )
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        lr = 0.01 * (1 + np.cos(np.pi * epoch / 100)) / 2
        with torch.no_grad():
            for p, v, g in zip(layer.parameters(), speed, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(lr * v)
    return layer


def test_two_epochs_equal_a_plain_loop(table: Table) -> None:
    encoder, fold = Normed(), fold_of(table)
    x = frozen(encoder, crop_look(encoder), table)
    given = {"seed": 3, "batch": 10, "epochs": 2, "lr": 2e-3}
    none = Fold("test", fold.train, NONE, fold.test)
    found = finetune(encoder, crop_look(encoder), table, [none], x=x, **given)[0]
    chosen = {"epoch": 2, "chosen_on": "nothing", "lr": 2e-3, "head_epoch": 100, "batch": 10}
    assert found.params == chosen

    network = Normed().requires_grad_(True)
    head = plain_linear(parts(table, fold, x)[0], epochs=100, seed=3)
    weights = [*network.parameters(), *head.parameters()]
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    # Nuclei stand in the order of their images; a batch takes them in that order.
    by_image = sorted(fold.train.tolist(), key=lambda row: table.image[row])
    generator = torch.Generator().manual_seed(3)
    count = 0
    for lr in (2e-3, 1e-3):
        order = torch.randperm(len(by_image), generator=generator).tolist()
        network.norm.train()
        for start in range(0, len(by_image) - 9, 10):
            rows = np.array([by_image[i] for i in sorted(order[start : start + 10])])
            logits = head(network(normalised(table, rows)))
            target = torch.from_numpy(table.label[rows])
            loss = -(logits.log_softmax(1)[torch.arange(10), target]).mean()
            gradients = torch.autograd.grad(loss, weights)
            count += 1
            with torch.no_grad():
                for w, m, v, g in zip(weights, first, second, gradients, strict=True):
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    scale = (v / (1 - 0.999**count)).sqrt() + 1e-8
                    w.sub_(lr * m / (1 - 0.9**count) / scale)
    network.norm.eval()
    with torch.no_grad():
        expected = head(network(normalised(table, fold.test))).softmax(1).numpy()
    np.testing.assert_allclose(found.test, expected, atol=2e-4)
    before = linear(*parts(table, none, x), classes=2, seed=3)
    assert np.abs(found.test - before.test).max() > 0.02  # the loop had something to do


def readings(name: str, folder: Path) -> tuple[Any, Look]:
    if name == "map":
        encoder: Any = dense_encoder(norm="group")
        return encoder, choose(encoder, Words(valid=48))
    encoder = load(small_encoder(folder / "encoder"))
    words = {
        "crop": Words(),
        "cls": Words(sampler="cls", window=24, mpp=0.5),
        "resized": Words(window=20, mpp=0.5, resize=True),
        "tokens": Words(sampler="tokens", window=48, valid=32, mpp=0.5),
    }
    return encoder, choose(encoder, words[name])


@pytest.mark.parametrize("name", ["crop", "cls", "resized", "tokens", "map"])
def test_without_a_step_it_is_the_linear_probe(name: str, table: Table, tmp_path: Path) -> None:
    encoder, look = readings(name, tmp_path)
    x, fold = frozen(encoder, look, table), fold_of(table)
    found = finetune(encoder, look, table, [fold], x=x, seed=1, epochs=2, lr=0.0)[0]
    expected = linear(*parts(table, fold, x), classes=2, seed=1)
    np.testing.assert_allclose(found.val, expected.val, atol=2e-4)
    np.testing.assert_allclose(found.test, expected.test, atol=2e-4)
    assert found.params["head_epoch"] == expected.params["epoch"]
    assert found.params["batch"] == (32 if look.valid else 256)
    assert found.params["epoch"] == 2  # all epochs are equally good: the later one counts


@pytest.mark.parametrize("name", ["crop", "map"])
def test_the_pixels_may_be_read_again_for_every_step(
    name: str, table: Table, tmp_path: Path
) -> None:
    encoder, look = readings(name, tmp_path)
    x, fold = frozen(encoder, look, table), fold_of(table)

    def run(**given: Any) -> Outcome:
        words = {
            "x": x,
            "seed": 4,
            "batch": 40 if look.valid else 5,
            "epochs": 2,
            "lr": 1e-3,
            **given,
        }
        return finetune(encoder, look, table, [fold], **words)[0]

    first, second, again = run(), run(), run(held=1)
    np.testing.assert_array_equal(first.test, second.test)
    np.testing.assert_array_equal(first.test, again.test)
    np.testing.assert_array_equal(first.val, again.val)
    assert not np.array_equal(first.test, run(seed=5).test)


def test_a_dense_encoder_learns_and_stays_as_it_was(table: Table) -> None:
    encoder = dense_encoder()  # with batch norm
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    look = choose(encoder, Words(valid=48))
    x, fold = frozen(encoder, look, table), fold_of(table)
    both = Fold("test", fold.train, fold.val, np.concatenate([fold.train, fold.test]))
    found = finetune(encoder, look, table, [both], x=x, batch=32, epochs=8, lr=2e-3)[0]
    start = linear(*parts(table, both, x), classes=2)

    def loss(outcome: Outcome) -> float:
        mine = outcome.test[: len(fold.train)]
        return float(-np.log(mine[np.arange(len(mine)), table.label[fold.train]]).mean())

    def accuracy(scores: np.ndarray, rows: np.ndarray) -> float:
        return float((scores.argmax(1) == table.label[rows]).mean())

    assert loss(found) < 0.7 * loss(start)
    assert accuracy(found.val, fold.val) >= accuracy(start.val, fold.val)
    tests = [o.test[len(fold.train) :] for o in (found, start)]
    assert accuracy(tests[0], fold.test) > max(0.85, accuracy(tests[1], fold.test))
    for k, v in encoder.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_test_is_scored_by_the_epoch_that_was_best_on_val(table: Table) -> None:
    encoder, fold = dense_encoder(), fold_of(table)
    look = choose(encoder, Words(valid=48))
    x = frozen(encoder, look, table)
    same = Fold("test", fold.train, fold.val, fold.val)
    # Val says the opposite of train, so that the more is learnt the worse it gets.
    label = table.label.copy()
    label[fold.val] = 1 - label[fold.val]
    turned = replace(table, label=label)
    found = finetune(encoder, look, turned, [same], x=x, batch=32, epochs=6, lr=2e-3)[0]
    assert int(found.params["epoch"]) < 6
    np.testing.assert_array_equal(found.test, found.val)


def test_the_head_is_the_layer_of_the_linear_probe(table: Table) -> None:
    encoder, fold = Normed(), fold_of(table)
    train, val, _ = parts(table, fold, frozen(encoder, crop_look(encoder), table))
    head, epoch = fit_layer(train, val, classes=2, seed=2)
    plain = plain_linear(train, epochs=epoch, seed=2)
    for a, b in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_learning_rates_and_a_loss_that_is_not_finite(table: Table, tmp_path: Path) -> None:
    encoder, fold = Normed(), fold_of(table)
    look = crop_look(encoder)
    x = frozen(encoder, look, table)
    assert finetune(encoder, look, table, [fold], x=x, epochs=1)[0].params["lr"] == 4e-5
    vit, own = readings("crop", tmp_path)
    features = frozen(vit, own, table)
    assert finetune(vit, own, table, [fold], x=features, epochs=1)[0].params["lr"] == 1e-5
    # Without batch norm and patches it may be any transformer.
    tiny = TinyEncoder(image_size=16, mpp=0.5)
    plain = frozen(tiny, crop_look(tiny), table)
    found = finetune(tiny, crop_look(tiny), table, [fold], x=plain, epochs=1)[0]
    assert found.params["lr"] == 1e-5
    with pytest.raises(RunError, match=r"normed, test: the loss is (nan|inf) in epoch \d"):
        finetune(encoder, look, table, [fold], x=x, epochs=6, lr=1e30, batch=8)
