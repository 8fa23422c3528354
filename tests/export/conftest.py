"""Exports that several files look at are made once."""

from pathlib import Path

import pytest

from lemon_muse.encoder import save_encoder
from lemon_muse.export.job import Export
from lemon_muse.export.job import run as export
from tests.eval.standins import dense_encoder, small_encoder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the encoder of 40 px windows in it; tests that write take a copy."""
    return small_encoder(tmp_path_factory.mktemp("source") / "run" / "encoder").parent


@pytest.fixture(scope="session")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`source` in each format of crop encoders, and a dense one as muse; to be copied as well."""
    root = tmp_path_factory.mktemp("exports")
    for form in ("timm", "hf", "pt2", "onnx"):
        export(Export(run=source, format=form, out=root / form))
    save_encoder(dense_encoder(), root / "dense")
    export(Export(run=root / "dense", format="muse", out=root / "muse"))
    return {p.name: p for p in root.iterdir()}
