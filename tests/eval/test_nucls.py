"""NuCLS: folders in the release's exact layout."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import plans
from eval.benchmarks import Request, find
from eval.benchmarks.nucls import Nucls
from lemon_muse.data.table import Table
from tests.fixtures import nucls as fixture
from tests.fixtures.nucls import PRINTED, SLIDES, TESTED, Nucleus, csv_of, write

BENCHMARK = Nucls()
# The classes of the tasks as the LEMON paper's table and CellViT++'s label map list them.
CLASSES = {
    "super": ["tumor_any", "nonTIL_stromal", "sTIL"],
    "super4": ["tumor_any", "nonTIL_stromal", "sTIL", "other_nucleus"],
    "main": [
        *("tumor_nonMitotic", "tumor_mitotic", "nonTILnonMQ_stromal"),
        *("macrophage", "lymphocyte", "plasma_cell"),
    ],
    "raw": [name for name in PRINTED if name != "unlabeled"],
}
PAPER = Request(protocol="paper")
QUARTER = Request(image_mpp=0.25)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Nucleus]]:
    root = tmp_path_factory.mktemp("nucls") / "NuCLS"
    return root, write(root)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "nucls")
    return tmp_path / "nucls"


def name_of(nucleus: Nucleus, task: str) -> str:
    main, coarse = PRINTED[nucleus.raw]
    return {"raw": nucleus.raw, "main": main}.get(task, coarse)


def rows_of(table: Table) -> set[tuple[str, float, float, str]]:
    fovs = [Path(path).stem for path in table.image.tolist()]
    names = [table.classes[label] for label in table.label.tolist()]
    return set(zip(fovs, table.x.tolist(), table.y.tolist(), names, strict=True))


@pytest.mark.parametrize("task", ["super", "super4", "main", "raw"])
def test_every_task_has_the_nuclei_of_its_classes_and_no_others(
    release: tuple[Path, list[Nucleus]], task: str
) -> None:
    root, drawn = release
    table = BENCHMARK.load(root, Request(task=task))
    assert sorted(table.classes) == sorted(CLASSES[task])
    expected = {
        (n.fov, n.x, n.y, name_of(n, task)) for n in drawn if name_of(n, task) in CLASSES[task]
    }
    assert rows_of(table) == expected and len(table) == len(expected)
    assert set(table.label.tolist()) == set(range(len(table.classes)))
    assert (table.mpp == 0.2).all() and set(table.split) == {"all"}


def test_the_first_task_is_lemons_three_classes_in_cellvits_order() -> None:
    assert find("nucls").tasks[0] == "super"
    assert BENCHMARK.tasks == tuple(CLASSES)


def test_patient_slide_and_hospital_come_from_the_barcode(
    release: tuple[Path, list[Nucleus]],
) -> None:
    root, drawn = release
    table = BENCHMARK.load(root)
    slides = {nucleus.fov: nucleus.slide for nucleus in drawn}
    for i, fov in enumerate(table.groups["fov"].tolist()):
        assert Path(table.image[i]) == root / "rgb" / f"{fov}.png"
        assert table.slide[i] == slides[fov]
        assert table.patient[i] == slides[fov][:12]
        assert table.groups["hospital"][i] == slides[fov].split("-")[1]


def test_points_lie_on_drawn_nuclei_and_crops_have_them_in_the_middle(
    release: tuple[Path, list[Nucleus]],
) -> None:
    root, _ = release
    table = BENCHMARK.load(root)
    modes = set()
    for path in sorted(set(table.image.tolist())):
        with Image.open(path) as image:
            modes.add(image.mode)
            pixels = np.array(image.convert("RGB"))
        rows = np.flatnonzero(table.image == path)
        assert pixels[table.y[rows].astype(int), table.x[rows].astype(int), 1].max() < 100
    assert modes == {"RGB", "RGBA"}
    crops = table.crops(9, 0.2)
    assert crops.shape == (len(table), 9, 9, 3)
    assert crops[:, 4, 4, 1].max() < 100


def test_an_early_drop_gives_the_rows_of_the_release(
    release: tuple[Path, list[Nucleus]], tmp_path: Path
) -> None:
    root = tmp_path / "QC"
    write(root, form="early")
    said = csv_of(root, release[1][0].fov).read_text()
    assert "correction_" in said and "super_classification" not in said
    for task in CLASSES:
        request = Request(task=task)
        table = BENCHMARK.load(root, request)
        assert rows_of(table) == rows_of(BENCHMARK.load(release[0], request))
    assert {Path(path).parent.name for path in table.image.tolist()} == {"rgbs"}


def test_the_filter_of_the_paper_keeps_whole_squares_only(
    release: tuple[Path, list[Nucleus]],
) -> None:
    root, drawn = release
    expected = set()
    for n in drawn:
        with Image.open(root / "rgb" / f"{n.fov}.png") as image:
            width, height = image.size
        whole = n.x - 37 >= 0 and n.y - 37 >= 0 and n.x + 37 <= width and n.y + 37 <= height
        if whole and n.coarse in CLASSES["super"]:
            expected.add((n.fov, n.x, n.y, n.coarse))
    table = BENCHMARK.load(root, PAPER)
    assert rows_of(table) == expected
    assert 0 < len(expected) < len(BENCHMARK.load(root)) / 2


def test_a_square_that_touches_the_border_is_whole(folder: Path) -> None:
    fov = f"{SLIDES[0]}_id-0_left-1_top-2_bottom-3_right-4"
    Image.new("RGB", (90, 74)).save(folder / "rgb" / f"{fov}.png")
    row = "lymphocyte,lymphocyte,sTIL,rectangle"
    boxes = (
        "30,30,44,44",
        "32,30,46,44",
        "46,30,60,44",
        "47,30,61,44",
        "48,30,62,44",
        "83,30,97,44",
    )
    lines = [f'{i},{row},{box},"1,2","3,4"' for i, box in enumerate(boxes)]
    csv_of(folder, fov).write_text("\n".join([fixture.HEADER, *lines]))
    table = BENCHMARK.load(folder, PAPER)
    # Centres 37 … 53 of a field 90 px wide: the squares 0 … 74 and 16 … 90 are the outermost.
    assert table.x[table.groups["fov"] == fov].tolist() == [37, 39, 53]
    # A centre on the right edge, 90, has no pixel.
    table = BENCHMARK.load(folder)
    assert table.x[table.groups["fov"] == fov].tolist() == [37, 39, 53, 54, 55]


def test_the_default_folds_are_the_official_ones(release: tuple[Path, list[Nucleus]]) -> None:
    root, _ = release
    table = BENCHMARK.load(root)
    folds = BENCHMARK.folds(table)
    assert [fold.name for fold in folds] == [f"{k} of 5" for k in TESTED]
    for fold, slides in zip(folds, TESTED.values(), strict=True):
        assert set(table.slide[fold.test]) == set(slides)
        assert set(table.slide[fold.train]) == set(SLIDES) - set(slides)
        sides = [set(table.groups["hospital"][rows]) for rows in (fold.train, fold.test)]
        assert not sides[0] & sides[1] and not len(fold.val)
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested.tolist()) == list(range(len(table)))
    assert not plans.shares_patients(table, folds)


def test_the_folds_of_the_paper_share_patients_and_the_default_ones_tell_nothing_of_them(
    release: tuple[Path, list[Nucleus]],
) -> None:
    """Features that encode only the patient: what a nearest neighbour makes of them."""
    root, _ = release
    table = BENCHMARK.load(root)
    patients, code = np.unique(table.patient, return_inverse=True)
    features = np.eye(len(patients))[code]
    for request, leaks in ((Request(), False), (PAPER, True)):
        folds = BENCHMARK.folds(table, request)
        assert plans.shares_patients(table, folds) is leaks
        likeness = [(features[f.test] @ features[f.train].T).max() for f in folds]
        assert bool(max(likeness) > 0) is leaks
    paper = BENCHMARK.paper("super")
    assert paper is not None and paper.probes == ("logistic",) and "74 px" in paper.says
    assert BENCHMARK.paper("super4") is None
