"""The pictures of a step: what they show is what the loop's method makes of that step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from launch import cli, views
from lemon_muse.config import load
from lemon_muse.data.roi_resample import Windows, resample
from lemon_muse.draw_rois import MOST, ShownView, choose, layout, shared_nuclei
from lemon_muse.recipe import Train
from lemon_muse.train import Loop
from tests.methods.muse_small import WORDS as MUSE

LEMON = [
    "steps=20",
    "batch=16",
    "window=16",
    "method={hidden: 32, out_dim: 16}",
    "backbone={name: vit_tiny, patch: 8, heads: 3, args: {depth: 1, embed_dim: 24}}",
    "device=cpu",
]


def drawn(out: Path, words: list[str]) -> dict[str, Any]:
    assert cli.main(["views", *words, f"out={out}"]) == 0
    said: dict[str, Any] = json.loads((out / "views.json").read_text(encoding="utf-8"))
    return said


def step_of(words: list[str], out: Path, step: int) -> tuple[Loop, list[dict[str, Any]]]:
    """The loop of a run and the parts that it would train on at a step."""
    cfg = load(Train, [*words, f"out={out}"])
    loop = Loop(cfg, cfg.open_data(), torch.device("cpu"), None)
    loop.step = step
    return loop, loop._parts(loop.batches.batch_at(step))


def colours(image: torch.Tensor, loop: Loop) -> np.ndarray:
    """A normalised image [3, s, s] as uint8 [s, s, 3], pixel by pixel of the definition."""
    told = loop.setting
    planes = [
        (image[c].float() * told.std[c] + told.mean[c]).mul(255).round().clamp(0, 255)
        for c in range(3)
    ]
    return torch.stack(planes, 2).numpy().astype(np.uint8)


def share_alike(picture: np.ndarray, box: tuple[int, int, int], image: np.ndarray) -> float:
    """Share of the box's pixels that are those of the enlarged image."""
    x, y, side = box
    zoom = side // len(image)
    assert zoom * len(image) == side
    here = picture[y : y + side, x : x + side]
    return float((here == image.repeat(zoom, 0).repeat(zoom, 1)).all(2).mean())


# ROIs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [[], ["accumulate=2", "precision=bf16", "seed=3"]], ids=["plain", "parts"]
)
def test_rois_are_those_of_the_step(roi_shards: Path, tmp_path: Path, more: list[str]) -> None:
    words = [*MUSE, *more, f"data={roi_shards}"]
    found = drawn(tmp_path / "a", [*words, "step=7", "count=3"])
    loop, parts = step_of(words, tmp_path / "run", 7)
    with torch.autocast("cpu", loop.dtype, enabled=loop.dtype == torch.bfloat16):
        made = [loop.method.make_views(part) for part in parts]  # type: ignore[operator]
    each = len(parts[0]["pixels"])
    samples = loop.batches.batch_at(7)["samples"]
    assert [roi["row"] for roi in found["rois"]] == [0, 2, 5]
    empty = []
    for roi in found["rois"]:
        part, row = divmod(roi["row"], each)
        assert roi["roi"] == samples[roi["row"]]
        picture = np.asarray(Image.open(tmp_path / "a" / roi["picture"]))
        _, _, boxes = layout([14 * 32] * 2 + [14 * 16] * 2, 2)
        held = []
        for v, (said, box) in enumerate(zip(roi["views"], boxes, strict=True)):
            view = made[part][v]
            assert share_alike(picture, box, colours(view.images[row], loop)) > 0.7
            held.append(set(view.inside[row].nonzero().flatten().tolist()))
            assert said["inside"] == len(held[v]) and said["nuclei"] >= said["inside"]
            low = np.array(said["corner"])
            assert (low >= 0).all() and (low + said["extent"] <= 128 + 1e-3).all()
            assert said["mpp"] == pytest.approx(said["extent"] * 0.25 / said["size"], rel=1e-5)
        pairs = {
            (f"G{t + 1}", name): len(held[t] & held[s])
            for t in range(2)
            for s, name in enumerate(["G1", "G2", "L1", "L2"])
            if s != t
        }
        assert {(p["teacher"], p["student"]): p["matched"] for p in roi["pairs"]} == pairs
        matched = [held[0] & (held[1] | held[2] | held[3]), held[1] & (held[0] | held[2] | held[3])]
        matched += [held[v] & (held[0] | held[1]) for v in (2, 3)]
        assert [view["matched"] for view in roi["views"]] == [len(m) for m in matched]
        empty += [not n for n in pairs.values()]
    assert found["empty_pairs"] == pytest.approx(np.mean(empty))


def test_another_step_and_another_seed_show_other_views(roi_shards: Path, tmp_path: Path) -> None:
    words = [*MUSE, f"data={roi_shards}"]
    first = drawn(tmp_path / "a", [*words, "count=8"])
    assert len(first["rois"]) == 8 == len(list((tmp_path / "a").glob("*.png")))  # empty ROIs too
    assert min(roi["nuclei"] for roi in first["rois"]) < 2
    again = drawn(tmp_path / "b", [*words, "count=2"])
    assert again["rois"] == [first["rois"][0], first["rois"][4]]
    for name in ("step0-roi00000.png", "step0-roi00004.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for more in ("step=1", "seed=1"):
        other = drawn(tmp_path / "c", [*words, more, "count=1"])
        assert other["rois"][0]["views"] != first["rois"][0]["views"]


def test_the_saved_settings_of_a_run_give_its_views(roi_shards: Path, tmp_path: Path) -> None:
    words = [*MUSE, "steps=2", f"data={roi_shards}"]
    assert cli.main(["train", *words, f"out={tmp_path / 'run'}"]) == 0
    direct = drawn(tmp_path / "a", [*words, "step=1", "count=1"])
    saved = str(tmp_path / "run" / "config.yaml")
    assert drawn(tmp_path / "b", [saved, "step=1", "count=1"]) == direct


@pytest.mark.parametrize("turn", range(8))
def test_turns_have_the_right_names(turn: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    swapped = image.transpose(1, 0, 2)
    wanted = {
        "upright": image,
        "mirrored": np.fliplr(image),
        "upside down": np.flipud(image),
        "180°": np.rot90(image, 2),
        "transposed": swapped,
        "90° right": np.rot90(image, -1),
        "90° left": np.rot90(image),
        "transposed, 180°": np.rot90(swapped, 2),
    }[views.TURNS[turn]]
    whole = Windows(torch.zeros(1, 2), torch.tensor([12.0]), torch.tensor([turn]), 12.0)
    got = resample(torch.from_numpy(image)[None], whole, size=12)[0].permute(1, 2, 0)
    assert np.array_equal(got.round().numpy().astype(np.uint8), wanted)


# What is numbered, and where things lie ---------------------------------------------------------


def shown(rng: np.random.Generator, kinds: list[int], nuclei: int) -> list[ShownView]:
    made = []
    for v, size in enumerate(kinds):
        points = rng.uniform(-0.5 * size, 1.5 * size, (nuclei, 2))
        inside = np.asarray(((points > 0) & (points < size)).all(1))
        pixels = np.zeros((size, size, 3), np.uint8)
        made.append(ShownView(f"G{v}", pixels, points, inside, (0.0, 0.0), 1.0, 0.5))
    return made


def test_numbered_nuclei_are_shared_few_and_apart() -> None:
    rng, most = np.random.default_rng(0), 0
    for _ in range(20):
        made = shown(rng, [64, 64, 32, 32], 150)
        shared = shared_nuclei(made, 2)
        anywhere = np.flatnonzero(np.any(shared, 0))
        first = int(anywhere[-1])
        got = choose(made, 2, zoom=7, first=first)
        assert got[0] == first and set(got) <= set(anywhere.tolist()) and len(set(got)) == len(got)
        most = max(most, len(got))
        for view in made:
            here = [n for n in got if view.inside[n]]
            gaps = [
                np.hypot(*(view.points[a] - view.points[b])) for a in here for b in here if a < b
            ]
            assert not gaps or min(gaps) * 7 >= 26
    assert most == MOST
    assert choose(made[:1], 1, zoom=7) == [] and not shared_nuclei(made[:1], 1)[0].any()


@pytest.mark.parametrize("globals_", [1, 2, 4])
@pytest.mark.parametrize("locals_", [0, 1, 8, 11])
def test_boxes_lie_apart_and_in_the_picture(globals_: int, locals_: int) -> None:
    (wide, high), roi, boxes = layout([448] * globals_ + [192] * locals_, globals_)
    assert [side for _, _, side in boxes] == [448] * globals_ + [192] * locals_
    covered = np.zeros((high, wide), np.uint8)
    for x, y, side in [roi, *boxes]:
        assert x >= 0 and y >= 0 and x + side <= wide and y + side <= high
        covered[y - 34 : y + side, x : x + side] += 1  # with the title
    assert covered.max() == 1


# Crops ------------------------------------------------------------------------------------------


def test_crops_are_those_of_the_step(crop_shards: Path, tmp_path: Path) -> None:
    words = [*LEMON, f"data={crop_shards}"]
    found = drawn(tmp_path / "a", [*words, "step=5"])  # 20 nuclei are more than the batch has
    loop, parts = step_of(words, tmp_path / "run", 5)
    with torch.autocast("cpu", torch.bfloat16):
        made = loop.method.views.make(parts[0])  # type: ignore[operator]
    samples = loop.batches.batch_at(5)["samples"]
    assert [crop["nucleus"] for crop in found["crops"]] == samples.tolist()
    picture = np.asarray(Image.open(tmp_path / "a" / found["picture"]))
    for i, crop in enumerate(found["crops"]):
        x, y = 20 + i % 4 * (3 * 128 + 12 + 30), 60 + i // 4 * 150
        image = parts[0]["pixels"][i].numpy()
        assert share_alike(picture, (x, y, 128), image) > 0.5  # outlines are on it
        for v in (0, 1):
            box = (x + 134 * (v + 1), y, 128)
            assert share_alike(picture, box, colours(made[v][i], loop)) > 0.9
            theta = parts[0]["views"][v]["theta"][i : i + 1]
            grid = F.affine_grid(theta, [1, 3, 2, 2], align_corners=True)[0]  # at the corners
            wanted = (grid.flatten(0, 1)[[0, 1, 3, 2]] + 1) * 16
            assert np.allclose(crop["views"][v]["corners"], wanted, atol=1e-4)


# Words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["step=20"], "step=20 is never made: the run has the steps 0 to 19"),
        (["batch=64"], "24 ROIs, fewer than batch=64"),
        (["view.globls=2"], "did you mean 'view.globals'?"),
        (["count=0"], "'count' is 0"),
    ],
)
def test_mistakes_are_one_sentence(
    roi_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    out = tmp_path / "a"
    assert cli.main(["views", *MUSE, f"data={roi_shards}", f"out={out}", *more]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_help_has_the_words_of_train_and_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["views", "method.name=muse", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("  step ", "  count ", "view.locals", "default 4", "runs/views"):
        assert word in text
    assert cli.main(["views", "--help"]) == 0
    text = capsys.readouterr().out
    assert "default 20" in text and "roi_edge" in text


def test_methods_draw_their_own_views(crop_shards: Path, roi_shards: Path, tmp_path: Path) -> None:
    """DINOv2's local views and a joint run's dense ones are drawn, not MoCo's and not refused."""
    words = [w for w in LEMON if not w.startswith("method")]
    dino = "method={name: dinov2, locals: 3, local_size: 8, image_prototypes: 16, hidden: 8}"
    said = drawn(tmp_path / "dino", [f"data={crop_shards}", "count=2", *words, dino])
    loop, _ = step_of([f"data={crop_shards}", *words, dino], tmp_path / "a", 0)
    views = loop.method.views.draw(  # type: ignore[operator, union-attr]
        16, torch.Generator().manual_seed(0)
    )
    assert [len(crop["views"]) for crop in said["crops"]] == [2 + 3] * 2 == [len(views)] * 2
    muse = drawn(tmp_path / "muse", [f"data={roi_shards}", "count=1", *MUSE])
    joint = [word.replace("name: muse", "name: joint") for word in MUSE]
    assert joint != MUSE
    both = drawn(tmp_path / "joint", [f"data={roi_shards}", "count=1", *joint])
    assert both["rois"] == muse["rois"] and both["method"] == "joint"
