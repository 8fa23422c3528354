"""`lemon-muse export format=cellvit_tokens`: read with the rules of CellViT++'s trainers."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import cli
from launch.embed import Embed, run
from lemon_muse.errors import UserError
from lemon_muse.export import embedded
from lemon_muse.export.cellvit_tokens import cache_name
from lemon_muse.synthetic import write_slide
from tests.eval.standins import small_encoder

NAMES = {"dataset_path": "/d/set", "cellvit_path": "/m/c.pth"}
WORDS = ["tokens.dataset=/d/set", "tokens.model=/m/c.pth"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of 500 px, embedded in each form."""
    folder = tmp_path_factory.mktemp("made")
    encoder, slides = small_encoder(folder / "encoder"), folder / "slides"
    slides.mkdir()
    for seed, name in enumerate("ab"):
        write_slide(slides / f"{name}.svs", side=500, seed=seed)
    for form in (".parquet", ".h5ad", ".zarr"):
        if form == ".parquet" or _has("anndata"):
            run(Embed(encoder=str(encoder), slide=slides, nuclei=slides, out=folder / f"t{form}"))
    return folder / "t.parquet"


def _has(name: str) -> bool:
    return pytest.importorskip(name) is not None


class Graph:
    """Takes what a pickle says of CellGraphDataWSI."""


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("cellvit.data.dataclass.cell_graph", "CellGraphDataWSI"):
            return Graph
        return super().find_class(module, name)


class Reader:
    """A pickle module for `torch.load`, which knows the class by its name alone."""

    __name__ = "reader"
    Unpickler = Unpickler
    load = staticmethod(pickle.load)


def graph_of(path: Path) -> Any:
    return torch.load(path, pickle_module=Reader(), weights_only=False)


def rows_of(table: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    found: list[dict[str, Any]] = parquet.read_table(table).to_pylist()
    return found


@pytest.mark.parametrize("form", [".parquet", ".h5ad", ".zarr"])
def test_graphs_and_cache_hold_the_nuclei_of_the_table(
    table: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    h5py = pytest.importorskip("h5py")
    source = table.with_suffix(form)
    words = ["export", "format=cellvit_tokens", f"embedded={source}", f"out={tmp_path / 'out'}"]
    assert cli.main([*words, *WORDS, "tokens.filelist=train.csv", "tokens.hash_info=lemon"]) == 0
    rows = rows_of(table)
    classes = sorted({row["type"] for row in rows})
    assert len(classes) > 1 and len(rows) > 100
    for slide in "ab":
        graph = graph_of(tmp_path / "out" / f"{slide}_cells.pt")
        mine = [row for row in rows if row["slide"] == slide]
        assert graph.x.dtype == graph.positions.dtype == torch.float32
        np.testing.assert_array_equal(graph.x, [row["feature"] for row in mine])
        wanted = np.array([(row["x_px"] - 0.5, row["y_px"] - 0.5) for row in mine], np.float32)
        np.testing.assert_array_equal(graph.positions, wanted)
        assert graph.metadata["wsi_metadata"]["base_mpp"] == 0.25
        assert graph.metadata["wsi_metadata"]["kept"] == len(mine)
        assert list(graph.metadata["nuclei_types"].values()) == classes
        assert graph.metadata["encoder"]["window"] == 40
    name = cache_name(**NAMES, split="train", filelist="train.csv", hash_info="lemon")
    with h5py.File(tmp_path / "out" / "cache" / name) as file:
        assert [image.decode() for image in file["images"][:]] == [row["slide"] for row in rows]
        kinds = file["types"][:].tolist()
        assert [classes[kind] for kind in kinds] == [row["type"] for row in rows]
        tokens = np.stack(file["tokens"][:])
        np.testing.assert_array_equal(tokens, [row["feature"] for row in rows])
        places = np.stack([place[0] for place in file["coords"][:]])
        np.testing.assert_array_equal(places[:, 0], [row["x_px"] - 0.5 for row in rows])
        np.testing.assert_array_equal(places[:, 1], [row["y_px"] - 0.5 for row in rows])
    said = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert said == {str(i): name for i, name in enumerate(classes)}
    assert "384, 1024, 1280 features, not on 48" in capsys.readouterr().out
    assert len(list((tmp_path / "out").rglob("*"))) == 5


def test_classes_in_another_order_and_nuclei_without(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h5py = pytest.importorskip("h5py")
    rows = rows_of(table)
    chosen = sorted({row["type"] for row in rows})[:0:-1]
    words = embedded.Tokens(dataset="/d/set", model="/m/c.pth", split="val", classes=tuple(chosen))
    said = embedded.write(table, tmp_path, words)
    wanted = [chosen.index(row["type"]) for row in rows if row["type"] in chosen]
    with h5py.File(tmp_path / "cache" / cache_name(**NAMES, split="val")) as file:
        assert file["types"][:].tolist() == wanted
    assert f"{len(rows) - len(wanted)} without a class left out" in said
    # The graphs have them all.
    held = sum(len(graph_of(tmp_path / f"{slide}_cells.pt").x) for slide in "ab")
    assert held == len(rows) > len(wanted)


def test_both_halves_of_a_folder_number_the_classes_alike(table: Path, tmp_path: Path) -> None:
    classes = tuple(sorted({row["type"] for row in rows_of(table)}))
    embedded.write(table, tmp_path, embedded.Tokens())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = embedded.Tokens(dataset="/d/set", model="/m/c.pth", split="val", classes=classes[::-1])
    with pytest.raises(UserError, match="give both halves the same tokens"):
        embedded.write(table, tmp_path, other)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    embedded.write(table, tmp_path, embedded.Tokens(classes=classes))


def test_places_count_from_the_scanned_area() -> None:
    facts = {"a": {"bounds_x": 300, "bounds_y": 200}, "b": {"bounds_x": 0, "bounds_y": 0}}
    columns = {"x_px": np.array([310.5, 8.0]), "y_px": np.array([220.5, 9.0])}
    held = embedded.Embedded(np.zeros((2, 3)), columns, {"slides": facts})
    found = embedded._places(held, np.array(["a", "b"]))
    np.testing.assert_array_equal(found, [[10, 20], [7.5, 8.5]])


def test_wrong_words(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert cli.main(["export", f"out={tmp_path / 'out'}", *words]) == 2
        return capsys.readouterr().err

    tokens = ["format=cellvit_tokens", f"embedded={table}"]
    assert "takes embedded=TABLE" in refused("format=cellvit_tokens", f"run={tmp_path}")
    assert "go with format=cellvit_tokens" in refused(f"embedded={table}")
    assert "go with format=cellvit_tokens" in refused(f"run={tmp_path}", "tokens.split=val")
    assert "go together" in refused(*tokens, "tokens.dataset=/d/set")
    assert "no column 'predicted'" in refused(*tokens, "tokens.column=predicted")
    assert "no nucleus has one of the classes moon" in refused(
        *tokens, *WORDS, "tokens.classes=[moon]"
    )
    assert "there is no table" in refused("format=cellvit_tokens", "embedded=none.h5ad")
    assert not (tmp_path / "out").exists()
    (tmp_path / "own.zarr").mkdir()
    own = [f"{key}={tmp_path / 'own.zarr'}" for key in ("embedded", "out")]
    assert "is the table itself" in refused("format=cellvit_tokens", *own)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"no table")
    assert "no table of lemon-muse embed" in refused("format=cellvit_tokens", f"embedded={bad}")


def test_h5py_is_an_extra(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    words = embedded.Tokens(dataset="/d/set", model="/m/c.pth")
    with pytest.raises(UserError, match=r"pip install lemon-muse\[embed\]"):
        embedded.write(table, tmp_path / "out", words)
    assert not (tmp_path / "out").exists()
    embedded.write(table, tmp_path / "out", embedded.Tokens())  # graphs need none
    assert not list(tmp_path.rglob("*.h5")) and len(list(tmp_path.rglob("*_cells.pt"))) == 2
