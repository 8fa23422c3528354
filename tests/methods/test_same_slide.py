"""Keys of the query's own slide are no negatives: values, ranks, chance, mistakes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from launch import cli
from lemon_muse import losses
from lemon_muse.config import load
from lemon_muse.data.augment import ViewConfig
from lemon_muse.data.shards import open_index
from lemon_muse.data.writer import ShardWriter
from lemon_muse.errors import UserError
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.moco_v3 import MoCoV3, MoCoV3Config
from lemon_muse.recipe import Train
from tests import distributed_worker as worker
from tests.conftest import blob_columns, blobs
from tests.methods.test_context import SMALL
from tests.methods.test_moco_v3 import plain_info_nce
from tests.test_distributed import RESNET, WORDS, ranks

SLIDES = {name: {"count": count} for name, count in {"a": 60, "b": 30, "c": 10, "d": 0}.items()}


def plain_without_own_slide(q: np.ndarray, k: np.ndarray, slide: np.ndarray, t: float) -> float:
    """The loop over queries; in the sum are the positive and the keys of other slides."""
    total = 0.0
    for i in range(len(q)):
        terms = []
        for j in range(len(k)):
            cosine = float(q[i] @ k[j] / np.linalg.norm(q[i]) / np.linalg.norm(k[j])) / t
            if j == i:
                own = cosine
            if j == i or slide[j] != slide[i]:
                terms.append(math.exp(cosine))
        total += math.log(sum(terms)) - own
    return total / len(q) * 2 * t


def make(slides: dict | None = SLIDES, **changes: object) -> MoCoV3:
    told = Setting(
        steps=10, batch=16, stored=32, window=16, mpp=0.25, mean=(0.5,) * 3, std=(0.2,) * 3,
        seed=0, view=ViewConfig(), backbone=SMALL, slides=slides,
    )  # type: ignore[arg-type]  # fmt: skip
    return MoCoV3(MoCoV3Config(hidden=16, out_dim=8, same_slide="drop", **changes), told)  # type: ignore[arg-type]


def test_the_loss_is_a_plain_loop_without_own_slide() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 14, 6))
    slide = rng.integers(0, 4, 14)
    given = {"temperature": 0.2, "groups": torch.from_numpy(slide)}
    found = float(losses.info_nce(torch.tensor(q), torch.tensor(k), **given))  # type: ignore[arg-type]
    assert found == pytest.approx(plain_without_own_slide(q, k, slide, 0.2), rel=1e-5)
    assert found < plain_info_nce(q, k, 0.2) - 0.02
    # every nucleus from a slide of its own: nothing is left out, to the bit
    given["groups"] = torch.arange(14)
    apart = losses.info_nce(torch.tensor(q), torch.tensor(k), **given)  # type: ignore[arg-type]
    assert torch.equal(apart, losses.info_nce(torch.tensor(q), torch.tensor(k), temperature=0.2))


def test_left_out_keys_pull_on_nothing() -> None:
    """The gradient of a query does not depend on keys of its own slide; on others' it does."""
    q = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    k = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))

    def gradient(keys: torch.Tensor) -> torch.Tensor:
        leaf = q.clone().requires_grad_()
        groups = torch.tensor([0, 0, 1, 2])
        losses.info_nce(leaf, keys, temperature=0.2, groups=groups).backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all()
        return leaf.grad[0]

    for row, same in ((1, True), (2, False)):
        other = k.clone()
        other[row] = -other[row].flip(0)
        assert torch.equal(gradient(other), gradient(k)) == same


def test_one_slide_in_a_batch_gives_no_loss_and_no_nan() -> None:
    q = torch.randn(4, 5, requires_grad=True)
    loss = losses.info_nce(q, q.detach(), temperature=0.2, groups=torch.zeros(4).long())
    loss.backward()
    assert float(loss.detach()) == 0 and q.grad is not None and not q.grad.any()


def test_the_method_hands_the_slides_on() -> None:
    method = make(temperature=0.1).train()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, 32, 32, 3), generator=generator, dtype=torch.uint8)
    slide = torch.tensor([0, 1, 2, 0] * 4)
    batch = {"pixels": pixels, "views": method.draw(16, generator), "slide": slide}
    assert method.wants_slides
    out = method(batch, 0)
    with torch.no_grad():
        x1, x2 = method.views.make(batch)
        q1, q2 = (
            method.predictor(method.base["projector"](method.base["backbone"](x))) for x in (x1, x2)
        )
        k1, k2 = (method.momentum["projector"](method.momentum["backbone"](x)) for x in (x1, x2))
    given = slide.numpy(), 0.1
    wanted = plain_without_own_slide(q1.numpy(), k2.numpy(), *given)
    wanted += plain_without_own_slide(q2.numpy(), k1.numpy(), *given)
    assert float(out["loss"].detach()) == pytest.approx(wanted, rel=1e-4)
    others = [[a != b for a in slide] for b in slide]
    assert float(out["negatives"]) == pytest.approx(np.mean(others))


def test_chance_is_that_of_equal_features_in_random_batches() -> None:
    method, rng = make(), np.random.default_rng(0)
    ones, values = torch.ones(16, 4), []
    for _ in range(400):
        slide = torch.from_numpy(rng.choice(3, 16, p=[0.6, 0.3, 0.1]))
        values.append(float(losses.info_nce(ones, ones, temperature=0.2, groups=slide)))
    assert method.chance() == pytest.approx(2 * np.mean(values), rel=0.02)
    assert method.chance() < 0.9 * 4 * 0.2 * math.log(16)
    # a run that is opened for its encoder knows no slides
    assert make(slides=None).chance() == pytest.approx(4 * 0.2 * math.log(16))


def test_a_set_of_one_slide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all nuclei of the set are of one slide"):
        make({"a": {"count": 5}, "b": {"count": 0}})


def test_a_subset_of_one_slide_is_refused(
    crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss would be 0 at every step, and nothing would be learnt."""
    words = [f"data={crop_shards}", f"out={tmp_path / 'run'}", "method.same_slide=drop", "steps=2"]
    words += ["batch=16", "window=16", "device=cpu", "workers=0", "method.hidden=16"]
    words += [f"subset.cache={tmp_path / 'cache'}"]
    assert cli.main(["train", *words, "subset.slides=1"]) == 2
    assert "all nuclei of the set are of one slide" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # chance is that of the slides that are read
    cfg = load(Train, [*words, "subset.slides=2"])
    index = cfg.open_data()
    counts = sorted(slide["count"] for slide in (cfg.setting(index).slides or {}).values())
    assert (
        counts == [0, 0, 0, 0, 0, 100, 100]
        and sum(slide["count"] for slide in index.slides.values()) == 700
    )


def test_the_index_counts_nuclei_as_the_method_reads_them(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, size=32, mpp=0.25, encoding="raw") as writer:
        columns = blob_columns(0, 20)
        columns["slide"][:8] = "one"
        columns["slide"][8:] = "two"
        writer.write(blobs(20, 32, np.random.default_rng(0)), columns)
    counts = {name: entry["count"] for name, entry in open_index(tmp_path).slides.items()}
    assert counts == {"one": 8, "two": 12}


def test_two_ranks_are_one(crop_shards: Path, tmp_path: Path) -> None:
    """Slides are gathered with the keys; the masked environment goes through the same loss."""
    words = [
        RESNET, "steps=2", "method.same_slide=drop",
        "method.context={mode: environment, zoom: 1.4, radius: 1.5}",
    ]  # fmt: skip
    worker.main(tmp_path, [f"data={crop_shards}", *WORDS, *words])
    one = dict(np.load(tmp_path / "rank0.npz"))
    two = ranks(2, crop_shards, tmp_path / "two", *words)
    for step in range(2):
        for rank in two:
            np.testing.assert_allclose(rank[f"loss{step}"], one[f"loss{step}"], rtol=2e-5)
            scale = np.abs(one[f"grad{step}"]).max()
            np.testing.assert_allclose(
                rank[f"grad{step}"] / scale, one[f"grad{step}"] / scale, atol=2e-4
            )
        samples = np.concatenate([rank[f"samples{step}"] for rank in two])
        np.testing.assert_array_equal(samples, one[f"samples{step}"])
