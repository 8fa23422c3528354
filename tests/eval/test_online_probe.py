"""The online probe: held-out patients, no influence on the training it watches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eval.benchmarks import BENCHMARKS
from eval.online import online_probe, patient_halves
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError
from lemon_muse.synthetic import write_images
from tests.eval.standins import TinyEncoder


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    write_images(folder, slides=12, side=256, seed=5)
    return folder


def test_it_equals_a_plain_loop_over_both_halves(tissue: Path) -> None:
    probe = online_probe("folder", tissue, size=40, mpp=0.25, seed=2)
    net = TinyEncoder()
    found = probe(net)
    table = BENCHMARKS["folder"].load(tissue)
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
    table = BENCHMARKS["folder"].load(tissue)
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
    table = BENCHMARKS["brcam2c"].load(shared_data / "brca-m2c")
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
