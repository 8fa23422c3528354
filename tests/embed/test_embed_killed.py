"""Jobs that are killed at random moments, and run again: the same file, and nothing else left."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.embed import Embed, run
from lemon_muse.errors import UserError
from lemon_muse.synthetic import write_slide
from tests.eval.standins import small_encoder

ROOT = Path(__file__).resolve().parents[2]

# Imports once; every job is a process of its own, forked before anything was computed. A job kills
# itself before the n-th touch of a part (reading) or the n-th call (writing of the table).
DRIVER = """
import json, os, random, signal, sys
import anndata, h5py, imagecodecs, openslide, pandas, scipy.ndimage, scipy.sparse, tifffile, timm
import torch, zarr
from pathlib import Path
from pyarrow import parquet
import data_prep.nuclei_sanity, eval.encoders, eval.features, eval.samplers, skimage.color
import skimage.filters
from launch.embed import Embed, reading, run, store
reading.PART = 10

def job(folder, words, stage, last):
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr
    count, write = {"read": 0, "write": 0}, store.write

    def step(now):
        count[now] += 1
        if now == stage and count[now] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def writing(*given):
        sys.setprofile(lambda frame, event, arg: event == "call" and step("write"))
        write(*given)
        sys.setprofile(None)

    store.write = writing
    mine = lambda event, given: event in ("open", "os.rename") and ".npy" in str(given)
    sys.addaudithook(lambda *said: mine(*said) and step("read"))
    run(Embed(**words))
    Path("../count.json").write_text(json.dumps(count))

def start(*given):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        job(*given)
        code = 0
    finally:
        os._exit(code)

words, rng, killed = json.loads(sys.argv[1]), random.Random(int(sys.argv[2])), {}
for form in sys.argv[3:]:
    words["out"] = f"a{form}"
    assert start("whole", words, "", 0) == 0
    count, killed[form] = json.loads(Path("count.json").read_text()), []
    for stage in ("read", "read", "write"):
        # In the middle: at first parts are looked for, and a job that goes on has less to do.
        last = rng.randint(count[stage] * 7 // 20, count[stage] // 2)
        status = start("killed", words, stage, last)
        parts = len(list(Path("killed", f"a{form}.parts").glob("*/0*.npy")))
        killed[form].append((stage, status, parts))
    assert start("killed", words, "", 0) == 0
print(json.dumps(killed))
"""


def contents(path: Path) -> dict[str, bytes]:
    """Bytes of a file, or of every file of a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("in")
    slide = write_slide(folder / "s.svs", side=600, seed=4)
    return {
        "encoder": str(small_encoder(folder / "encoder")),
        "slide": str(slide),
        "nuclei": str(slide.with_suffix(".geojson")),
        "geojson": "points.geojson",
    }


def test_killed_at_random_moments_gives_the_same_file(
    words: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("anndata")
    import anndata

    forms = [".parquet", ".h5ad", ".zarr"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(words), "7", *forms],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for hits in json.loads(ran.stdout).values():
        assert {status for _, status, _ in hits} == {signal.SIGKILL}, hits
        parts = [found for *_, found in hits]
        assert 0 < parts[0] < parts[2] and parts == sorted(parts), hits
    for form in forms:
        one, other = (tmp_path / name / f"a{form}" for name in ("whole", "killed"))
        assert contents(one) == contents(other), form
    read = {
        name: (
            anndata.read_h5ad(tmp_path / name / "a.h5ad"),
            anndata.read_zarr(tmp_path / name / "a.zarr"),
        )
        for name in ("whole", "killed")
    }
    for mine, wanted in zip(read["killed"], read["whole"], strict=True):
        np.testing.assert_array_equal(mine.X, wanted.X)
        assert mine.obs.equals(wanted.obs) and len(mine) > 100
        said, asked = (table.uns["lemon_muse"] for table in (mine, wanted))
        assert said["key"] == asked["key"] and said["command"] == asked["command"]
        assert said["slides"]["s"]["kept"] == asked["slides"]["s"]["kept"] == len(mine)
    left = sorted(p.name for p in (tmp_path / "killed").iterdir())
    assert left == sorted([*(f"a{form}" for form in forms), "points.geojson"])


def test_what_a_kill_at_the_very_end_leaves_is_removed(
    words: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = Embed(**words, out=Path("a.parquet"))  # type: ignore[arg-type]
    Path("points.geojson.123.tmp").write_bytes(b"half")
    run(cfg)
    before = Path("a.parquet").read_bytes()
    # Killed between the rename of the table and the removal of its parts.
    Path("a.parquet.parts").mkdir()
    Path("a.parquet.parts", "table.parquet").write_bytes(before)
    run(cfg)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "points.geojson"]
    assert Path("a.parquet").read_bytes() == before
    # A table that was cut short is no finished table.
    Path("a.parquet").write_bytes(before[:-100])
    with pytest.raises(UserError, match="no table of lemon-muse embed"):
        run(cfg)
