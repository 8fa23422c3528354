"""Which nuclei are cut: exact numbers, the same for a seed, and rare kinds that are not lost."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep.choose import CORE, FEATURES, choose, cluster, features, shares
from lemon_muse.data.slides import Slide, open_slide
from lemon_muse.errors import UserError
from lemon_muse.synthetic import write_slide


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated slide of 1600 px with its nuclei beside it."""
    folder = tmp_path_factory.mktemp("choose")
    return write_slide(folder / "a.svs", side=1600, seed=5, slide=5, scanner=1, mpp=0.25)


@pytest.fixture(scope="module")
def truth(made: Path) -> tuple[np.ndarray, np.ndarray]:
    """Positions float64 [n, 2] and true kinds str [n]."""
    listed = json.loads(made.with_suffix(".geojson").read_text())["features"]
    xy = np.array([f["geometry"]["coordinates"] for f in listed])
    return xy, np.array([f["properties"]["classification"]["name"] for f in listed])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def poured(sizes: list[int], count: int) -> list[int]:
    """One nucleus at a time, round after round; the last, incomplete round is left out."""
    given = [0] * len(sizes)
    while True:
        more = [i for i, size in enumerate(sizes) if given[i] < size]
        if not more or len(more) > count - sum(given):
            return given
        for i in more:
            given[i] += 1


def test_shares_are_those_of_pouring_one_by_one() -> None:
    draws = rng(1)
    for _ in range(300):
        size = draws.integers(0, 40, draws.integers(1, 9))
        count = int(draws.integers(0, size.sum() + 5))
        given, plain = shares(size, count, draws), np.array(poured(size.tolist(), count))
        assert given.sum() == min(count, size.sum())
        extra = given - plain
        assert set(extra.tolist()) <= {0, 1} and (given <= size).all()
    assert shares(np.array([2, 100, 100]), 52, rng()).tolist() == [2, 25, 25]


def test_who_gives_one_more_is_chance() -> None:
    extra = np.mean([shares(np.array([9, 9, 9, 9]), 6, rng(i)) for i in range(400)], 0)
    assert np.abs(extra - 1.5).max() < 0.1


@pytest.mark.parametrize("balance", ["type", "cluster"])
def test_balanced_numbers(balance: str) -> None:
    types = np.array(["a"] * 500 + ["b"] * 60 + [""] * 7 + ["c"] * 433)
    types = rng(3).permutation(types)
    codes = np.unique(types, return_inverse=True)[1]
    for count in (0, 1, 10, 99, 300, 999, 1000, 5000):
        given: dict = {"types": types if balance == "type" else np.full(1000, "")}
        rows = choose(**given, count=count, balance=balance, rng=rng(), clusters=codes)  # type: ignore[arg-type]
        assert rows.dtype == np.int64 and len(rows) == min(count, 1000)
        assert (np.diff(rows) > 0).all() and set(rows.tolist()) <= set(range(1000))
        numbers = np.bincount(codes[rows], minlength=4)
        low = poured(np.bincount(codes).tolist(), count)
        assert set((numbers - low).tolist()) <= {0, 1}


@pytest.mark.parametrize("balance", ["none", "type"])
def test_every_nucleus_of_a_class_is_as_likely(balance: str) -> None:
    types = np.array(["a", "b"])[(np.arange(60) % 3 == 0).astype(int)]
    seen = np.zeros(60)
    for i in range(3000):
        seen[choose(types, count=20, balance=balance, rng=rng(i))] += 1 / 3000  # type: ignore[arg-type]
    wanted = np.full(60, 1 / 3) if balance == "none" else np.where(types == "a", 10 / 40, 10 / 20)
    assert np.abs(seen - wanted).max() < 4.5 * math.sqrt(0.25 / 3000)


def test_the_seed_alone_decides() -> None:
    types = np.array(["a", "b", "b", "b"] * 50)
    for balance in ("none", "type"):
        first, again, other = (
            choose(types, count=40, balance=balance, rng=rng(s))  # type: ignore[arg-type]
            for s in (7, 7, 8)
        )
        assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(choose(types, count=None, balance="none", rng=rng()), np.arange(200))


def test_what_cannot_be_balanced() -> None:
    some, none = np.array(["a", ""]), np.array(["", ""])
    with pytest.raises(UserError, match="balance= needs per_slide="):
        choose(some, count=None, balance="type", rng=rng())
    with pytest.raises(UserError, match=r"no types.*balance=cluster or balance=none"):
        choose(none, count=1, balance="type", rng=rng())
    with pytest.raises(ValueError, match="needs clusters"):
        choose(some, count=1, balance="cluster", rng=rng())
    assert len(choose(none[:0], count=3, balance="type", rng=rng())) == 0


def test_features_are_those_of_a_plain_loop() -> None:
    from skimage.color import hed_from_rgb

    pixels = rng().integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    found = features(pixels)
    assert found.shape == (3, len(FEATURES)) and found.dtype == np.float32
    for window, row in zip(pixels, found, strict=True):
        density = np.zeros((40, 40, 2))
        places: dict[str, list[tuple[int, int]]] = {"core": [], "ring": []}
        for y in range(40):
            for x in range(40):
                light = [math.log((int(v) + 1) / 256) for v in window[y, x]]
                for stain in (0, 1):
                    density[y, x, stain] = -sum(light[c] * hed_from_rgb[c, stain] for c in range(3))
                away = math.hypot((x + 0.5 - 20) * 0.5, (y + 0.5 - 20) * 0.5)
                if away < 10:
                    places["core" if away < 4 else "ring"].append((y, x))
        wanted = {}
        for where, cells in places.items():
            for stain, name in enumerate(("hematoxylin", "eosin")):
                values = [density[y, x, stain] for y, x in cells]
                wanted[f"{name}_{where}_mean"] = np.mean(values)
                wanted[f"{name}_{where}_std"] = np.std(values)
        h, steep = density[..., 0], []
        for y, x in places["core"]:
            down, right = h[y + 1, x] - h[y - 1, x], h[y, x + 1] - h[y, x - 1]
            steep.append(down**2 + right**2)  # central differences over 2 px, 1 µm
        wanted["gradient"] = math.sqrt(np.mean(steep))
        middle = (wanted["hematoxylin_core_mean"] + wanted["hematoxylin_ring_mean"]) / 2
        dark = [h[y, x] > middle for y, x in places["core"] + places["ring"]]
        wanted["dark_area"] = sum(dark) * 0.25
        np.testing.assert_allclose(row, [wanted[name] for name in FEATURES], rtol=1e-4, atol=1e-4)


def test_features_of_drawn_nuclei() -> None:
    """Dark discs of known radius: their area in µm², and the core darker than the ring."""
    y, x = np.mgrid[:40, :40] + 0.5 - 20
    radii = np.array([2.5, 4.0, 6.0])
    inside = np.hypot(x, y) * 0.5 < radii[:, None, None]
    pixels = np.where(inside[..., None], (90, 60, 150), (230, 180, 210)).astype(np.uint8)
    found = dict(zip(FEATURES, features(pixels).T, strict=True))
    np.testing.assert_allclose(found["dark_area"], np.pi * radii**2, rtol=0.04)
    assert (found["hematoxylin_core_mean"] > found["hematoxylin_ring_mean"]).all()
    assert np.abs(found["hematoxylin_core_std"][radii >= CORE]).max() < 1e-5
    assert found["gradient"][0] > 0.1 > 1e-3 > found["gradient"][2]
    longer = np.concatenate([pixels] * 200)  # more than are measured at once
    assert np.allclose(features(longer).reshape(200, 3, -1), features(pixels), atol=1e-5)


def test_clusters_do_not_depend_on_order(
    made: Path, truth: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    xy, _ = truth
    with open_slide(made) as slide:
        found = cluster(slide, xy, seed=3)
        assert found.dtype == np.int64 and set(found.tolist()) == set(range(8))
        assert np.array_equal(found, cluster(slide, xy, seed=3))
        assert not np.array_equal(found, cluster(slide, xy, seed=4))
        turned = rng(9).permutation(len(xy))
        assert np.array_equal(found[turned], cluster(slide, xy[turned], seed=3))
        plain, pair = Slide.bands, []
        for turn in (1, -1):

            def bands(
                self: Slide, centres: np.ndarray, size: int, *, mpp: float, turn: int = turn
            ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
                parts = list(plain(self, centres, size, mpp=mpp, band=256))
                assert len(parts) > 3
                yield from parts[::turn]

            monkeypatch.setattr(Slide, "bands", bands)
            pair.append(cluster(slide, xy, seed=3))
        assert np.array_equal(pair[0], pair[1]), "nor on that of the bands"


def test_few_nuclei_make_few_clusters(made: Path, truth: tuple[np.ndarray, np.ndarray]) -> None:
    xy, _ = truth
    with open_slide(made) as slide:
        for n, k in ((0, 0), (1, 1), (19, 1), (20, 2), (57, 5)):
            found = cluster(slide, xy[:n], seed=0)
            assert len(found) == n and len(set(found.tolist())) == k
        assert not cluster(slide, np.full((40, 2), 800.0), k=1, seed=0).any()
        same = cluster(slide, np.full((40, 2), 800.0), seed=0)
        assert len(same) == 40 and len(set(same.tolist())) == 1, "one place, one look"
        with pytest.raises(UserError, match="outside the slide"):
            cluster(slide, np.append(xy[:40], [[5000.0, 3.0]], 0), seed=0)


def test_rare_kinds_gain(made: Path, truth: tuple[np.ndarray, np.ndarray]) -> None:
    """Measured: rare kinds 1.2 times, mitoses 1.6 times their share of a uniform draw."""
    xy, kinds = truth
    with open_slide(made) as slide:
        clusters = cluster(slide, xy, seed=0)
    count, blank = len(xy) // 8, np.full(len(xy), "")

    def share(clusters: np.ndarray | None, names: list[str]) -> float:
        balance = "none" if clusters is None else "cluster"
        drawn = [
            choose(blank, count=count, balance=balance, rng=rng(i), clusters=clusters)  # type: ignore[arg-type]
            for i in range(60)
        ]
        return float(np.isin(kinds[np.concatenate(drawn)], names).mean())

    common = ["tumour"]
    rare = [k for k in np.unique(kinds).tolist() if (kinds == k).mean() < 0.3]
    assert set(rare) >= {"mitotic_figure", "plasma_cell"} and (kinds == "tumour").mean() > 0.35
    assert share(clusters, ["mitotic_figure"]) > 1.25 * share(None, ["mitotic_figure"])
    assert share(clusters, rare) > 1.1 * share(None, rare)
    assert share(clusters, common) < 0.85 * share(None, common)
    by_chance = rng(1).permutation(clusters)  # clusters that know nothing change nothing
    assert 0.9 < share(by_chance, rare) / share(None, rare) < 1.1
    rows = choose(kinds, count=40, balance="type", rng=rng())
    numbers = [int((kinds[rows] == k).sum()) for k in np.unique(kinds)]
    assert numbers == [8] * 5, "with true types the draw is even"
