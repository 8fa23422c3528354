"""Training with views of other stains: the slide of each crop, every rank, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import cli
from lemon_muse import steps
from lemon_muse.checkpoint import load_newest
from lemon_muse.config import load
from lemon_muse.data.writer import ShardWriter
from lemon_muse.recipe import Train
from lemon_muse.train import Loop
from tests.conftest import blob_columns, blobs
from tests.data.test_stain_views import known_stains, slides_of
from tests.test_views_job import LEMON

POLICIES = ("a1+gmm1", "a1+gmm10", "a1+hed")


@pytest.fixture(scope="module")
def stained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """280 crops of 32 px from 14 slides whose stains are known, but for those of one."""
    folder, rng = tmp_path_factory.mktemp("stained") / "crops", np.random.default_rng(0)
    known = slides_of(known_stains(14))
    with ShardWriter(folder, size=32, mpp=0.25, encoding="raw") as writer:
        for start in range(0, 280, 56):
            slide = np.array([f"slide{i * 5 % 14:02d}" for i in range(start, start + 56)])
            columns = {**blob_columns(start, 56), "slide": slide, "patient": slide}
            writer.write(blobs(56, 32, rng), columns)
        for name, about in known.items():
            entry = writer.add_slide(name, name, 0.5, 0)
            entry["stain"] = None if name == "slide05" else about["stain"]
    return folder


def words(data: Path, out: Path, policy: str) -> list[str]:
    return [*LEMON, f"data={data}", f"out={out}", f"view.policy={policy}", "workers=0"]


def views_of(loop: Loop, step: int) -> list[torch.Tensor]:
    loop.step = step
    batch: dict[str, Any] = loop._parts(loop.batches.batch_at(step))[0]
    return loop.method.views.make(batch)  # type: ignore[operator, union-attr, no-any-return]


@pytest.mark.parametrize("policy", POLICIES)
def test_two_ranks_make_the_views_of_one(stained: Path, tmp_path: Path, policy: str) -> None:
    cfg = load(Train, words(stained, tmp_path / "run", policy))
    index = cfg.open_data()
    loop = Loop(cfg, index, torch.device("cpu"), None)
    whole = views_of(loop, 3)
    params = steps.views_of(cfg, 3, loop.method.draw)
    for rank in range(2):
        batches = steps.open_batches(cfg, index, "crops", slides=True, rank=rank, world=2)
        batch: dict[str, Any] = {k: torch.from_numpy(v) for k, v in batches.batch_at(3).items()}
        here = slice(8 * rank, 8 * rank + 8)
        batch["views"] = [{k: v[here] for k, v in view.items()} for view in params]
        for ours, wanted in zip(loop.method.views.make(batch), whole, strict=True):  # type: ignore[operator, union-attr]
            assert torch.equal(ours, wanted[here])


def test_each_crop_is_taken_from_the_stain_of_its_slide(stained: Path, tmp_path: Path) -> None:
    still = "{rotate: false, scale: [1, 1], ratio: [1, 1], hflip: 0, jitter: 0, blur: [0, 0], "
    still += "erase: 0, policy: a1+gmm1}"
    cfg = load(
        Train,
        [*LEMON, f"data={stained}", f"out={tmp_path}", "workers=0", "batch=64", f"view={still}"],
    )
    loop = Loop(cfg, cfg.open_data(), torch.device("cpu"), None)
    batch = loop._parts(loop.batches.batch_at(0))[0]
    views = loop.method.views.make(batch)  # type: ignore[operator, union-attr]
    names = [place.split()[0] for place in loop.batches.reader.describe(
        loop.batches.batch_at(0)["samples"]
    )]  # fmt: skip
    assert "slide05" in names
    mean, std = (torch.tensor(v)[:, None, None] for v in (loop.setting.mean, loop.setting.std))
    for i, name in enumerate(names):
        own = known_stains(14)[int(name[5:])]
        pixels = batch["pixels"][i, 8:-8, 8:-8].double().numpy()
        density = -np.log((pixels + 1) / 256)
        for view, params in zip(views, batch["views"], strict=True):
            new = own if name == "slide05" else params["stain"][i].double().numpy()
            changed = density + density @ np.linalg.pinv(own) @ (new - own)
            wanted = (256 * np.exp(-changed) - 1).clip(0, 255)
            ours = 255 * (view[i] * std + mean).permute(1, 2, 0).numpy()
            assert np.abs(ours - wanted).max() < 0.02, name


@pytest.mark.parametrize("policy", ["a1+gmm10"])
def test_a_run_goes_on_exactly(stained: Path, tmp_path: Path, policy: str) -> None:
    more = ["save_every=2", "steps=4", "precision=fp32"]
    straight = [*words(stained, tmp_path / "a", policy), *more]
    assert cli.main(["train", *straight]) == 0
    cut = [*words(stained, tmp_path / "b", policy), *more]
    assert cli.main(["train", *cut]) == 0
    newest = max((tmp_path / "b" / "checkpoints").iterdir())
    newest.unlink()
    assert cli.main(["train", *cut]) == 0
    ends = [load_newest(tmp_path / name / "checkpoints") for name in "ab"]
    assert ends[0] is not None and ends[1] is not None and ends[0][0] == ends[1][0] == 4
    first, second = (end[1]["method"] for end in ends if end)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    said = json.loads((tmp_path / "a" / "encoder" / "config.json").read_text(encoding="utf-8"))
    assert said


def test_the_views_job_shows_them(stained: Path, tmp_path: Path) -> None:
    for policy in ("a1", "a1+gmm1"):
        assert cli.main(["views", *words(stained, tmp_path / policy, policy), "count=4"]) == 0
    pictures = [next((tmp_path / p).glob("*.png")).read_bytes() for p in ("a1", "a1+gmm1")]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("a1+gmm10", "the shards hold no stains of their slides"),
        ("a1+gmm1", "make them anew with 'lemon-muse prep'"),
    ],
)
@pytest.mark.parametrize("job", ["train", "views"])
def test_shards_without_stains_are_refused(
    crop_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str, policy: str,
    said: str,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    assert cli.main([job, *words(crop_shards, out, policy)]) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_too_few_slides_are_refused(
    stained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", *words(stained, out, "a1+gmm10"), "view.gaussians=14"]) == 2
    said = capsys.readouterr().err
    assert "have 13 (of 14 slides)" in said and "view.gaussians=13 or fewer" in said
    assert not out.exists()


def test_the_gaussians_are_those_of_the_subset(
    stained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of few slides must not know the stains of the others."""
    part = ["subset.slides=5", f"subset.cache={tmp_path / 'cache'}"]
    cfg = load(Train, [*words(stained, tmp_path / "run", "a1+gmm1"), *part])
    index = cfg.open_data()
    loop = Loop(cfg, index, torch.device("cpu"), None)
    chosen = loop.batches.order.chosen
    assert chosen is not None and chosen.slides is not None and chosen.slides.sum() == 5
    mine = [name for name, yes in zip(index.slides, chosen.slides, strict=True) if yes]
    wanted = known_stains(14)[[int(name[5:]) for name in mine if name != "slide05"]]
    strengths = np.log(np.linalg.norm(wanted, axis=-1))
    found = loop.method.views.stains.points[:, 4:]  # type: ignore[union-attr]
    np.testing.assert_allclose(found, strengths, atol=1e-4)
    assert cli.main(["train", *words(stained, tmp_path / "run", "a1+gmm10"), *part]) == 2
    assert "(of 5 slides)" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_light_jitter_needs_no_stains(crop_shards: Path, tmp_path: Path) -> None:
    cfg = load(Train, words(crop_shards, tmp_path / "run", "a1+hed"))
    loop = Loop(cfg, cfg.open_data(), torch.device("cpu"), None)
    plain = load(Train, words(crop_shards, tmp_path / "run", "a1"))
    other = Loop(plain, plain.open_data(), torch.device("cpu"), None)
    off = (views_of(loop, 0)[0] - views_of(other, 0)[0]).abs()
    assert 0.005 < off.mean() < 0.3


def test_muse_has_no_such_policy(
    roi_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["method.name=muse", "view.policy=a1+gmm10", f"data={roi_shards}"]
    assert cli.main(["train", *named, f"out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "unknown key 'view.policy': method.name=muse has no such key" in said
    assert "method.name=moco_v3 or dinov2;" in said and "did you mean" not in said
