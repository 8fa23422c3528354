"""NuCLS: what `check` names, and folds of incomplete folders."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval.benchmarks import Request
from eval.benchmarks.nucls import Nucls
from eval.benchmarks.nucls import check as nucls_check
from tests.fixtures import nucls as fixture
from tests.fixtures.nucls import PRINTED, SLIDES, Nucleus, csv_of, write

BENCHMARK = Nucls()
PAPER = Request(protocol="paper")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Nucleus]]:
    root = tmp_path_factory.mktemp("nucls") / "NuCLS"
    return root, write(root)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "nucls")
    return tmp_path / "nucls"


def test_a_slide_of_no_official_fold_is_neither_trained_nor_tested(folder: Path) -> None:
    for path in (folder / "train_test_splits").iterdir():
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line for line in lines if SLIDES[3] not in line))
    table = BENCHMARK.load(folder)
    folds = BENCHMARK.folds(table)
    lost = np.flatnonzero(table.slide == SLIDES[3])
    assert len(lost) and table.groups["fold"][lost[0]] == ""
    for fold in folds:
        assert not np.isin(lost, np.concatenate([fold.train, fold.test])).any()
    said = " ".join(BENCHMARK.check(folder))
    assert f"1 slides are in no official fold and are left out, the first is {SLIDES[3]}." in said


def test_without_official_folds_hospitals_are_kept_apart(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "train_test_splits" / "fold_2_test.csv").unlink()
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(folder)
    assert "fold_2_test.csv" in caplog.text
    hospital = table.groups["hospital"]
    for seed in range(4):
        folds = BENCHMARK.folds(table, Request(seed=seed))
        assert len(folds) == 5
        assert all(not set(hospital[f.train]) & set(hospital[f.test]) for f in folds)
        tested = np.concatenate([fold.test for fold in folds])
        assert sorted(tested.tolist()) == list(range(len(table)))
    assert "the official folds lack fold_2_test.csv" in " ".join(BENCHMARK.check(folder))


def test_what_is_left_out_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fovs = sorted(path.stem for path in (folder / "rgb").iterdir())
    (folder / "rgb" / f"{fovs[0]}.png").unlink()
    csv_of(folder, fovs[1]).unlink()
    csv_of(folder, fovs[2]).write_text(fixture.HEADER + "\n")
    csv_of(folder, fovs[3]).write_bytes(b"")
    names = "lymphocyte,lymphocyte,sTIL,rectangle"
    with csv_of(folder, fovs[4]).open("a") as stream:
        stream.write(f'15,{names},300,10,310,20,"300,310","10,20"\n')
        stream.write(f'16,{names},20,-30,30,-20,"20,30","-30,-20"\n')
        stream.write('17,blood,blood,blood,rectangle,20,30,40,50,"20,40","30,50"\n')
        stream.write('18,tumor,lymphocyte,sTIL,rectangle,20,30,40,50,"20,40","30,50"\n')
        stream.write('19,fov_basic,,,rectangle,0,0,120,120,"0,120","0,120"\n')
    with caplog.at_level(logging.WARNING):
        table = BENCHMARK.load(folder, Request(task="raw"))
    assert "2 nuclei lie outside their image" in caplog.text
    assert "1 nuclei have a class unknown" in caplog.text
    assert set(table.groups["fov"]) == set(fovs[4:])
    assert (table.x >= 0).all() and (table.x < 200).all() and (table.y >= 0).all()
    said = BENCHMARK.check(folder)
    for sentence in (
        f"1 csvs have no image, the first is {fovs[0]}.csv.",
        f"1 images have no csv, the first is {fovs[1]}.png.",
        f"2 images have no nucleus, the first is {fovs[2]}.png.",
        f"2 nuclei lie outside their image and are left out, the first in {fovs[4]}.png.",
        "NuCLS has no class 'blood' (3 rows); such nuclei are left out.",
        "1 nuclei contradict the published maps of classes, such as 'tumor is lymphocyte'.",
        "there are 10 fields, 8 slides, 6 hospitals; "
        "published are 1744 fields, 124 slides, 18 hospitals.",
    ):
        assert sentence in said, sentence


def test_check_compares_every_count_and_is_silent_when_all_agree(
    release: tuple[Path, list[Nucleus]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, drawn = release
    coarse, raw = (dict(Counter(map(of, drawn))) for of in (lambda n: n.coarse, lambda n: n.raw))
    said = BENCHMARK.check(root)
    assert len(said) == 3
    assert f"{coarse['tumor_any']} tumor_any" in said[1] and "21296 tumor_any" in said[1]
    assert "published are 263, 505, 405, 294, 277" in said[2]
    monkeypatch.setattr(nucls_check, "PLACES", {"fields": 12, "slides": 10, "hospitals": 8})
    monkeypatch.setattr(nucls_check, "TESTED", (3, 2, 3, 2, 2))
    monkeypatch.setattr(nucls_check, "RELEASE", coarse)
    assert BENCHMARK.check(root) == []
    monkeypatch.setattr(nucls_check, "EARLY", raw)
    assert len(BENCHMARK.check(root)) == 1 and "early drop" in BENCHMARK.check(root)[0]
    kept = Counter(BENCHMARK.load(root, PAPER).label.tolist())
    sentence = f"keeps {kept[0]} tumor_any, {kept[1]} nonTIL_stromal, {kept[2]} sTIL"
    assert sentence in BENCHMARK.check(root, PAPER)[-1]


def test_published_counts_agree_with_each_other() -> None:
    """The release's total, and the early drop's through the authors' maps."""
    assert sum(nucls_check.RELEASE.values()) == 59485
    assert sum(nucls_check.EARLY.values()) == 59541
    coarse: Counter[str] = Counter()
    for name, n in nucls_check.EARLY.items():
        coarse[PRINTED[name][1]] += n
    # The two drops differ by 56 nuclei.
    assert sum(abs(coarse[name] - n) for name, n in nucls_check.RELEASE.items()) == 56
    assert sum(nucls_check.TESTED) == nucls_check.PLACES["fields"]
