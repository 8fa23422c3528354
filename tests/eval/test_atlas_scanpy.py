"""The page docs/use/scanpy.md: every block of it runs, in order, on a generated slide."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from launch.cli import main
from lemon_muse.synthetic import write_slide
from tests.eval.atlas_material import opened, values
from tests.eval.standins import small_encoder

PAGE = Path(__file__).parents[2] / "docs" / "use" / "scanpy.md"
SLIDE = "cmu-1-small-region.svs"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder in which the page was run and the names that its Python blocks leave."""
    for name in ("scanpy", "squidpy", "umap", "igraph"):
        pytest.importorskip(name)
    import matplotlib

    matplotlib.use("agg")
    folder = tmp_path_factory.mktemp("page")
    small_encoder(folder / "runs" / "lemon")
    # Larger than the picture that squidpy gets; its border cuts through tissue, so that windows
    # reach beyond it.
    write_slide(folder / SLIDE, side=1600, seed=3, slide=1)
    names: dict[str, Any] = {"__name__": "page", "folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, block in blocks():
            if kind == "python":
                exec(compile(block, str(PAGE), "exec"), names)
                continue
            for line in block.splitlines():
                words = shlex.split(line)
                if words[0] == "lemon-muse":
                    assert main(words[1:]) == 0
    names["plt"].close("all")
    return names


def blocks() -> list[tuple[str, str]]:
    """Language and text of the blocks of the page."""
    return re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def test_clusters_are_numbered_by_size_and_reach_the_atlas(walked: dict[str, Any]) -> None:
    obs = walked["data"].obs
    assert len(obs) > 150
    counts = [int((obs["cluster"] == str(c)).sum()) for c in range(obs["cluster"].nunique())]
    assert len(counts) > 1 and counts == sorted(counts, reverse=True) and sum(counts) == len(obs)
    # Only the numbers are new, not what belongs together.
    assert len(set(zip(obs["leiden"], obs["cluster"], strict=True))) == len(counts)
    page = opened(walked["folder"] / "atlas" / "index.html")
    assert (values(page, "cluster") == obs.loc[page["ids"], "cluster"].astype(str)).all()


def test_windows_are_the_tissue_around_the_nuclei(walked: dict[str, Any]) -> None:
    whole = tifffile.imread(walked["folder"] / SLIDE, key=0).astype(int)
    side = walked["SIDE"]
    assert side == 80  # 20 µm at 0.25 µm/px
    beyond = 0
    for row, (x, y) in enumerate(walked["data"].obsm["spatial"]):
        left, top = round(x - side / 2), round(y - side / 2)
        seen = walked["window"](row).astype(int)
        inside = whole[max(0, top) : top + side, max(0, left) : left + side]
        if inside.shape == seen.shape:
            assert np.abs(seen - inside).mean() < 1
        else:
            beyond += 1
            outside = seen[: max(0, -top)], seen[:, : max(0, -left)]
            assert all((part == 255).all() for part in outside)
    assert 0 < beyond < len(walked["data"]) / 2


def test_pictures_are_those_that_the_page_shows(walked: dict[str, Any]) -> None:
    shown = re.findall(r"\]\(\.\./images/(scanpy_\w+\.png)\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(p.name for p in walked["folder"].glob("scanpy_*.png"))
    assert len(shown) == 4
    for name in shown:
        made = Image.open(walked["folder"] / name).convert("RGB")
        kept = PAGE.parent.parent / "images" / name
        assert np.asarray(made).std() > 15 and kept.stat().st_size < 300_000


def test_scale_bars_and_dots_are_in_micrometres(walked: dict[str, Any]) -> None:
    obs = walked["data"].obs
    for axis in (walked["left"], walked["right"]):
        bar = next(part for part in axis.get_children() if type(part).__name__ == "ScaleBar")
        height, width = axis.images[0].get_array().shape[:2]
        assert (width * bar.dx, height * bar.dx) == pytest.approx((400, 400))  # 1,600 px
    boxes = [dot.get_extents() for group in axis.collections for dot in group.get_paths()]
    boxes = boxes[: len(obs)]  # those of the legend come last
    dots = np.array([(box.min + box.max) / 2 for box in boxes])
    assert boxes[0].width * bar.dx == pytest.approx(9, rel=1e-3)
    np.testing.assert_allclose(dots * bar.dx, obs[["x_um", "y_um"]], atol=0.01)
