"""Runs of what goes beyond LEMON on crops: exact resume, recipes from the command line, export."""

from pathlib import Path

import pytest
import torch

from launch import cli
from lemon_muse.data.shards import open_index
from lemon_muse.recipe import LemonTrain
from lemon_muse.stop import Stop
from lemon_muse.train import Loop
from tests.conftest import write_blob_shards
from tests.methods.test_context import SMALL

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS: dict[str, dict] = {
    "size": {"view": {"policy": "size"}},
    "positive": {"method": {"context": {"mode": "positive", "zoom": 1.4}}},
    "environment": {
        "method": {
            "context": {"mode": "environment", "zoom": 1.4, "radius": 1.5}, "same_slide": "drop"
        }
    },
    "two windows": {
        "backbone": {**SMALL.model_dump(), "patch": 4, "inner": 8}, "view": {"policy": "size"}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_cut_ends_where_the_whole_one_ends(
    crop_shards: Path, tmp_path: Path, name: str
) -> None:
    tree = {"steps": 4, "batch": 16, "window": 16, "workers": 0, "backbone": SMALL.model_dump()}
    method = {"name": "moco_v3", "hidden": 16, "out_dim": 8, **RUNS[name].get("method", {})}
    tree = {**tree, "data": crop_shards, **RUNS[name], "method": method}
    index = open_index(crop_shards)

    def loop_of(folder: str) -> Loop:
        cfg = LemonTrain.model_validate({**tree, "out": tmp_path / folder})
        loop = Loop(cfg, index, torch.device("cpu"), None)
        (tmp_path / folder).mkdir(exist_ok=True)
        loop.resume()
        return loop

    def go(loop: Loop, until: int) -> None:
        while loop.step < until:
            loop._one_step(loop.method, loop.batches.batch_at(loop.step), Stop())
            loop.step += 1

    whole, cut = loop_of("whole"), loop_of("cut")
    before = {k: v.clone() for k, v in whole.method.state_dict().items()}
    go(whole, 4)
    go(cut, 2)
    cut.save()
    again = loop_of("cut")
    assert again.step == 2
    go(again, 4)
    wanted, found = whole.method.state_dict(), again.method.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)
    assert any(not torch.equal(before[k], wanted[k]) for k in wanted)


@pytest.fixture(scope="module")
def wide_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "crops"
    return write_blob_shards(folder, count=48, size=144, block=16)


@pytest.mark.parametrize("name", ["size", "context", "environment", "two_windows", "same_slide"])
def test_every_recipe_trains_from_the_command_line(
    wide_shards: Path, tmp_path: Path, name: str
) -> None:
    small = "backbone={name: vit_tiny, heads: 3, args: {depth: 1, embed_dim: 24}}"
    words = ["steps=2", "batch=12", "compile=false", "workers=0", "device=cpu", small]
    words += ["method.hidden=16", "method.out_dim=8", f"data={wide_shards}", f"out={tmp_path}"]
    assert cli.main(["train", str(CONFIGS / f"lemon_{name}.yaml"), *words]) == 0
    assert (tmp_path / "encoder" / "config.json").is_file()
    # a checkpoint opens without the shards, whatever the method knows of slides and surroundings
    newest = max((tmp_path / "checkpoints").iterdir())
    exported = cli.main(["export", f"checkpoint={newest}", f"out={tmp_path / 'timm'}"])
    assert exported == (2 if name == "two_windows" else 0)
