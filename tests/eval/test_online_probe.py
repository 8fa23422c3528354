"""The online probe: held-out patients, no influence on the training it watches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eval.benchmarks import find
from eval.dense import dense_features, joined, windows_of
from eval.online import DenseProbe, online_probe, patient_halves
from lemon_muse.config import load
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError
from lemon_muse.recipe import Train
from lemon_muse.synthetic import write_images
from tests.eval.standins import TinyEncoder, dense_encoder


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    write_images(folder, slides=12, side=256, seed=5)
    return folder


def test_it_equals_a_plain_loop_over_both_halves(tissue: Path) -> None:
    probe = online_probe("folder", tissue, size=40, mpp=0.25, seed=2)
    net = TinyEncoder()
    found = probe(net)
    table = find("folder").load(tissue)
    sides = patient_halves(table, table.rows("val"), generator=np.random.default_rng(2))
    net.eval()
    from eval.features import encode

    x = [encode(net, table.crops(40, 0.25, rows)).astype(np.float64) for rows in sides]
    x = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in x]
    truth, guess = [], []
    for i, j in ((0, 1), (1, 0)):
        bank = table.label[sides[i]]
        for query, label in zip(x[j], table.label[sides[j]], strict=True):
            near = np.argsort(-(x[i] @ query))[:20]
            votes = np.bincount(bank[near], np.exp(x[i][near] @ query / 0.07), minlength=5)
            truth.append(label)
            guess.append(votes.argmax())
    right = np.array(truth) == np.array(guess)
    recall = [right[np.array(truth) == k].mean() for k in np.unique(truth)]
    assert found["probe/knn_balanced_accuracy"] == pytest.approx(np.mean(recall))
    assert set(found) == {"probe/knn_balanced_accuracy", "probe/knn_macro_f1"}


@pytest.mark.parametrize("bank", ["val", "train"])
def test_bank_and_queries_share_no_patient_and_obey_the_cap(tissue: Path, bank: str) -> None:
    probe = online_probe("folder", tissue, size=40, mpp=0.25, cap=15, bank=bank)
    assert all(len(part) <= 15 for part in probe.crops)  # type: ignore[attr-defined]
    table = find("folder").load(tissue)
    first, second = patient_halves(table, table.rows("val"), generator=np.random.default_rng(0))
    assert not set(table.patient[first]) & set(table.patient[second])
    np.testing.assert_array_equal(np.sort(np.r_[first, second]), table.rows("val"))


def test_it_leaves_mode_gradients_and_random_state_alone(tissue: Path) -> None:
    probe = online_probe("folder", tissue, size=40, mpp=0.25)
    net = TinyEncoder()
    net.train()
    net.dropout.eval()
    state = torch.get_rng_state()
    first = probe(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and net.layer.training and not net.dropout.training
    assert net.layer.weight.grad is None and net.layer.weight.requires_grad
    assert probe(net) == first


def test_a_better_encoder_scores_higher(tissue: Path) -> None:
    probe = online_probe("folder", tissue, size=40, mpp=0.25)

    class Constant(TinyEncoder):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 4)

    better, worse = probe(TinyEncoder()), probe(Constant())
    name = "probe/knn_balanced_accuracy"
    assert better[name] > worse[name] + 0.05


def test_halves_are_alike_in_class_counts(shared_data: Path) -> None:
    table = find("brcam2c").load(shared_data / "brca-m2c")
    rows = table.rows("val")
    halves = patient_halves(table, rows, generator=np.random.default_rng(0))
    counts = np.array([np.bincount(table.label[part], minlength=3) for part in halves])
    assert (counts.min(0) / counts.sum(0) > 0.35).all()


def test_another_window_is_refused(tissue: Path) -> None:
    probe = online_probe("folder", tissue, size=40, mpp=0.25)
    with pytest.raises(ValueError, match="crops of 40 px, not 48"):
        probe(TinyEncoder(image_size=48))


def test_without_val_it_says_so(tissue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Table.rows
    monkeypatch.setattr(
        Table,
        "rows",
        lambda self, split: rows(self, split)[:0] if split == "val" else rows(self, split),
    )
    with pytest.raises(UserError, match="no val nucleus"):
        online_probe("folder", tissue, size=40, mpp=0.25)


def test_a_dense_probe_equals_a_plain_loop_over_its_windows(tissue: Path) -> None:
    net = dense_encoder()
    probe = online_probe("folder", tissue, size=96, mpp=0.5, seed=2, dense=True, valid=64)
    net.network.decoder.train()  # type: ignore[union-attr]
    found = probe(net)
    assert net.network.decoder.training and not net.network.encoder.training  # type: ignore[union-attr]
    table = find("folder").load(tissue)
    sides = patient_halves(table, table.rows("val"), generator=np.random.default_rng(2))
    # No cap was reached: every nucleus of val takes part.
    net.eval()
    whole = dense_features(net, table, window=96, valid=64, mpp=0.5)
    x = [whole[rows].astype(np.float64) for rows in sides]
    x = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in x]
    truth, guess = [], []
    for i, j in ((0, 1), (1, 0)):
        bank = table.label[sides[i]]
        for query, label in zip(x[j], table.label[sides[j]], strict=True):
            near = np.argsort(-(x[i] @ query))[:20]
            votes = np.bincount(bank[near], np.exp(x[i][near] @ query / 0.07), minlength=5)
            truth.append(label)
            guess.append(votes.argmax())
    right = np.array(truth) == np.array(guess)
    recall = [right[np.array(truth) == k].mean() for k in np.unique(truth)]
    assert found["probe/knn_balanced_accuracy"] == pytest.approx(np.mean(recall), abs=0.02)


def test_a_dense_probe_keeps_whole_windows_below_the_cap(tissue: Path) -> None:
    table = find("folder").load(tissue)
    sides = patient_halves(table, table.rows("val"), generator=np.random.default_rng(0))
    probe = online_probe("folder", tissue, size=64, mpp=0.5, cap=8, dense=True)
    every = joined(list(windows_of(table, window=64, valid=64, mpp=0.5)))
    for part, rows in zip(probe.windows, sides, strict=True):  # type: ignore[attr-defined]
        assert 0 < len(part.rows) <= 8 and set(part.rows) < set(rows)
        held = every.owner[np.isin(every.rows, part.rows)]
        inside = np.isin(every.owner, held)
        assert inside.sum() == len(part.rows)  # no nucleus of a window was left out
    one = online_probe("folder", tissue, size=64, mpp=0.5, cap=1, dense=True)
    assert all(len(part) == 1 for part in one.windows)  # type: ignore[attr-defined]
    again = online_probe("folder", tissue, size=64, mpp=0.5, cap=8, dense=True)
    assert probe(dense_encoder()) == again(dense_encoder())


def test_a_training_run_asks_for_the_probe_of_its_method(tissue: Path) -> None:
    from launch.training import online_probe as of_run

    asked = ["data=nowhere", "probe.benchmark=folder", f"probe.root={tissue}", "seed=3"]
    muse = load(Train, [*asked, "method.name=muse"])
    probe = of_run(muse)
    assert isinstance(probe, DenseProbe) and probe.bf16
    assert all(part.pixels.shape[1:] == (224, 224, 3) for part in probe.windows)
    twin = online_probe("folder", tissue, size=224, mpp=0.5, seed=3, dense=True, bf16=True)
    for part, other in zip(probe.windows, twin.windows, strict=True):  # type: ignore[attr-defined]
        np.testing.assert_array_equal(part.pixels, other.pixels)
        np.testing.assert_array_equal(part.points, other.points)
    other = of_run(load(Train, [*asked, "method.name=muse", "probe.window=64", "probe.mpp=0.25"]))
    assert isinstance(other, DenseProbe) and other.windows[0].pixels.shape[1] == 64
    with pytest.raises(UserError, match=r"probe\.window and probe\.mpp are for muse"):
        of_run(load(Train, [*asked, "probe.window=64"]))
    assert of_run(load(Train, ["data=nowhere"])) is None
