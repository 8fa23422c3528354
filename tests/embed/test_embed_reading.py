"""Pieces of crops: the same whatever the threads, and one pass goes through the slide in order."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from eval.samplers import Look
from launch.embed import reading
from lemon_muse.data.slides import open_slide
from lemon_muse.synthetic import write_slide

SIZE = 40
LOOK = Look("crop", SIZE, None, 0.25, "", True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slide") / "s.svs", side=700, seed=3)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pieces_are_openslides_pixels(
    path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PART", 37)
    monkeypatch.setattr(reading, "STRIP", 256)  # several strips
    xy = np.random.default_rng(0).uniform(0, 700, (400, 2))
    xy[:40] = xy[40:80].round()  # whole and half coordinates: rounding at the borders of strips
    with open_slide(path) as slide, openslide.OpenSlide(path) as peer:
        pieces = reading.cut_pieces(xy, slide, LOOK)
        assert np.array_equal(np.sort(np.concatenate(pieces)), np.arange(400))
        assert {len(rows) for rows in pieces[:-1]} == {37}
        todo = [rows for i, rows in enumerate(pieces) if i not in (0, 4)]  # of a job that goes on
        reader, compared = reading.Reader(slide, LOOK, workers=workers), 0
        for rows, crops in zip(todo, reader.pieces(xy, todo), strict=True):
            for row, crop in zip(rows, crops, strict=True):
                left, top = np.floor(xy[row] - SIZE / 2 + 0.5).astype(int).tolist()
                if min(left, top) < 0 or max(left, top) + SIZE > 700:
                    continue
                wanted = peer.read_region((left, top), 0, (SIZE, SIZE)).convert("RGB")
                np.testing.assert_array_equal(crop, np.asarray(wanted))
                compared += 1
            reader.done(crops)
        reader.close()
        assert compared > 250
        # Memory is used again, not asked for anew.
        assert workers or len(reader.free) < len(todo) / 2


def test_memory_that_another_thread_took_is_not_missed(path: Path) -> None:
    class Racing(list[np.ndarray]):
        """Another thread takes the last one between a look and the taking."""

        def __bool__(self) -> bool:
            return True

        def __len__(self) -> int:
            return 1

    with open_slide(path) as slide:
        reader = reading.Reader(slide, LOOK, workers=3)
        reader.free = Racing()
        assert reader._buffer(5).shape == (5, SIZE, SIZE, 3)


def test_one_pass_fills_piece_after_piece(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STRIP", 256)
    xy = np.random.default_rng(1).uniform(0, 700, (500, 2)).round(1)
    with open_slide(path) as slide:
        order = np.concatenate(reading.cut_pieces(xy, slide, LOOK))
        found = [rows for rows, _ in slide.bands(xy[order], SIZE, mpp=0.25, band=256)]
        np.testing.assert_array_equal(np.concatenate(found), np.arange(500))
