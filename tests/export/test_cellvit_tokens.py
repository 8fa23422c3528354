"""The token cache and the cell graph, read as CellViT++'s trainers read them."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from lemon_muse.errors import UserError
from lemon_muse.export import cellvit_tokens as tokens_of

N, DIM = 7, 384


@pytest.fixture
def cells() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "images": [f"träger_{i // 3}.png" for i in range(N)],
        "coords": rng.uniform(0, 1024, (N, 2)),
        "types": np.arange(N) % 3,
        "tokens": rng.standard_normal((N, DIM)).astype(np.float32),
    }


def trainers_cells(path: Path) -> list[dict[str, Any]]:
    """What the head trainer makes of a cache: a list of cells."""
    with h5py.File(path, "r") as file:
        columns = [file[name][:] for name in ("images", "coords", "types", "tokens")]
    return [
        {
            "image": image.decode("utf-8"),
            "coords": place[0],
            "type": torch.tensor(kind),
            "token": torch.tensor(token).type(torch.float32),
        }
        for image, place, kind, token in zip(*columns, strict=True)
    ]


def written_one_by_one(path: Path, cells: dict[str, Any]) -> Path:
    """A cache as the trainer writes it: its types, one cell at a time."""
    with h5py.File(path, "w") as file:
        packed: dict[str, Any] = {"chunks": True, "compression": "gzip"}
        vlen = h5py.special_dtype(vlen=np.float64)
        images = file.create_dataset("images", (N,), dtype=h5py.string_dtype(), **packed)
        coords = file.create_dataset("coords", (N, 2), dtype=vlen, **packed)
        types = file.create_dataset("types", (N,), dtype="i", **packed)
        tokens = file.create_dataset("tokens", (N,), dtype=vlen)
        for i in range(N):
            images[i] = cells["images"][i]
            coords[i] = cells["coords"][i]
            types[i] = cells["types"][i]
            tokens[i] = cells["tokens"][i]
    return path


def test_the_cache_gives_the_trainer_its_cells(
    cells: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several pieces, the last one short.
    monkeypatch.setattr(tokens_of, "ROWS", 3)
    path = tokens_of.write_cache(tmp_path / "cache" / "x.h5", **cells)
    read = trainers_cells(path)
    assert [cell["image"] for cell in read] == cells["images"]
    np.testing.assert_array_equal(np.stack([cell["coords"] for cell in read]), cells["coords"])
    assert [int(cell["type"]) for cell in read] == list(cells["types"])
    np.testing.assert_array_equal(torch.stack([cell["token"] for cell in read]), cells["tokens"])
    assert [file.name for file in path.parent.iterdir()] == ["x.h5"]


def test_the_cache_is_the_trainers_own(cells: dict[str, Any], tmp_path: Path) -> None:
    ours = tokens_of.write_cache(tmp_path / "ours.h5", **cells)
    theirs = written_one_by_one(tmp_path / "theirs.h5", cells)
    with h5py.File(ours) as a, h5py.File(theirs) as b:
        assert sorted(a) == sorted(b) == ["coords", "images", "tokens", "types"]
        for name in b:
            assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
            assert h5py.check_vlen_dtype(a[name].dtype) == h5py.check_vlen_dtype(b[name].dtype)
            assert a[name].compression == b[name].compression
            for mine, other in zip(a[name][:].ravel(), b[name][:].ravel(), strict=True):
                np.testing.assert_array_equal(mine, other)


def test_the_name_of_the_cache() -> None:
    def sha(text: str) -> str:
        return f"{hashlib.sha256(text.encode()).hexdigest()}.h5"

    given: dict[str, Any] = {"dataset_path": "/d/set", "cellvit_path": "/m/c.pth"}
    name = tokens_of.cache_name
    assert name(**given, split="train", filelist="train.csv") == sha(
        "/d/set_train.csv_/m/c.pth_stain_False_train"
    )
    assert name(**given, split="val", filelist="v.csv", hash_info="lemon") == sha(
        "/d/set_v.csv_/m/c.pth_stain_False_val_lemon"
    )
    assert name(**given, split="train", normalize_stains=True) == sha(
        "/d/set_/m/c.pth_stain_True_train"
    )
    with pytest.raises(UserError, match="train or val"):
        name(**given, split="test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": np.zeros((N - 1, DIM))}, "7 nuclei have 6 tokens"),
        ({"types": np.zeros(N + 1)}, "8 types"),
        ({"coords": np.zeros((N, 3))}, r"coordinates \[n, 2\]"),
        ({"types": np.arange(N) - 1}, "types must be whole numbers from 0"),
        ({"types": np.arange(N) / 2}, "types must be whole numbers from 0"),
        ({"types": np.array(["a"] * N)}, "types must be whole numbers from 0"),
        ({"tokens": np.full((N, DIM), np.nan)}, "not finite"),
        ({"coords": np.full((N, 2), np.inf)}, "not finite"),
    ],
)
def test_cells_that_do_not_agree(
    change: dict[str, Any], said: str, cells: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        tokens_of.write_cache(tmp_path / "x.h5", **{**cells, **change})
    assert not list(tmp_path.iterdir())


def test_no_cells(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no nucleus"):
        tokens_of.write_cache(
            tmp_path / "x.h5", [], np.zeros((0, 2)), np.zeros(0), np.zeros((0, DIM))
        )


METADATA = {"wsi_metadata": {"base_mpp": 0.25}, "nuclei_types": {1: "Neoplastic", 2: "Dead"}}
# A second process with a package of the name that CellViT++ has, and a class of its own.
READER = """
import sys
import torch
from cellvit.data.dataclass.cell_graph import CellGraphDataWSI

for options in ({"weights_only": False}, {"weights_only": True}):
    with torch.serialization.safe_globals([CellGraphDataWSI]):
        graph = torch.load(sys.argv[1], **options)
    assert type(graph) is CellGraphDataWSI
    assert sorted(vars(graph)) == ["metadata", "positions", "x"]
    print(graph.x.dtype, tuple(graph.x.shape), graph.positions.dtype, graph.metadata)
torch.save(graph, sys.argv[2])
"""
CLASS = """
from dataclasses import dataclass

import torch


@dataclass
class CellGraphDataWSI:
    x: torch.Tensor
    positions: torch.Tensor
    metadata: dict
"""


def test_a_cell_graph_opens_as_the_class_of_cellvit(cells: dict[str, Any], tmp_path: Path) -> None:
    package = tmp_path / "cellvit" / "data" / "dataclass"
    package.mkdir(parents=True)
    (package / "cell_graph.py").write_text(CLASS)
    (tmp_path / "reader.py").write_text(READER)
    path = tokens_of.write_cell_graph(
        tmp_path / "out" / "a_cells.pt", cells["tokens"], cells["coords"], METADATA
    )
    words = [sys.executable, "reader.py", str(path), "theirs.pt"]
    out = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    line = f"torch.float32 (7, 384) torch.float32 {METADATA}"
    assert out.stdout.splitlines() == [line, line]
    # Ours, and the one that their class wrote, are read without the class.
    for file in (path, tmp_path / "theirs.pt"):
        graph = tokens_of.read_cell_graph(file)
        np.testing.assert_array_equal(graph["x"], cells["tokens"])
        np.testing.assert_array_equal(graph["positions"], cells["coords"].astype(np.float32))
        assert graph["metadata"] == METADATA
    assert "cellvit" not in sys.modules
    with pytest.raises(pickle.UnpicklingError, match=r"cell_graph\.CellGraphDataWSI"):
        torch.load(path)


def test_cell_graphs_that_cannot_be(cells: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a_cells.pt"
    with pytest.raises(UserError, match="6 coordinates"):
        tokens_of.write_cell_graph(path, cells["tokens"], cells["coords"][:-1], METADATA)
    with pytest.raises(UserError, match="plain values"):
        tokens_of.write_cell_graph(path, cells["tokens"], cells["coords"], {"a": Path("b")})
    assert not list(tmp_path.iterdir())
    torch.save({"x": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"not a cell graph of CellViT.*is a dict"):
        tokens_of.read_cell_graph(path)
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="not a cell graph"):
        tokens_of.read_cell_graph(path)
