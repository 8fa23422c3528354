"""Tissue under two laboratories: the same nuclei, another look, patients apart."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.generate import Generate, run
from lemon_muse.data.layouts import folder
from lemon_muse.errors import UserError
from lemon_muse.synthetic.shift import SPLITS, write_shifted


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shift") / "tissue"
    return run(Generate(out=root, slides=10, side=160, seed=2, scanners="shifted"))


def slides(path: Path) -> list[dict[str, str]]:
    with (path / "slides.csv").open() as file:
        return list(csv.DictReader(file))


def pixels(root: Path, slide: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(root / slide["image"]))


def test_both_folders_have_the_same_nuclei_and_only_test_looks_otherwise(tissue: Path) -> None:
    own, shifted = folder.read(tissue), folder.read(tissue / "shifted")
    for name in ("x", "y", "label", "patient", "slide", "split", "mpp"):
        assert np.array_equal(getattr(own, name), getattr(shifted, name)), name
    assert own.classes == shifted.classes and len(own.classes) >= 2 and len(own) > 50
    assert set(own.patient[own.split == "test"]) == {
        f"patient{i:03d}" for i in range(10) if SPLITS[i % 5] == "test"
    }
    assert not own.split_leaks()
    for a, b in zip(slides(tissue), slides(tissue / "shifted"), strict=True):
        first, second = pixels(tissue, a), pixels(tissue / "shifted", b)
        if a["split"] == "test":
            assert np.abs(first.astype(int) - second).mean() > 10
            # The same structures: what is dark is dark in both.
            assert np.corrcoef(first.mean(2).ravel(), second.mean(2).ravel())[0, 1] > 0.9
        else:
            assert (tissue / a["image"]).resolve() == (tissue / "shifted" / b["image"]).resolve()


def test_the_second_laboratory_is_blurred_and_of_another_colour(tissue: Path) -> None:
    from scipy import ndimage

    fine, warm = [], []
    for a, b in zip(slides(tissue), slides(tissue / "shifted"), strict=True):
        if a["split"] != "test":
            continue
        both = pixels(tissue, a), pixels(tissue / "shifted", b)
        # Without the noise of single pixels: the edges of what is drawn.
        edges = [ndimage.gaussian_gradient_magnitude(x.mean(2), 1.0).mean() for x in both]
        fine.append(edges[1] / edges[0])
        warm.append([(x[..., 0].astype(float) - x[..., 2]).mean() for x in both])
    assert np.mean(fine) < 0.9
    assert np.mean([second - first for first, second in warm]) < -5


def test_a_file_that_is_gone_is_drawn_again_alike(tissue: Path) -> None:
    slide = slides(tissue / "shifted")[1]
    path = tissue / "shifted" / slide["image"]
    before, other = path.read_bytes(), tissue / "images" / "slide000.png"
    written = other.stat().st_mtime_ns
    path.unlink()
    write_shifted(tissue, slides=10, side=160, seed=2)
    assert path.read_bytes() == before and other.stat().st_mtime_ns == written


def test_folders_of_other_tissue_are_refused(tissue: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another folder"):
        write_shifted(tissue, slides=10, side=160, seed=3)
    with pytest.raises(UserError, match="another folder"):
        run(Generate(out=tissue, slides=10, side=160, seed=2))
    with pytest.raises(UserError, match="slides=4 cannot be split"):
        write_shifted(tmp_path, slides=4, side=160)
    assert not list(tmp_path.iterdir())
