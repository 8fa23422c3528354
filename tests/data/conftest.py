"""Slides that the tests of the reader and of its bands share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lemon_muse.data.slides import Slide, open_slide
from lemon_muse.synthetic import write_slide

REAL = {"cmu-1-small-region.svs": None, "tcga-cr-7395-01a-01-ts1.svs": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated pyramid of 1200 px, three levels."""
    return write_slide(tmp_path_factory.mktemp("slide") / "a.svs", side=1200, seed=1, mpp=0.25)


@pytest.fixture(params=["made", *REAL])
def slide(request: pytest.FixtureRequest, made: Path) -> Iterator[Slide]:
    if request.param == "made":
        path, mpp = made, None
    else:
        path = request.getfixturevalue("shared_data") / "wsi" / request.param
        mpp = REAL[request.param]
        if not path.is_file():
            pytest.skip(f"no {path}")
    with open_slide(path, mpp=mpp) as opened:
        yield opened
