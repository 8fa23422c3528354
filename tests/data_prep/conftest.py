"""Slides and their tables of nuclei that the tests of crops and ROIs share."""

from pathlib import Path

import pytest

from data_prep import manifest, nuclei
from lemon_muse.synthetic import write_slide

SLIDES = 5


@pytest.fixture(scope="session")
def slide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five generated slides of 900 px at 0.25 µm/px, each with its nuclei as GeoJSON."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(SLIDES):
        write_slide(folder / f"case{number // 2}-{number}.svs", side=900, seed=number, slide=number)
    return folder


@pytest.fixture(scope="session")
def nuclei_folder(slide_folder: Path) -> Path:
    """The tables of prep nuclei of those slides, read from the GeoJSON files."""
    return prepared(slide_folder, slide_folder.parent / "prepared")


def prepared(slides: Path, out: Path) -> Path:
    """Manifest and tables of nuclei of a folder of slides with GeoJSON beside them."""
    table = out / "manifest.csv"
    manifest.run(manifest.Manifest(data=str(slides), out=table, patient=r"^(case\d+)", workers=0))
    return nuclei.run(nuclei.Nuclei(data=table, out=out / "nuclei", detections=slides, workers=0))
