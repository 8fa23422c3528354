"""The eval job from end to end: rows, resume, caches, floors, and wrong words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from eval import results
from eval.run import Eval, run
from lemon_muse.config import load
from lemon_muse.errors import UserError
from lemon_muse.synthetic import write_images
from tests.eval.standins import small_encoder

FIELDS = {
    "benchmark",
    "task",
    "encoder",
    "encoder_hash",
    "protocol",
    "probe",
    "split",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "seed",
    "seconds",
    "version",
    "params",
}


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    write_images(folder, slides=12, side=256, seed=3)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_encoder(tmp_path_factory.mktemp("encoder"))


def settings(encoder: Path | str, root: Path, out: Path, **more: Any) -> Eval:
    given = {"encoder": str(encoder), "benchmark": "folder", "root": root, "out": out}
    return Eval(**{**given, "device": "cpu", **more})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_rows_predictions_and_gallery_agree(
    tissue: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(settings(encoder, tissue, tmp_path, seed=1))
    written = lines(tmp_path)
    assert rows == written
    assert all(set(row) == FIELDS for row in written)
    names = {row["encoder"] for row in written}
    window = "@40px0.25"
    assert names == {
        "small",
        "random:small",
        "floor:majority",
        f"floor:colour{window}",
        f"floor:histogram{window}",
        f"floor:pixel_pca{window}",
    }
    assert {row["probe"] for row in written} == {"knn", "logistic", "linear"}
    for name in names:
        for probe in ("knn", "logistic", "linear"):
            stem = f"{name.replace(':', '_')}-{probe}"
            with np.load(tmp_path / "predictions" / f"{stem}.npz") as file:
                labels, predicted = file["labels"], file["predicted"]
                assert file["confusion"].sum() == len(labels) == written[0]["n"]
                assert file["scores"].shape == (len(labels), 5)
                np.testing.assert_array_equal(file["scores"].argmax(1), predicted)
                assert len(file["patient"]) == len(file["image"]) == len(file["x"]) == len(labels)
            mine = {
                row["metric"]: row
                for row in written
                if row["encoder"] == name and row["probe"] == probe
            }
            expected = balanced_accuracy_score(labels, predicted)
            assert mine["balanced_accuracy"]["value"] == pytest.approx(expected, abs=1e-6)
            present = np.unique(labels)
            expected = f1_score(labels, predicted, labels=present, average="macro")
            assert mine["macro_f1"]["value"] == pytest.approx(expected, abs=1e-6)
            low, high = mine["accuracy"]["ci_low"], mine["accuracy"]["ci_high"]
            assert low <= mine["accuracy"]["value"] <= high
    said = capsys.readouterr().out
    assert str(tmp_path / "results.jsonl") in said
    knn_block = [
        line for line in said.splitlines() if line.startswith(("small ", "floor:", "rand"))
    ]
    assert knn_block[0].startswith("small ")
    with np.load(tmp_path / "gallery.npz") as file:
        assert str(file["encoder"]) == "small"
        assert file["crops"].shape[1:] == (40, 40, 3)
        assert len(file["features"]) == len(file["labels"])


def test_the_report_reads_what_eval_writes(tissue: Path, encoder: Path, tmp_path: Path) -> None:
    from eval.report.inputs import predictions_file, read_predictions, read_results

    run(settings(encoder, tissue, tmp_path, probe="knn"))
    rows, notes = read_results(tmp_path / "results.jsonl")
    assert rows and not notes
    for row in rows:
        found = read_predictions(predictions_file(row))
        assert len(found.labels) == row.n
        assert row.is_floor == (row.encoder != "small")


def test_a_rerun_computes_and_writes_nothing(
    tissue: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(settings(encoder, tissue, tmp_path, probe="knn"))
    before = (tmp_path / "results.jsonl").read_bytes()

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished probe was computed again")

    monkeypatch.setattr("eval.measure._found", forbidden)
    again = run(settings(encoder, tissue, tmp_path, probe="knn"))
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert again == first


def test_a_killed_run_is_finished_without_duplicates(
    tissue: Path, encoder: Path, tmp_path: Path
) -> None:
    # protocol=paper has two quick probes.
    whole = run(settings(encoder, tissue, tmp_path / "whole", protocol="paper"))
    cut = tmp_path / "cut"
    run(settings(encoder, tissue, cut, protocol="paper", probe="knn"))
    path = cut / "results.jsonl"
    # The machine died while a line was being written.
    path.write_bytes(path.read_bytes()[:-40])
    (cut / "predictions" / "small-knn.npz").unlink()
    rows = run(settings(encoder, tissue, cut, protocol="paper"))

    def values(found: list[dict[str, Any]]) -> dict[tuple[Any, ...], Any]:
        return {(r["encoder"], r["probe"], r["metric"]): r["value"] for r in found}

    assert values(rows) == values(whole)
    kept = lines(cut)  # every line is whole again
    identities = [(*results.key_of(row), row["metric"]) for row in kept]
    assert len(identities) == len(set(identities)) == len(whole)
    assert (cut / "predictions" / "small-knn.npz").is_file()


def test_other_seed_protocol_and_split_are_other_rows(
    tissue: Path, encoder: Path, tmp_path: Path
) -> None:
    def at(**more: Any) -> list[dict[str, Any]]:
        return run(settings(encoder, tissue, tmp_path, probe="knn", floors=False, **more))

    first = at()
    count = len(first)
    others: list[dict[str, Any]] = [{"seed": 7}, {"protocol": "paper"}, {"split": "val"}]
    for number, more in enumerate(others, start=2):
        at(**more)
        assert len(lines(tmp_path)) >= number * (count - 1)
    assert {(r["seed"], r["protocol"], r["split"]) for r in lines(tmp_path)} == {
        (0, "default", "test"),
        (7, "default", "test"),
        (0, "paper", "test"),
        (0, "default", "val"),
    }
    # Four measurements share encoder and probe: none has overwritten another's predictions.
    assert len(list((tmp_path / "predictions").glob("small-knn*.npz"))) == 4
    assert at() == first


def test_muse_has_knn_and_linear_only(tissue: Path, encoder: Path, tmp_path: Path) -> None:
    rows = run(settings(encoder, tissue, tmp_path, protocol="paper", floors=False))
    assert {row["probe"] for row in rows} == {"knn", "linear"}
    with pytest.raises(UserError, match="protocol=paper has no probe 'logistic'"):
        run(settings(encoder, tissue, tmp_path, protocol="paper", probe="logistic"))


def test_random_is_the_same_network_with_other_weights(
    tissue: Path, encoder: Path, tmp_path: Path
) -> None:
    first = run(settings(f"random:{encoder}", tissue, tmp_path, probe="knn", floors=False))
    assert {row["encoder"] for row in first} == {"random:small"}
    beside = run(settings(encoder, tissue, tmp_path, probe="knn"))
    twin = [row for row in beside if row["encoder"] == "random:small"]
    # The floor beside the encoder is the very same measurement.
    assert twin == first
    other = run(settings(f"random:{encoder}", tissue, tmp_path, probe="knn", floors=False, seed=1))
    assert other[0]["encoder_hash"] != first[0]["encoder_hash"]


def test_floors_also_run_on_lemons_window_when_the_encoder_has_another(
    tissue: Path, tmp_path: Path
) -> None:
    wide = small_encoder(tmp_path / "wide", window=64, name="wide")
    rows = run(settings(wide, tissue, tmp_path / "out", probe="knn"))
    names = {row["encoder"] for row in rows}
    for floor in ("colour", "histogram", "pixel_pca"):
        assert {f"floor:{floor}@64px0.25", f"floor:{floor}@40px0.25"} <= names
    alone = run(
        settings("floor:histogram@64px0.25", tissue, tmp_path / "two", probe="knn", floors=False)
    )
    same = [row for row in rows if row["encoder"] == "floor:histogram@64px0.25"]
    assert [r["value"] for r in alone] == [r["value"] for r in same]


def test_floors_beat_majority_on_real_nuclei(shared_data: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"benchmark": "brcam2c", "floors": False}
    root = shared_data / "brca-m2c"
    for probe in ("knn", "logistic"):
        found = run(settings("floor:colour", root, tmp_path, probe=probe, **given))
        value = {row["metric"]: row for row in found}["balanced_accuracy"]
        assert value["ci_low"] > 1 / 3 + 0.05, probe
        assert value["n"] == 3537
    majority = run(settings("floor:majority", root, tmp_path, probe="knn", **given))
    value = {row["metric"]: row["value"] for row in majority}
    assert value["balanced_accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert value["accuracy"] == pytest.approx(2472 / 3537, abs=1e-6)
    assert value["auroc"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "floor:texture"}, "is no floor"),
        ({"encoder": "no/such/folder"}, "no such file or folder"),
        ({"benchmark": "fodler"}, "did you mean 'folder'"),
        ({"root": Path("nowhere")}, "there is no"),
        ({"device": "quantum"}, "cannot be used"),
    ],
)
def test_wrong_words_are_one_sentence_and_leave_nothing(
    change: dict[str, Any], words: str, tissue: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=words) as caught:
        run(settings("floor:colour", tissue, out).model_copy(update=change))
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_the_settings_name_what_is_wrong() -> None:
    with pytest.raises(UserError, match="encoder= is needed"):
        load(Eval, ["benchmark=folder", "root=x"])
    with pytest.raises(UserError, match="did you mean 'probe'"):
        load(Eval, ["encoder=x", "benchmark=folder", "root=x", "prob=knn"])


def test_a_split_without_nuclei_is_said(
    tissue: Path, tmp_path: Path, make_copy: Callable[[Path, Path], Path]
) -> None:
    copy = make_copy(tissue, tmp_path / "copy")
    table = copy / "slides.csv"
    table.write_text(table.read_text().replace(",test", ",train"))
    with pytest.raises(UserError, match="has no test nucleus"):
        run(settings("floor:colour", copy, tmp_path / "out"))


@pytest.fixture
def make_copy() -> Callable[[Path, Path], Path]:
    import shutil

    def copied(source: Path, target: Path) -> Path:
        return Path(shutil.copytree(source, target))

    return copied
