"""Damaged, empty and strange detection files: each one sentence that names file and mend."""

import gzip
import json
from pathlib import Path

import cramjam
import pytest

from data_prep import nuclei_formats
from lemon_muse.errors import UserError
from tests.data_prep.test_nuclei_formats import SLIDE, cellvit_tree, write_hoverfast


def bad_file(folder: Path, case: str) -> Path:
    whole = write_hoverfast(folder / "whole.json.gz").read_bytes()
    snappy = bytes(cramjam.snappy.compress_raw(json.dumps(cellvit_tree(contours=True)).encode()))
    text = gzip.decompress(whole)
    files: dict[str, tuple[str, bytes]] = {
        "cut gz": ("s.json.gz", whole[:-20]),
        "cut in lines": ("s.json.gz", gzip.compress(text[: text.rindex(b"\n")])),
        "cut inside a line": ("s.json.gz", gzip.compress(text[:-40])),
        "no gz": ("s.json.gz", b"[{}]"),
        "cut snappy": ("cells.json.snappy", snappy[:-30]),
        "cut json": ("s.json", b'{"mag": 40, "nuc": {"1": {"centroid": [1,'),
        "empty json": ("s.json", b""),
        "empty geojson": ("s.geojson", b" \n"),
        "strange json": ("s.json", b'{"cats": 3}'),
        "hovernet without centroid": ("s.json", b'{"mag": 40, "nuc": {"1": {"contour": [[1,2]]}}}'),
        "cellvit without cells": ("s.json", b'{"wsi_metadata": {}, "type_map": {}}'),
        "line string": (
            "s.geojson",
            b'[{"type":"Feature","geometry":{"type":"LineString","coordinates":[[0,1]]}}]',
        ),
        "list of numbers": ("s.geojson", b"[1, 2, 3]"),
        "no x": ("s.csv", b"a,y\n1,2\n"),
        "semicolons": ("s.csv", b"x;y\n1;2\n"),
        "words": ("s.csv", b"x,y\n1,two\n"),
        "hole": ("s.csv", b"x,y\n1,2\n,3\n"),
        "empty csv": ("s.csv", b""),
        "no parquet": ("s.parquet", b"PAR1 or not"),
    }
    name, content = files[case]
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "case",
    ["cut gz", "cut in lines", "cut inside a line", "no gz", "cut snappy", "cut json",
     "empty json", "empty geojson", "strange json", "hovernet without centroid",
     "cellvit without cells", "line string", "list of numbers", "no x", "semicolons", "words",
     "hole", "empty csv", "no parquet"],
)  # fmt: skip
def test_bad_files(tmp_path: Path, case: str) -> None:
    path = bad_file(tmp_path, case)
    with pytest.raises(UserError) as told:
        nuclei_formats.read(path, slide=SLIDE)
    sentence = str(told.value)
    assert str(path) in sentence and sentence.endswith(".")
    mend = ("copy it again", "give ", "name ", "write ", "fill it in", "mend it")
    assert any(word in sentence for word in mend), sentence


def test_missing_file(tmp_path: Path) -> None:
    for name in ("s.json", "s.json.gz", "s.csv", "s.parquet", "s.json.snappy"):
        with pytest.raises(UserError, match="there is no detection file"):
            nuclei_formats.read(tmp_path / name, slide=SLIDE)
