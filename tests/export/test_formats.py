"""Exports are opened by their users' own code: timm, transformers, torch.export, ONNX Runtime."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from lemon_muse import encoder as enc
from lemon_muse.errors import UserError
from lemon_muse.export import FORMATS, hf, optional
from lemon_muse.export.job import Export
from lemon_muse.export.job import run as export
from tests.eval.standins import dense_encoder

RESNET = {
    "name": "resnet10t",
    "patch": None,
    "heads": None,
    "args": {"channels": [16, 32, 32, 64]},
}
# The table of positions is for 32 px, so the network resamples it: an operator of its own.
DENSE = {"resnet": RESNET, "small table": {"image": 32}}


def windows(count: int, side: int = 40) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(9))


@torch.inference_mode()
def features(source: Path, images: torch.Tensor) -> torch.Tensor:
    """The source's features by timm alone: architecture, arguments and weights of its folder."""
    folder = source / "encoder"
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model(images)


def test_bare_weights_as_eva_loads_them(source: Path, finished: dict[str, Path]) -> None:
    """It builds the network itself and hands timm the file."""
    images, config = windows(3), json.loads((finished["timm"] / "config.json").read_text())
    bare = timm.create_model(
        config["architecture"],
        num_classes=0,
        checkpoint_path=str(finished["timm"] / "encoder.pth"),
        **config["model_args"],
    ).eval()
    with torch.inference_mode():
        assert torch.equal(bare(images), features(source, images))
    # Nothing but plain contiguous float32 tensors under timm's names: no wrapper, no code.
    state = torch.load(finished["timm"] / "encoder.pth", weights_only=True)
    assert state.keys() == bare.state_dict().keys()
    assert all(v.dtype == torch.float32 and v.is_contiguous() for v in state.values())


def test_pt2_and_the_hub_in_a_process_without_us(
    source: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    images = windows(11)
    torch.save({"images": images, "wanted": features(source, images)}, tmp_path / "pair.pt")
    # The hub's cache as it is after a download, and no network.
    home = tmp_path / "hub" / "models--someone--nuclei"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(finished["timm"], home / "snapshots" / ("0" * 40))
    code = (
        "import json, sys, torch\n"
        "pair, extra = torch.load('pair.pt'), {'lemon_muse.json': ''}\n"
        "def apart(model, count):\n"
        "    with torch.inference_mode():\n"
        "        found = model(pair['images'][:count])\n"
        "    return float((found - pair['wanted'][:count]).abs().max())\n"
        f"model = torch.export.load({str(finished['pt2'] / 'encoder.pt2')!r}, extra_files=extra)\n"
        "print(*[apart(model.module(), count) for count in (1, 2, 11)])\n"
        "assert json.loads(extra['lemon_muse.json'])['mpp'] == 0.25\n"
        "assert not {'timm', 'lemon_muse'} & set(sys.modules)\n"
        "import timm\n"
        "model = timm.create_model('hf-hub:someone/nuclei', pretrained=True).eval()\n"
        "assert model.pretrained_cfg['mean'] == [0.6, 0.4, 0.55], model.pretrained_cfg\n"
        "print(apart(model, 11))\n"
    )
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **offline},
    )
    assert done.returncode == 0, done.stderr
    found = [float(word) for word in done.stdout.split()]
    assert len(found) == 4 and max(found) < 1e-6
    assert run_card(finished["pt2"])["features"].shape == (3, 48)


def test_transformers_opens_hf_and_so_does_timm(source: Path, finished: dict[str, Path]) -> None:
    out = finished["hf"]
    model = AutoModel.from_pretrained(out).eval()
    images = windows(3)
    wanted = features(source, images)
    with torch.inference_mode():
        found = model(pixel_values=images)
        again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images)
    assert torch.equal(found.pooler_output, wanted) and torch.equal(again, wanted)
    # The class token after the final norm is the feature.
    assert torch.equal(found.last_hidden_state[:, 0], wanted)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    given = AutoImageProcessor.from_pretrained(out)([Image.fromarray(pixels)], return_tensors="pt")
    normal = (pixels / 255 - np.array([0.6, 0.4, 0.55])) / np.array([0.2, 0.2, 0.15])
    np.testing.assert_allclose(given["pixel_values"][0], normal.transpose(2, 0, 1), atol=1e-6)
    assert run_card(out)["features"].shape == (1, 48)


def test_onnx_runtime_gives_the_features(source: Path, finished: dict[str, Path]) -> None:
    out = finished["onnx"]
    onnx.checker.check_model(str(out / "encoder.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(out / "encoder.onnx"))
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["batch", 3, 40, 40])]
    assert [(i.name, i.shape) for i in session.get_outputs()] == [("features", ["batch", 48])]
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["mpp"]) == 0.25 and json.loads(said["mean"]) == [0.6, 0.4, 0.55]
    images = windows(11)
    for count in (1, 2, 11):
        (found,) = session.run(None, {"images": images[:count].numpy()})
        np.testing.assert_allclose(found, features(source, images[:count]), atol=1e-5)
    assert run_card(out)["features"].shape == (3, 48)


@pytest.mark.parametrize(("form", "kind"), [("pt2", "resnet"), ("onnx", "small table")])
def test_maps_of_a_dense_network(kind: str, form: str, tmp_path: Path) -> None:
    ours = dense_encoder(**DENSE[kind])
    enc.save_encoder(ours, tmp_path / "source")
    out = export(Export(run=tmp_path / "source", format=form, out=tmp_path / "out"))
    images = windows(3, 64)
    if form == "pt2":
        found = torch.export.load(out / "encoder.pt2").module()(images)
    else:
        session = onnxruntime.InferenceSession(str(out / "encoder.onnx"))
        assert [o.name for o in session.get_outputs()] == ["cls", "map"]
        found = [torch.from_numpy(v) for v in session.run(None, {"images": images.numpy()})]
    with torch.inference_mode():
        torch.testing.assert_close(found[0], ours(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], ours.dense(images), rtol=0, atol=1e-5)
        # The card's own code reads nuclei from the map.
        names = run_card(out)
        points = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)) * 64
        read = names["at_nuclei"](found[1][1], points)
        wanted = ours.nuclei(images, points, torch.ones(7, dtype=torch.int64))
    torch.testing.assert_close(read, wanted, rtol=1e-4, atol=1e-5)
    assert "largest difference" in (out / "README.md").read_text().lower()


def run_card(folder: Path) -> dict:  # type: ignore[type-arg]
    """Every Python block of the model card, run as a user would."""
    text = (folder / "README.md").read_text()
    names: dict = {"torch": torch}  # type: ignore[type-arg]
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0].replace("THIS_FOLDER", str(folder)), names)
    return names


def test_a_network_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    class Fickle(torch.nn.Module):
        num_features, global_pool = 3, "avg"

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            means = images.mean((2, 3))
            return means if bool(means.sum() > 0) else -means

    arguments = {"image_size": 40, "mpp": 0.25, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    fickle = enc.Encoder(Fickle(), architecture="none", arguments={}, name="fickle", **arguments)
    for form in ("pt2", "onnx"):
        with pytest.raises(UserError, match=f"format={form}: torch.export does not support"):
            FORMATS[form](fickle, tmp_path / form, {})
        assert not (tmp_path / form).exists()


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(UserError, match=r"pip install lemon-muse\[interop\]"):
        optional("no_such_package_here", "format=onnx")


def test_a_dense_network_for_transformers_is_its_encoder(tmp_path: Path) -> None:
    ours = dense_encoder()
    assert hf.write(ours, tmp_path / "out", {}) == 0
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    images = windows(2, 64)
    with torch.inference_mode():
        found = model(pixel_values=images).pooler_output
        torch.testing.assert_close(found, ours(images), rtol=0, atol=1e-5)
    assert "without its decoder" in (tmp_path / "out" / "README.md").read_text()
