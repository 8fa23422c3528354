"""The report's page against its inputs: numbers, names, verdict, missing parts, bad input."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from eval.report import Report, run
from lemon_muse.config import load
from lemon_muse.errors import UserError
from tests.eval.report_material import ENCODER, write_all, write_results


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder, a gallery and a run folder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def report(inputs: Path) -> Path:
    """The finished page."""
    return run(Report(results=(str(inputs),), run=inputs / "run", out=inputs / "out"))


class Cells(HTMLParser):
    """Collects the text of table cells, row by row, and every src and href."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self.inside = True

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self.inside = False


def parsed(page: Path) -> Cells:
    cells = Cells()
    cells.feed(page.read_text(encoding="utf-8"))
    return cells


def test_page_holds_every_number(inputs: Path, report: Path) -> None:
    wanted = [json.loads(line) for line in (inputs / "results.jsonl").read_text().splitlines()]
    rows = parsed(report).rows
    for row in wanted:
        metric = row["metric"].replace("f1/", "F1, ")
        named = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "auroc": "AUROC"}
        key = [f"{row['encoder']} 01234567", row["probe"], "test", named.get(metric, metric)]
        hits = [r for r in rows if r[1:5] == key]
        assert len(hits) == 1
        assert hits[0][5] == f"{row['value']:.4f}"
        assert hits[0][6] == f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        assert hits[0][7:9] == ["1,200", "0"]
    text = json.loads((report.parent / "report.json").read_text())
    assert [r["value"] for r in text["rows"]] == [r["value"] for r in wanted]


def test_page_needs_nothing_else(report: Path) -> None:
    cells = parsed(report)
    assert len([x for x in cells.links if x.startswith("data:image/")]) >= 8
    assert all(x.startswith(("data:image/", "#")) for x in cells.links)
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import", text)
    assert "script" not in cells.tags and "link" not in cells.tags
    assert report.stat().st_size < 6_000_000


def test_pictures_inline_are_the_files(report: Path) -> None:
    names = json.loads((report.parent / "report.json").read_text())["pictures"]
    inline = [x for x in parsed(report).links if x.startswith("data:")]
    assert len(names) == len(inline)
    for name, uri in zip(names, inline, strict=True):
        with Image.open(report.parent / name) as file:
            shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
            assert file.size == shown.size, name
            away = np.asarray(file.convert("RGB"), float) - np.asarray(shown.convert("RGB"), float)
            assert np.abs(away).mean() < 3, name


def test_same_input_gives_same_bytes(inputs: Path, report: Path) -> None:
    before = {p.name: p.read_bytes() for p in report.parent.iterdir() if p.is_file()}
    run(Report(results=(str(inputs),), run=inputs / "run", out=inputs / "out"))
    after = {p.name: p.read_bytes() for p in report.parent.iterdir() if p.is_file()}
    assert before == after


def test_names_are_escaped(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "vit_tiny<b>" not in text
    assert "vit_tiny&lt;b&gt;&amp;brca" in text


def test_differences_are_paired(inputs: Path, report: Path) -> None:
    found = json.loads((report.parent / "report.json").read_text())["differences"]
    one = next(d for d in found if d["floor"].startswith("floor:histogram")
               and d["probe"] == "logistic" and d["metric"] == "balanced_accuracy")  # fmt: skip
    files = [np.load(inputs / "predictions" / f"{stem}-logistic.npz")
             for stem in (ENCODER, "floor_histogram@40px0.25")]  # fmt: skip
    labels, patient = files[0]["labels"], files[0]["patient"]
    rng = np.random.default_rng(11)
    names = np.unique(patient)
    draws = []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(patient == p) for p in rng.choice(names, len(names))])
        draws.append(np.subtract(*(balanced_accuracy_score(labels[rows], f["predicted"][rows])
                                   for f in files)))  # fmt: skip
    value = np.subtract(*(balanced_accuracy_score(labels, f["predicted"]) for f in files))
    assert one["value"] == pytest.approx(value, abs=1e-9)
    assert (one["low"], one["high"]) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.012)


def test_verdict_says_what_is_not_beaten(tmp_path: Path) -> None:
    write_results(tmp_path, encoder="weak", lift=-0.4)
    page = run(Report(results=(str(tmp_path),), out=tmp_path / "out")).read_text(encoding="utf-8")
    lead = re.search(r'<p class="lead">(.*?)</p>', page)
    assert lead and "weak does not beat 4 of 5 floors" in lead[1] and "beats every" not in lead[1]
    # The four and the one that is beaten are named, probe by probe.
    lost = (
        "Does not beat randomly initialised vit_tiny, the colour histogram, PCA of raw pixels and"
    )
    assert page.count(lost) == 3
    assert page.count("Ahead of the majority class.") == 3
    # Nothing but results: the other parts are said to be missing, and nothing is drawn for them.
    assert page.count('class="missing"') == 3
    assert not (tmp_path / "out" / "projector").exists()


def test_several_files_in_one_table(tmp_path: Path, inputs: Path) -> None:
    write_results(tmp_path / "b", encoder="second", lift=0.1)
    words = [f"results={inputs},{tmp_path / 'b' / 'results.jsonl'}", f"out={tmp_path / 'out'}",
             "projector=false", "projection=pca", "encoder=second"]  # fmt: skip
    page = run(load(Report, words))
    names = {row[0] for row in parsed(page).rows if len(row) == 7}
    assert {"second", ENCODER} <= names
    assert "<h1>second</h1>" in page.read_text(encoding="utf-8")
    # The gallery holds another encoder's features, so it is not shown under this name.
    assert not list(page.parent.glob("neighbours-*.png"))


HALF = '{"benchmark": "b", "encoder": "e", "probe": "knn", "metric": "m"'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no results file"),
        ("", "holds no rows"),
        (HALF + ', "value": 1}\n{oops\n', "line 2: not readable as JSON"),
        (HALF + ', "value": 1}\n{"benchmark": b}\n', "line 2: not readable as JSON"),
        (HALF + ', "va', "holds no rows"),
        ("\n" + HALF + "}", "line 2: the row has no 'value'"),
        (HALF + ', "value": "high"}', "line 1: 'value' is"),
        ("[1]", "line 1: a row must be"),
    ],
)
def test_bad_results(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "results.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        run(Report(results=(str(path),), out=tmp_path / "out"))
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_gallery_run_and_encoder(tmp_path: Path) -> None:
    write_results(tmp_path)
    with pytest.raises(UserError, match="no encoder 'nobody'; they hold: vit_tiny"):
        run(Report(results=(str(tmp_path),), out=tmp_path / "out", encoder="nobody"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"loss": 3}\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: the line has no 'step'"):
        run(Report(results=(str(tmp_path),), out=tmp_path / "out", run=tmp_path))
    (tmp_path / "gallery.npz").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="is not a gallery"):
        run(Report(results=(str(tmp_path),), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_predictions_of_another_run_are_left_out(tmp_path: Path) -> None:
    write_results(tmp_path, encoder="e")
    path = tmp_path / "predictions" / "e-knn.npz"
    arrays = dict(np.load(path))
    arrays["predicted"] = (arrays["predicted"] + 1) % 3
    np.savez(path, **arrays)
    page = run(Report(results=(str(tmp_path),), out=tmp_path / "out"))
    assert "e-knn.npz belongs to another run" in page.read_text(encoding="utf-8")
    found = json.loads((page.parent / "report.json").read_text())["differences"]
    assert all((d["low"] is None) == (d["probe"] == "knn") for d in found)


def test_rows_that_were_measured_again(tmp_path: Path) -> None:
    write_results(tmp_path, encoder="e")
    path = tmp_path / "results.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    again = json.dumps({**first, "value": 0.4321, "seed": 1})
    path.write_text(path.read_text() + again[:40] + "\n" + again + "\n")
    page = run(Report(results=(str(path),), out=tmp_path / "out"))
    rows = parsed(page).rows
    table = next(row for row in rows if len(row) == 7 and row[0] == "e")
    assert table[1].startswith("0.432")
    listed = [
        row[5] for row in rows if row[1:5] == ["e 01234567", "knn", "test", "balanced accuracy"]
    ]
    assert listed == [f"{first['value']:.4f}", "0.4321"]
    text = page.read_text(encoding="utf-8")
    assert "1 rows were measured again" in text and "of results.jsonl is cut off" in text
