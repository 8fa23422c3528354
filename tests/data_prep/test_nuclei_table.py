"""Columns of nuclei: plain tables read, centroids, merging, ids; each against a plain loop."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep.nuclei_formats.record import Nuclei, rings
from data_prep.nuclei_formats.record import nuclei as columns
from data_prep.nuclei_table import distinct, inside, whole_ids
from tests.data_prep.test_nuclei_formats import closed, load, same_places


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("Y,x,note,Type,score\n2.5,1.5,a,T,0.5\n4,3,b,,\n")
    found = load(tmp_path / "s.csv", "tables")
    same_places(found, [(1.5, 2.5), (3, 4)])  # absolute and continuous: as it stands
    assert found.type.tolist() == ["T", ""] and np.isnan(found.score).tolist() == [False, True]
    table = pa.table({"x": [1.0], "y": [2.0], "id": [77], "area": [30.0]})
    parquet.write_table(table, tmp_path / "s.parquet")
    found = load(tmp_path / "s.parquet", "tables")
    assert found.id.tolist() == [77] and found.area.tolist() == [30.0]


def test_centroids_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    outlines = []
    for n in (3, 4, 9, 30):
        angle = np.sort(rng.uniform(0, 2 * np.pi, n))
        ring = rng.uniform(2, 9, n)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        outlines.append((ring + rng.uniform(0, 1e5, 2)).tolist())
    outlines.append(closed(outlines[2]))
    outlines.append([[5.0, 5.0], [7.0, 5.0]])  # no area: the mean of its corners
    centres, areas = rings(outlines)
    for ring, centre, area in zip(outlines[:5], centres, areas, strict=False):
        ox, oy = ring[0]
        a = cx = cy = 0.0
        for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
            cross = (x0 - ox) * (y1 - oy) - (x1 - ox) * (y0 - oy)
            a += cross / 2
            cx += (x0 + x1 - 2 * ox) * cross / 6
            cy += (y0 + y1 - 2 * oy) * cross / 6
        np.testing.assert_allclose(centre, (ox + cx / a, oy + cy / a), atol=1e-6)
        np.testing.assert_allclose(area, abs(a), rtol=1e-6)
    assert centres[5].tolist() == [6.0, 5.0] and areas[5] == 0


def brute_force(found: Nuclei, reach: float) -> list[int]:
    """Best first; each takes all later ones within reach that are still there."""
    order = sorted(
        range(len(found)),
        key=lambda i: (-found.score[i], -found.area[i], found.y[i], found.x[i]),
    )
    kept: list[int] = []
    for i in order:
        near = [
            j for j in kept if np.hypot(found.x[i] - found.x[j], found.y[i] - found.y[j]) <= reach
        ]
        if not near:
            kept.append(i)
    return sorted(kept)


@pytest.mark.parametrize("seed", range(4))
def test_merging_against_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 400
    xy = rng.integers(0, 150, (n, 2)) * 0.5  # crowded, with many equal distances
    score, area = rng.integers(0, 4, n) / 4, rng.integers(1, 3, n).astype(float)
    found = columns(xy, score=score, area=area)
    kept = distinct(found, mpp=0.5, radius=2.0)
    assert kept.tolist() == brute_force(found, 4.0) and len(kept) < n
    # the order of the file does not matter
    order = rng.permutation(n)
    again = order[distinct(found.take(order), mpp=0.5, radius=2.0)]
    assert set(map(tuple, xy[again])) == set(map(tuple, xy[kept]))
    assert len(distinct(found, mpp=0.5, radius=0)) == n


def test_unknown_scores_come_last_and_ids_stay() -> None:
    found = columns([[0, 0], [1, 0], [50, 0]], score=[None, 0.1, None])
    assert distinct(found, mpp=1.0, radius=2.0).tolist() == [1, 2]
    names = np.array(["b2249b94", "8e9519e3", "x"])
    ids = whole_ids(names)
    assert (ids >= 0).all() and (whole_ids(names[::-1]) == ids[::-1]).all()
    assert whole_ids(np.array([7, 7, 9])).tolist() == [0, 1, 2]
    # just below the border in float64, on it in float32: it would lie outside its slide
    edge = columns([[99999.9999, 1], [99999.9, 1], [np.nan, 1]])
    assert inside(edge, 100000, 10).tolist() == [False, True, False]
