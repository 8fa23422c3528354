"""What the leaderboard writes beside its page, and when: LaTeX, pictures, script, report words."""

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.benchmarks import BENCHMARKS
from eval.leaderboard import leaderboard
from eval.leaderboard.labels import overlap, place_labels, spread
from eval.leaderboard.latex import as_latex, escape
from eval.leaderboard.picture import picture_of
from eval.leaderboard.rows import Lead, standings
from eval.leaderboard.script import SCRIPT
from eval.published import PUBLISHED, of
from eval.report import Report, run
from eval.report.build import gather, wants_leaderboard
from eval.report.style import canvas
from lemon_muse.config import load
from lemon_muse.errors import UserError
from tests.eval import leaderboard_material as material
from tests.eval.page_tables import Page
from tests.eval.report_material import write_results

COMMANDS = set(
    re.findall(
        r"\w+",
        "begin end centering small caption label toprule midrule bottomrule cmidrule multicolumn "
        "textbf textbackslash textasciitilde textasciicircum textless textgreater textbar textwidth"
        " textquotedbl textmu textpm texttimes textminus textperiodcentered textdagger dots",
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    material.classification(root / "deep" / "puma", "puma", "muse", probes=("knn", "logistic"))
    material.regression(root / "hest")
    return root


@pytest.fixture(scope="module")
def latex(folder: Path) -> str:
    read = gather(Report(results=(str(folder),), resamples=100))
    return as_latex(standings(read.boards, read.everything))


def bare(text: str) -> str:
    """Without escaped characters: what is left has TeX's meaning."""
    return re.sub(r"\\[\\{}$&#%_,]", "", text)


def test_latex_is_well_formed(latex: str) -> None:
    depth = 0
    for letter in bare(latex):
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0
    code = "\n".join(line for line in latex.splitlines() if not line.startswith("%"))
    assert not re.search(r"[$#^~_%\"<>|]", bare(code).replace("\\%", ""))
    assert set(re.findall(r"\\([a-zA-Z]+)", code)) <= COMMANDS
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", latex):
        assert kind == "begin" or opened.pop() == name
        opened += [name] if kind == "begin" else []
    assert not opened
    labels = re.findall(r"\\label\{([^}]*)\}", latex)
    assert len(set(labels)) == len(labels) == 4  # two tables, two of published figures


def test_latex_rows_have_as_many_cells_as_columns(latex: str) -> None:
    found = re.findall(r"\\begin\{tabular\}\{([^\n]*)\}\n(.*?)\\end\{tabular\}", latex, re.S)
    assert len(found) == 4
    for spec, body in found:
        columns = len(re.sub(r"p\{[^}]*\}", "p", spec))
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) >= 3
        for row in rows:
            spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            cells = len(re.sub(r"\\&", "", row).split("&"))
            assert cells + sum(spans) - len(spans) == columns, row


def test_latex_says_what_the_rows_say(folder: Path, latex: str) -> None:
    row = next(line for line in latex.splitlines() if line.startswith(r"lemon\_vits8 &"))
    wanted = {}
    for text in (folder / "deep" / "puma" / "results.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["encoder"] == "lemon_vits8":
            wanted[line["probe"], line["metric"]] = line["value"]
    assert "PUMA: muse" in latex
    puma = latex[latex.index("PUMA: muse") :]
    row = next(line for line in puma.splitlines() if line.startswith(r"lemon\_vits8 &"))
    cells = [cell.strip(" \\").removeprefix("textbf{").rstrip("}") for cell in row.split("&")]
    assert cells[1:3] == ["21.4", "0.56"]
    assert cells[3] == f"{wanted['logistic', 'balanced_accuracy']:.3f}"
    assert r"scratch\_vits8\textdagger{}" in latex
    assert escape('50_% & [x] <µ> "ÿ"') == (
        r"50\_\% \& {[}x{]} \textless{}\textmu{}\textgreater{} \textquotedbl{}ÿ\textquotedbl{}"
    )


@pytest.mark.parametrize(
    ("value", "low", "high", "says"),
    [
        (0.1, 0.01, 0.2, "above"),
        (0.1, -0.01, 0.2, "ahead"),
        (0.1, 0.0, 0.2, "ahead"),
        (0.1, np.nan, np.nan, "untested"),
        (0.0, -0.1, 0.1, "not above"),
        (-0.1, -0.2, 0.1, "not above"),
        (-0.1, np.nan, np.nan, "not above"),
    ],
)
def test_verdicts(value: float, low: float, high: float, says: str) -> None:
    assert Lead("floor:colour", value, low, high).verdict == says


def test_names_in_the_picture_cover_nothing() -> None:
    """Twenty encoders crowded into two corners of the panel."""
    rng = np.random.default_rng(0)
    points = [(10 ** rng.uniform(-1, -0.6), rng.uniform(0.7, 0.72)) for _ in range(10)]
    points += [(10 ** rng.uniform(1.5, 2), rng.uniform(0.78, 0.8)) for _ in range(10)]
    with canvas(500, 360) as figure:
        ax = figure.subplots()
        ax.set_xscale("log")
        ax.set_xlim(0.05, 150)
        ax.set_ylim(0.65, 0.82)
        figure.draw_without_rendering()
        names = [f"encoder_{i}_of_some_length" for i in range(20)]
        boxes = place_labels(ax, names, points, [(y - 0.01, y + 0.01) for _, y in points])
        dots = [tuple(ax.transData.transform(p)) for p in points]
        frame = ax.get_window_extent()
        drawn = [text.get_window_extent() for text in ax.texts]
    assert not any(overlap(a, b) for a, b in combinations(boxes, 2))
    assert not any(overlap(a, (x, y, x, y)) for a in boxes for x, y in dots)
    for box, extent in zip(sorted(boxes), sorted(drawn, key=lambda e: e.x0), strict=True):
        assert frame.x0 <= box[0] and box[2] <= frame.x1
        assert frame.y0 <= box[1] and box[3] <= frame.y1
        assert (extent.x0, extent.x1) == pytest.approx((box[0], box[2]), abs=2)


def test_spread() -> None:
    found = spread([5.0, 6.0, 50.0, 6.5], gap=10, top=100)
    assert sorted(found) == [found[i] for i in (0, 1, 3, 2)]  # the order is kept
    assert all(b - a >= 10 - 1e-9 for a, b in zip(sorted(found), sorted(found)[1:], strict=False))
    assert min(found) >= 0 and found[2] == 50
    assert spread([99.0, 98.0], gap=10, top=95) == [95, 85]
    assert spread([], gap=10, top=5) == []


def test_no_picture_without_gmacs(tmp_path: Path) -> None:
    write_results(tmp_path / "a", encoder="first")
    write_results(tmp_path / "b", encoder="second", lift=0.1)
    read = gather(Report(results=(str(tmp_path),), resamples=100))
    made = leaderboard(read.boards, read.everything, command="x")
    assert not made.pictures
    text = made.pages["leaderboard.html"]
    assert "so there is no picture" in text and "data:image" not in text
    assert picture_of(standings(read.boards, read.everything), "brcam2c") is None


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to run the script")
@pytest.mark.parametrize("down", [True, False])
def test_the_script_sorts(down: bool) -> None:
    """In a real engine: numbers by value, missing ones last both ways, equal ones in order."""
    values: list[float | None] = [0.5, None, 12.0, -3.0, 0.5, None, 2.0]
    code = (
        "globalThis.document = {querySelectorAll: () => []};\n"
        f"const order = (0, eval)({json.dumps(SCRIPT + 'order')});\n"
        f"console.log(JSON.stringify([order({json.dumps(values)}, {json.dumps(down)}), "
        f"order(['b', 'a', 'C'], {json.dumps(down)})]));"
    )
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    numbers, words = json.loads(done.stdout)
    known = [i for i, v in enumerate(values) if v is not None]
    wanted = sorted(known, key=lambda i: -values[i] if down else values[i])  # type: ignore[operator]
    assert numbers == [*wanted, 1, 5]
    assert words == ([2, 0, 1] if down else [1, 0, 2])


def test_published_figures() -> None:
    assert {p.benchmark for p in PUBLISHED} == set(BENCHMARKS) - {"folder"}
    names = [(p.benchmark, p.task, p.encoder, p.probe, p.metric, p.setting) for p in PUBLISHED]
    assert len(set(names)) == len(names)
    for p in PUBLISHED:
        assert 0.1 < p.value < 1 and float(p.printed) == p.value and p.source and p.setting
        base, _, part = p.metric.partition("/")
        assert base in ("balanced_accuracy", "accuracy", "macro_f1", "weighted_f1", "auroc",
                        "pearson")  # fmt: skip
        assert part in ("", "in_domain") and (not part or " cross:" in p.task)

    def value(benchmark: str, task: str, **wanted: Any) -> float:
        found = [p.value for p in of(benchmark, task)
                 if all(wanted[k] in getattr(p, k) for k in wanted)]  # fmt: skip
        assert len(found) == 1, (benchmark, task, wanted)
        return found[0]

    # The anchors, typed once more from the papers' tables as the reference states them.
    assert value("nucls", "super", encoder="a1 + gray") == 0.779
    assert value("midogpp", "atypical", encoder="LEMON") == 0.746
    assert value("midogpp", "atypical", encoder="Virchow2", metric="balanced") == 0.8135
    assert value("hest", "lung", encoder="default") == 0.128
    assert value("brcam2c", "class", probe="knn", setting="20x") == 0.8953
    assert value("ocelot", "class", encoder="CONCH", setting="40x") == 0.86
    assert value("puma", "muse", encoder="LFoV-MUSE-B", probe="finetune") == 0.8574
    cross = "mitosis cross:domain"
    assert value("midogpp", cross, encoder="H-opt", probe="LoRA", metric="auroc/in") == 0.90
    # A plan is no other question; training on one domain is.
    assert of("midogpp", "mitosis leave_out:domain") == of("midogpp", "mitosis") != []
    assert of("midogpp", "mitosis cross:scanner") == []


def test_when_a_report_has_a_leaderboard(folder: Path, tmp_path: Path) -> None:
    write_results(tmp_path / "a", encoder="first")
    write_results(tmp_path / "b", encoder="second")

    def wanted(*places: Path, words: tuple[str, ...] = ()) -> bool:
        cfg = load(Report, [f"results={','.join(map(str, places))}", "resamples=100", *words])
        return wants_leaderboard(cfg, gather(cfg).rows)

    assert not wanted(tmp_path / "a")
    assert wanted(tmp_path / "a", words=("leaderboard=true",))
    assert wanted(tmp_path)  # two encoders, in folders below the one that is given
    assert not wanted(tmp_path, words=("leaderboard=false",))
    rows = gather(Report(results=(str(folder),), resamples=100)).rows
    assert {row.benchmark for row in rows} == {"hest", "puma"}
    one = [row for row in rows if row.is_floor or row.encoder == "lemon_vits8"]
    assert wants_leaderboard(Report(results=("x",)), one)  # two benchmarks
    with pytest.raises(UserError, match="'leaderboard"):
        load(Report, ["results=x", "leaderboard=maybe"])


def test_report_writes_it_and_takes_it_away(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = [out / f"leaderboard.{end}" for end in ("html", "csv", "tex")]
    words = [f"results={folder / 'hest'}", f"out={out}", "resamples=100"]
    run(load(Report, words))
    assert all(file.is_file() for file in files) and (out / "leaderboard-hest.png").is_file()
    assert Page(files[0].read_text(encoding="utf-8")).of("HEST", "bowel")
    # What a report no longer has does not stay behind; what it never wrote does.
    (out / "leaderboard-mine.html").write_text("mine")
    run(load(Report, [*words, "leaderboard=false"]))
    assert not any(file.exists() for file in files)
    assert not (out / "leaderboard-hest.png").exists()
    assert (out / "report.html").is_file() and (out / "leaderboard-mine.html").is_file()


def test_regression_alone_has_an_encoder_page(folder: Path, tmp_path: Path) -> None:
    page = run(Report(results=(str(folder / "hest"),), out=tmp_path / "out", resamples=100,
                      encoder="lemon_vits8", leaderboard=False))  # fmt: skip
    text = page.read_text(encoding="utf-8")
    lead = re.search(r'<p class="lead">(.*?)</p>', text)
    assert lead and lead[1].startswith("lemon_vits8 beats every floor with ridge regression (+0.")
    assert "in Pearson&#x27;s r" in lead[1]
    genes = next(t for t in Page(text).tables if t.head[0].cells[0].text == "Gene")
    values = np.load(folder / "hest" / "predictions" / "lemon_vits8-ridge.npz")["pearson"].mean(0)
    found = {row.cells[0].text: row.cells[1].text for row in genes.body if len(row.cells) > 1}
    assert found == {g: f"{v:.3f}" for g, v in zip(material.GENES, values, strict=True)}
    assert "Confusion" not in text


def test_robustness_alone_has_both_pages(tmp_path: Path) -> None:
    material.robustness(tmp_path / "r")
    page = run(Report(results=(str(tmp_path / "r"),), out=tmp_path / "out"))
    assert "without a probe that floors can be held against" in page.read_text(encoding="utf-8")
    board = Page((page.parent / "leaderboard.html").read_text(encoding="utf-8"))
    assert [t.place[2] for t in board.tables] == ["Robustness", "Published figures"]


def test_rows_of_older_versions(tmp_path: Path) -> None:
    """Only what a row must have: no task, hash, interval, seed or params."""
    keys = ("benchmark", "encoder", "probe", "metric", "value")
    some = [("old", "a", "knn", "balanced_accuracy", 0.5), ("old", "b", "knn", "macro_f1", 0.25),
            ("old", "b", "knn", "balanced_accuracy", 0.75),
            ("old", "floor:colour", "knn", "balanced_accuracy", None)]  # fmt: skip
    rows = [json.dumps(dict(zip(keys, line, strict=True))) for line in some]
    (tmp_path / "results.jsonl").write_text("\n".join(rows))
    page = run(Report(results=(str(tmp_path),), out=tmp_path / "out"))
    table = Page((page.parent / "leaderboard.html").read_text(encoding="utf-8")).of("old")[0]
    assert table.names() == ["b", "a", "colour statisticsfloor"]
    assert [cell.text for cell in table.body[0].cells] == ["b", "0.750", "0.250"]


def test_a_folder_without_results(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    with pytest.raises(UserError, match="or a folder that holds some") as caught:
        gather(Report(results=(str(tmp_path),)))
    assert str(tmp_path) in str(caught.value)
