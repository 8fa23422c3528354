"""The demo from the command line: killed in the middle, run again, everything there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def demo(out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "demo", f"out={out}", *words]


@pytest.mark.slow
def test_generated_tissue(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    words = ["steps=24", "slides=12", "side=512"]
    process = subprocess.Popen(
        demo(out, *words),
        cwd=ROOT,
        env=ENV,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 10/"):
            break
    process.send_signal(signal.SIGKILL)
    opening = process.communicate()[0].splitlines()[0]
    assert "pretrains a nucleus encoder" in opening and "minutes on 2 cores" in opening
    done = subprocess.run(demo(out, *words), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stdout  # the shards of the killed run are kept
    page = (out / "report" / "report.html").read_text(encoding="utf-8")
    assert "data:image/" in page and "http://" not in page.replace("http://www.w3.org", "")
    rows = [json.loads(line) for line in (out / "eval" / "results.jsonl").read_text().splitlines()]
    names = {row["encoder"].split("@")[0] for row in rows}
    assert names >= {"demo", "random:demo", "floor:majority", "floor:colour", "floor:pixel_pca"}
    model = timm.create_model(f"local-dir:{out / 'export' / 'timm'}", pretrained=True)
    assert model.num_features == 256
    header = json.loads((out / "crops" / "index.json").read_text())
    assert header["source"]["types"] is False


@pytest.mark.slow
def test_real_nuclei(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "brca"
    words = [f"data={shared_data / 'brca-m2c'}", "steps=6"]
    done = subprocess.run(demo(out, *words), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3537 nuclei of 16 patients" in done.stdout
    seen = set(json.loads((out / "crops" / "index.json").read_text())["slides"])
    listed = (shared_data / "brca-m2c" / "brca_ds_train.txt").read_text().split()
    assert seen == {name.removesuffix(".png") for name in listed}  # train images only
