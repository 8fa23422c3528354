"""`lemon-muse embed`: features against timm and OpenSlide, no seams, kills, bad slides."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import timm
import torch
from PIL import Image
from pyarrow import parquet

from launch.embed import Embed, labels, reading, run, work
from lemon_muse.backbones.muse import MuseBackbone, build_muse
from lemon_muse.config import validate
from lemon_muse.dense import DenseEncoder
from lemon_muse.encoder import save_encoder
from lemon_muse.errors import RunError, UserError
from lemon_muse.synthetic import tissue, write_images, write_slide
from tests.eval.standins import small_encoder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_encoder(tmp_path_factory.mktemp("encoder") / "small")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generated slides at 0.25 µm/px with their nuclei."""
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "TCGA-AA-0001-a.svs", side=700, seed=1)
    write_slide(folder / "TCGA-AA-0002-b.svs", side=700, seed=2)
    return folder


def features_of(path: Path) -> np.ndarray:
    column = parquet.read_table(path)["feature"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def points_of(file: Path) -> list[tuple[float, float, str]]:
    found = json.loads(file.read_text(encoding="utf-8"))["features"]
    return [
        (*f["geometry"]["coordinates"], f["properties"]["classification"]["name"]) for f in found
    ]


def test_each_feature_is_what_timm_makes_of_the_window(
    encoder: Path, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART", 70)  # several parts, threads ahead of the network
    out = run(
        Embed(encoder=str(encoder), slide=slides, nuclei=slides, out=tmp_path / "a.parquet",
              merge=0, workers=2, batch=64)
    )  # fmt: skip
    table, found = parquet.read_table(out), features_of(out)
    model = timm.create_model(f"local-dir:{encoder}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    rows = {name: row for row, name in enumerate(table["id"].to_pylist())}
    assert len(rows) == len(table)
    compared = 0
    for path in sorted(slides.glob("*.svs")):
        points = points_of(path.with_suffix(".geojson"))
        with openslide.OpenSlide(path) as slide:
            for number, (x, y, kind) in enumerate(points[:60]):
                row = rows[f"{path.stem}:{number}"]
                assert table["x_px"][row].as_py() == x and table["y_px"][row].as_py() == y
                assert table["x_um"][row].as_py() == pytest.approx(x * 0.25, rel=1e-6)
                assert table["type"][row].as_py() == kind
                assert table["patient"][row].as_py() == path.name[:12]
                left, top = (int(np.floor(v - 20 + 0.5)) for v in (x, y))
                if min(left, top) < 0 or max(left, top) + 40 > 700:
                    continue
                pixels = np.asarray(slide.read_region((left, top), 0, (40, 40)).convert("RGB"))
                given = torch.tensor(pixels).permute(2, 0, 1).float() / 255
                with torch.inference_mode():
                    wanted = model(((given - mean) / std)[None])[0].numpy()
                np.testing.assert_allclose(found[row], wanted, atol=2e-4)
                compared += 1
    assert compared > 60
    assert table["slide"].combine_chunks().dictionary.to_pylist() == [
        "TCGA-AA-0001-a",
        "TCGA-AA-0002-b",
    ]
    about = json.loads(table.schema.metadata[b"lemon_muse"])
    assert about["encoder"]["window"] == 40 and about["encoder"]["mpp"] == 0.25
    assert about["encoder"]["mean"] == pytest.approx(model.pretrained_cfg["mean"])
    assert about["slides"]["TCGA-AA-0001-a"]["width"] == 700
    assert not (tmp_path / "a.parquet.parts").exists()


def conv_encoder(folder: Path) -> Path:
    """A small ResNet with MUSE's decoder: a nucleus' feature depends on 150 px around it."""
    settings = MuseBackbone(
        name="resnet10t",
        convention="centre",
        args={"channels": [8, 16, 16, 32], "stem_width": 8},
        skip_drop=(0.0, 0.0, 0.0),
    )
    network = build_muse(settings, seed=0).train()
    with torch.no_grad():
        network(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    made = DenseEncoder(
        network.eval(), image_size=448, mpp=0.5, mpp_range=(0.25, 0.5), mean=(0.6, 0.4, 0.55),
        std=(0.2, 0.2, 0.15),
    )  # fmt: skip
    return save_encoder(made, folder)


def test_dense_features_do_not_depend_on_the_tiles(tmp_path: Path) -> None:
    """640 px; squares of 128 and of 64 px with 160 and 192 px of context: the same features."""
    Image.fromarray(tissue(3, side=640, mpp=0.5).image).save(tmp_path / "a.png")
    # On both sides of the borders of squares, in the middle and at the border of the image.
    points = [
        (127.0, 200.0),
        (129.0, 200.0),
        (300.0, 255.5),
        (300.0, 256.5),
        (330.2, 401.7),
        (3, 3),
    ]
    (tmp_path / "a.csv").write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in points))
    folder = conv_encoder(tmp_path / "dense")

    def features(**words: Any) -> np.ndarray:
        out = tmp_path / f"{words}.parquet"
        run(
            Embed(encoder=str(folder), slide=tmp_path / "a.png", nuclei=tmp_path / "a.csv",
                  out=out, slide_mpp=0.5, merge=0, **words)
        )  # fmt: skip
        numbers = [int(name.split(":")[1]) for name in parquet.read_table(out)["id"].to_pylist()]
        return features_of(out)[np.argsort(numbers)]

    large, small = features(valid=128), features(valid=64)
    scale = np.abs(large).mean()
    assert np.abs(large - small).max() < 1e-4 * scale
    # Without context the border of a square shows: the test would see seams.
    bare = features(window=128, valid=128)
    assert np.abs(large - bare).max() > 0.05 * scale


CHILD = """
import os, signal, sys
from pathlib import Path
from launch.embed import Embed, reading, run, work
reading.PART = 60
saved, left = work._save, [3]
def save(file, found):
    saved(file, found)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
work._save = save
run(Embed.model_validate_json(sys.argv[1]))
"""


def test_killed_and_run_again_gives_the_same_file(
    encoder: Path, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART", 60)
    words = {"encoder": str(encoder), "slide": slides, "nuclei": slides}
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    run(Embed(**words, out=Path("a.parquet")))
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "killed")
    cfg = Embed(**words, out=Path("a.parquet"))
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, cfg.model_dump_json()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = sorted(Path("a.parquet.parts").glob("*/0*.npy"))
    assert len(parts) == 3 and not Path("a.parquet").exists()
    made: list[Path] = []
    saved = work._save
    monkeypatch.setattr(work, "_save", lambda file, found: (made.append(file), saved(file, found)))
    run(cfg)
    assert made and not {p.resolve() for p in made} & {p.resolve() for p in parts}
    assert Path("a.parquet").read_bytes() == (tmp_path / "whole" / "a.parquet").read_bytes()
    made.clear()
    run(cfg)
    assert not made
    with pytest.raises(UserError, match="made with other words"):
        run(cfg.model_copy(update={"min_score": 0.5}))


def test_a_bad_slide_does_not_stop_the_others(
    encoder: Path, slides: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in slides.iterdir():
        (folder / path.name).symlink_to(path)
    bad = folder / "TCGA-AA-0001-a.svs"
    bad.unlink()
    bad.write_bytes(b"no slide")
    (folder / "lonely.png").write_bytes(b"no detections belong to it")
    cfg = Embed(encoder=str(encoder), slide=folder, nuclei=folder, out=tmp_path / "a.parquet")
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match=r"TCGA-AA-0001-a.*lonely"):
        run(cfg)
    names = parquet.read_table(cfg.out)["slide"].combine_chunks().dictionary.to_pylist()
    assert names == ["TCGA-AA-0002-b"]
    bad.unlink()
    bad.symlink_to(slides / bad.name)
    (folder / "lonely.png").unlink()
    run(cfg)
    assert len(set(parquet.read_table(cfg.out)["slide"].to_pylist())) == 2


def test_wrong_words_and_files_are_refused(encoder: Path, slides: Path, tmp_path: Path) -> None:
    good = {"encoder": str(encoder), "slide": str(slides), "out": str(tmp_path / "a.parquet")}

    def refused(match: str, **words: object) -> None:
        with pytest.raises(UserError, match=match):
            run(validate(Embed, {**good, **words}))

    refused("must end in .h5ad", out=str(tmp_path / "a.csv"))
    refused("exactly one group", patient="TCGA")
    refused("no slide or folder", slide=str(tmp_path / "none"))
    refused("no detection file", nuclei=str(tmp_path / "none.csv"))
    refused("has 2 slides", nuclei=str(slides / "TCGA-AA-0001-a.geojson"))
    refused("cannot be used", device="cuda:99")
    (tmp_path / "a.parquet").write_bytes(b"something of the user's")
    refused("no table of lemon-muse embed")
    assert (tmp_path / "a.parquet").read_bytes() == b"something of the user's"
    Image.fromarray(np.zeros((90, 90, 3), np.uint8)).save(tmp_path / "plain.png")
    refused("give slide_mpp=", slide=str(tmp_path / "plain.png"), out=str(tmp_path / "b.zarr"))
    (tmp_path / "twice" / "x").mkdir(parents=True)
    for path in (tmp_path / "twice" / "a.png", tmp_path / "twice" / "x" / "a.png"):
        path.write_bytes(b"")
    refused("the same name", slide=str(tmp_path / "twice"), out=str(tmp_path / "b.zarr"))


def test_low_scores_are_left_out_and_numbers_stay(encoder: Path, tmp_path: Path) -> None:
    Image.fromarray(tissue(3, side=200, mpp=0.25).image).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text(
        "x,y,score\n50,50,0.2\n90,90,0.9\n150,20,\n900,9,1\n91,90,0.8\n"
    )
    out = run(
        Embed(encoder=str(encoder), slide=tmp_path / "a.png", nuclei=tmp_path / "a.csv",
              out=tmp_path / "o.parquet", slide_mpp=0.25, min_score=0.5)
    )  # fmt: skip
    # 0: low; 2: no score, stays; 3: outside; 4: within 2 µm of 1, which has the higher score
    assert sorted(parquet.read_table(out)["id"].to_pylist()) == ["a:1", "a:2"]


def test_classify_is_a_balanced_logistic_regression_on_the_same_features(
    encoder: Path, slides: Path, tmp_path: Path
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    write_images(tmp_path / "data", slides=6, side=300)
    path = slides / "TCGA-AA-0002-b.svs"
    cfg = validate(
        Embed,
        {
            "encoder": str(encoder), "slide": str(path),
            "nuclei": str(path.with_suffix(".geojson")), "out": str(tmp_path / "a.parquet"),
            "geojson": str(tmp_path / "a.geojson"),
            "classify": {"benchmark": "folder", "root": str(tmp_path / "data")},
        },
    )  # fmt: skip
    way = work.open_way(cfg)
    probe = labels.fit_probe(cfg, way, tmp_path)
    run(cfg)
    table, found = parquet.read_table(cfg.out), features_of(cfg.out)
    from eval.benchmarks import find

    train = find("folder").load(tmp_path / "data")
    label = train.label[train.rows("train")]
    scaler = StandardScaler().fit(probe.train)
    peer = LogisticRegression(C=probe.facts["C"], class_weight="balanced", max_iter=5000, tol=1e-6)
    chance = peer.fit(scaler.transform(probe.train), label).predict_proba(scaler.transform(found))
    wanted = np.array(train.classes)[peer.classes_[chance.argmax(1)]]
    said = np.array(table["predicted"].to_pylist())
    assert len(set(said)) > 1 and (said == wanted).mean() > 0.98
    np.testing.assert_allclose(table["probability"].to_numpy(), chance.max(1), atol=0.02)
    drawn = {tuple(p[:2]): p[2] for p in points_of(cfg.geojson)}
    for x, y, name in zip(table["x_px"].to_pylist(), table["y_px"].to_pylist(), said, strict=True):
        assert drawn[round(x, 2), round(y, 2)] == name
