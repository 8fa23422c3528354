"""init=: MUSE from a run (larger views too), an encoder folder, a released file; wrong ones."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from launch import cli
from lemon_muse.backbones.muse import MuseBackbone, build_muse
from lemon_muse.backbones.muse_weights import to_released
from lemon_muse.encoder import load
from lemon_muse.errors import UserError
from lemon_muse.stop import Stop
from lemon_muse.train import Loop
from tests.methods.muse_small import WORDS, a_batch, method_of, open_loop

POSITIONS = "encoder.encoder.pos_embed"
LARGE = ["backbone.image=64", "view={global_size: 64, local_size: 32}"]
WIDE = "backbone={name: vit_tiny, patch: 8, image: 32, args: {depth: 2, embed_dim: 64}}"


def steps(loop: Loop, count: int) -> None:
    for step in range(loop.step, count):
        loop.step = step
        loop._one_step(loop.method, loop.batches.batch_at(step), Stop())
    loop.step = count
    loop.save()


@pytest.fixture(scope="module")
def source(roi_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with its checkpoint and its encoder."""
    out = tmp_path_factory.mktemp("source") / "run"
    loop = open_loop(roi_shards, out, "optim.warmup=0", "method.momentum=0.5")
    steps(loop, 2)
    loop.export({})
    return out


def state(loop: Loop) -> dict[str, torch.Tensor]:
    return method_of(loop).state_dict()


def bicubic(table: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """The patches of a table [1, old * old, D] by torch's bicubic."""
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    moved = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return moved.permute(0, 2, 3, 1).reshape(1, new * new, -1)


def test_larger_views_take_everything_over_and_resample_positions(
    source: Path, roi_shards: Path, tmp_path: Path
) -> None:
    before = state(resumed(roi_shards, source))
    loop = open_loop(roi_shards, tmp_path / "run", *LARGE, f"init={source}", "seed=9")
    after = state(loop)
    assert after.keys() == before.keys() and loop.step == 0
    for key, value in after.items():
        if key.endswith(POSITIONS):
            assert value.shape == (1, 65, 32)
            assert torch.equal(value[:, :1], before[key][:, :1])
            torch.testing.assert_close(value[:, 1:], bicubic(before[key][:, 1:], 4, 8))
        else:
            assert torch.equal(value, before[key]), key
    assert after["centres.image.value"].any() and after["centres.nucleus.value"].any()
    apart = [k for k in after if k.startswith("student.") and k.endswith("weight_v")]
    assert any(not torch.equal(after[k], after[k.replace("student", "teacher")]) for k in apart)
    assert method_of(loop)(a_batch(loop), 0)["loss"].isfinite()


def resumed(data: Path, out: Path) -> Loop:
    loop = open_loop(data, out, "optim.warmup=0", "method.momentum=0.5")
    loop.resume()
    loop.monitor.close()
    return loop


def test_a_run_goes_on_without_its_source(source: Path, roi_shards: Path, tmp_path: Path) -> None:
    """A checkpoint of its own comes before init=, which then need not be there any more."""
    moved = shutil.copytree(source, tmp_path / "source")
    words = [*LARGE, f"init={moved}"]
    loop = open_loop(roi_shards, tmp_path / "run", *words)
    steps(loop, 1)
    shutil.rmtree(moved)
    again = open_loop(roi_shards, tmp_path / "run", *words)
    again.resume()
    again.monitor.close()
    assert again.step == 1
    ours, theirs = state(loop), state(again)
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_an_encoder_folder_gives_the_backbone_alone(
    source: Path, roi_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(source / "encoder", tmp_path / "encoder")
    weights = load(folder).network.state_dict()
    fresh = state(open_loop(roi_shards, tmp_path / "a"))
    found = state(open_loop(roi_shards, tmp_path / "b", f"init={folder}"))
    assert "has no heads: they start at random" in caplog.text
    for key, value in found.items():
        who, _, name = key.partition(".")
        if name.startswith("backbone."):
            assert torch.equal(value, weights[name.removeprefix("backbone.")]), key
        else:
            assert torch.equal(value, fresh[key]), (who, key)
    large = state(open_loop(roi_shards, tmp_path / "c", *LARGE, f"init={folder}"))
    for who in ("student", "teacher"):
        table = large[f"{who}.backbone.{POSITIONS}"][:, 1:]
        torch.testing.assert_close(table, bicubic(weights[POSITIONS][:, 1:], 4, 8))


def test_a_released_file(roi_shards: Path, tmp_path: Path) -> None:
    net = build_muse(
        MuseBackbone(name="vit_tiny", patch=8, image=48, args={"depth": 2, "embed_dim": 64}),
        seed=7,
    )
    file = tmp_path / "released.pth"
    torch.save(to_released(net), file)
    found = state(open_loop(roi_shards, tmp_path / "run", WIDE, f"init={file}"))
    for key, value in net.state_dict().items():
        for who in ("student", "teacher"):
            ours = found[f"{who}.backbone.{key}"]
            if key == POSITIONS:
                torch.testing.assert_close(ours[:, 1:], bicubic(value[:, 1:], 6, 4))
            else:
                assert torch.equal(ours, value), key


def test_register_tokens_have_no_positions(roi_shards: Path, tmp_path: Path) -> None:
    """A ViT whose table holds patches only."""
    name = (
        "backbone={name: vit_small_patch14_reg4_dinov2, patch: 14, heads: 1, image: 28, "
        "args: {depth: 1, embed_dim: 32}}"
    )
    views = "view={global_size: 28, local_size: 28}"
    loop = open_loop(roi_shards, tmp_path / "a", name, views)
    steps(loop, 1)
    key = f"student.backbone.{POSITIONS}"
    before = state(loop)[key]
    assert before.shape == (1, 4, 32)
    more = ["backbone.image=56", "view.global_size=56", f"init={tmp_path / 'a'}"]
    after = state(open_loop(roi_shards, tmp_path / "b", name, views, *more))[key]
    torch.testing.assert_close(after, bicubic(before, 2, 4))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([WIDE], "holds another network: .* does not fit"),
        (["backbone.heads=2"], "trained with 1 attention heads, not 2; set backbone.heads=1"),
        (["backbone.patch=4"], "holds another network"),
        (["backbone.decoder=single"], "holds another network"),
        (["backbone.norm=group"], "holds another network"),
        (["backbone.args.depth=3"], "holds another network"),
        (["backbone={name: resnet18, args: {channels: [8, 8, 8, 8]}}"], "another network"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "encoder"])
def test_another_network_is_one_sentence(
    kind: str, words: list[str], said: str, source: Path, roi_shards: Path, tmp_path: Path
) -> None:
    folder = source if kind == "run" else source / "encoder"
    with pytest.raises(UserError, match=said) as caught:
        open_loop(roi_shards, tmp_path / "run", *words, f"init={folder}")
    assert "\n" not in str(caught.value)


def test_other_heads_of_a_run(source: Path, roi_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another network: student\.image\.last_layer"):
        open_loop(roi_shards, tmp_path, "method.image_prototypes=50", f"init={source}")


def test_what_is_no_source_of_muse_exits_2_and_leaves_nothing(
    source: Path,
    roi_shards: Path,
    crop_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lemon: list[Any] = ["steps=1", "batch=16", "window=16", "precision=fp32", "device=cpu"]
    lemon += ["backbone={name: vit_tiny, patch: 8, heads: 1, args: {depth: 1, embed_dim: 32}}"]
    lemon += ["method={hidden: 16, out_dim: 16}", "workers=0", f"data={crop_shards}"]
    assert cli.main(["train", f"out={tmp_path / 'lemon'}", *lemon]) == 0
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"PK\x03\x04 cut short")
    for wrong, said in (
        (tmp_path / "lemon", "is a run of moco_v3; MUSE starts from a run of muse"),
        (tmp_path / "lemon" / "encoder", "holds a crop encoder; MUSE needs an encoder with its"),
        (bad, "is cut short or not a file that torch.save wrote"),
        (roi_shards, "is not an encoder folder"),
    ):
        out = tmp_path / "run"
        words = ["train", f"data={roi_shards}", f"out={out}", *WORDS, f"init={wrong}"]
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err.strip().splitlines()[-1]
        assert not out.exists()
    words[-1] = f"init={source}"
    assert cli.main([*words, "steps=1"]) == 0
    assert load(out).content_hash != load(source).content_hash
