"""The leaderboard against its rows: values, order, leads, ranks, matrices, files."""

import base64
import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import balanced_accuracy_score

from eval.leaderboard import Leaderboard, leaderboard
from eval.leaderboard.details import contrast, shade
from eval.leaderboard.rows import Standing, standings
from eval.report import Report
from eval.report.build import Material, gather
from eval.report.words import signed
from tests.eval import leaderboard_material as material
from tests.eval.page_tables import Page, columns, main_table

HARD = 'uni <gated> & "large"_100%'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of ten encoders and five floors on four benchmarks, a folder each."""
    root = tmp_path_factory.mktemp("results")
    material.classification(root / "brcam2c", "brcam2c", "class", seeds=(0, 1, 2),
                            probes=("knn", "logistic"))  # fmt: skip
    material.classification(root / "nucls", "nucls", "super", seed=3, by="hospital")
    material.robustness(root / "nucls-robustness")
    material.cross_domain(root / "midogpp-cross")
    material.regression(root / "hest")
    return root


@pytest.fixture(scope="module")
def read(folder: Path) -> Material:
    return gather(Report(results=(str(folder),), resamples=300))


@pytest.fixture(scope="module")
def tables(read: Material) -> dict[str, Standing]:
    found = standings(read.boards, read.everything)
    return {s.board.benchmark: s for s in found}


@pytest.fixture(scope="module")
def made(read: Material) -> Leaderboard:
    return leaderboard(read.boards, read.everything, command="lemon-muse report results=x")


@pytest.fixture(scope="module")
def page(made: Leaderboard) -> Page:
    return Page(made.pages["leaderboard.html"])


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every row of every file below a folder."""
    files = sorted(folder.rglob("results.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_every_value_stands_in_its_cell(folder: Path, page: Page) -> None:
    table = main_table(page, "NuCLS")
    titles = columns(table)
    probes = {"knn": "KNN", "logistic": "Logistic regression", "linear": "Linear probe"}
    metrics = {"balanced_accuracy": "bal. acc.", "macro_f1": "macro-F1", "auroc": "AUROC"}
    rows = {row.cells[0].attributes["title"].rsplit(" ", 1)[0]: row for row in table.body}
    checked = 0
    for line in lines(folder / "nucls"):
        if line["metric"] not in metrics:
            continue
        cell = rows[line["encoder"]].cells[
            titles.index(f"{probes[line['probe']]}/{metrics[line['metric']]}")
        ]
        wanted = f"{line['value']:.3f}[{line['ci_low']:.3f}, {line['ci_high']:.3f}]"
        assert cell.text == wanted and cell.key == pytest.approx(line["value"], abs=1e-9)
        checked += 1
    assert checked == 15 * 3 * 3


def test_costs_stand_beside(page: Page) -> None:
    table = main_table(page, "NuCLS")
    at = [columns(table).index(t) for t in ("Parameters, M", "GMAC per nucleus", "Nuclei/s")]
    found = {row.cells[0].text: [row.cells[i].text for i in at] for row in table.body}
    assert found["lemon_vits8"] == ["21.4", "0.56", "410"]
    assert found["muse_vits16"][1:] == ["8.68 per window", "950"]
    assert found["majority classfloor"] == ["–", "–", "–"]


def test_order_and_marks(tables: dict[str, Standing], page: Page) -> None:
    for name in ("BRCA-M2C", "NuCLS", "HEST", "MIDOG++"):
        table = main_table(page, name)
        sort = [c for row in table.head for c in row.cells if "aria-sort" in c.attributes]
        assert [c.attributes["aria-sort"] for c in sort] == ["descending"]
        values = [row.cells[int(sort[0].attributes["data-col"])].key for row in table.body]
        assert values == sorted(values, reverse=True)  # type: ignore[type-var]
        best = [i for i, row in enumerate(table.body) if "best-floor" in row.kind]
        floors = [i for i, row in enumerate(table.body) if "floor-row" in row.kind]
        # The first floor from above is the best one; encoders below it are told apart.
        assert best == floors[:1] and "best floor" in table.body[best[0]].cells[0].text
        for i, row in enumerate(table.body):
            if i not in floors:
                assert ("not above the best floor" in row.cells[0].text) == (i > best[0])
        assert any(i > best[0] for i in range(len(table.body)) if i not in floors)
    assert tables["nucls"].headline == ("logistic", "balanced_accuracy")
    assert tables["hest"].headline == ("ridge", "pearson")


def test_seeds_are_averaged(folder: Path, page: Page) -> None:
    table = main_table(page, "BRCA-M2C")
    at = columns(table).index("KNN/macro-F1")
    place = (HARD, "knn", "macro_f1")
    values = [line["value"] for line in lines(folder / "brcam2c")
              if (line["encoder"], line["probe"], line["metric"]) == place]  # fmt: skip
    row = next(r for r in table.body if r.cells[0].text.startswith(HARD))
    assert (
        row.cells[at].text == f"{np.mean(values):.3f}± {np.std(values, ddof=1):.3f} ({len(values)})"
        and len(values) == 3
    )
    assert "standard deviation over seeds" in table.caption


def test_leads_are_paired(folder: Path, tables: dict[str, Standing], page: Page) -> None:
    """An independent bootstrap: patients are drawn, and both are scored by scikit-learn."""
    standing = tables["nucls"]
    assert standing.best_floor is not None
    floor = standing.best_floor.name.replace(":", "_")
    stems = [f"{name}-logistic.npz" for name in ("timm_resnet50", floor)]
    mine, other = (np.load(folder / "nucls" / "predictions" / stem) for stem in stems)
    labels, patient = mine["labels"], mine["patient"]
    people = np.unique(patient)
    rng = np.random.default_rng(5)
    draws = []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(patient == p)
                               for p in rng.choice(people, len(people))])  # fmt: skip
        pair = [balanced_accuracy_score(labels[rows], f["predicted"][rows]) for f in (mine, other)]
        draws.append(pair[0] - pair[1])
    lead = next(e.lead for e in standing.entries if e.name == "timm_resnet50")
    assert lead is not None
    assert (lead.low, lead.high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.015)
    row = next(r for r in main_table(page, "NuCLS").body if r.cells[0].text == "timm_resnet50")
    assert row.cells[-1].text.startswith(f"{signed(lead.value)}[{signed(lead.low)}, ")


def test_leads_of_correlations_resample_slides(folder: Path, tables: dict[str, Standing]) -> None:
    standing = tables["hest"]
    assert standing.best_floor is not None
    floor = standing.best_floor.name.replace(":", "_")
    files = [folder / "hest" / "predictions" / f"{n}-ridge.npz" for n in ("lemon_resnet18", floor)]
    first, second = (np.load(file)["pearson"] for file in files)
    gain = first.mean(1) - second.mean(1)
    rng = np.random.default_rng(2)
    draws = [rng.choice(gain, len(gain)).mean() for _ in range(2000)]
    lead = next(e.lead for e in standing.entries if e.name == "lemon_resnet18")
    assert lead is not None and lead.value == pytest.approx(gain.mean(), abs=1e-5)
    assert (lead.low, lead.high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.003)


def test_a_lead_without_predictions_is_untested(tables: dict[str, Standing], page: Page) -> None:
    verdicts = {e.lead.verdict for e in tables["midogpp"].encoders if e.lead}
    assert verdicts == {"untested", "not above"}
    assert "no paired interval" in main_table(page, "MIDOG++").body[0].cells[-1].text


def test_overview_ranks(folder: Path, tables: dict[str, Standing], page: Page) -> None:
    table = page.of("Overview")[0]
    values = []
    for name in ("brcam2c", "hest", "midogpp", "nucls"):
        probe, metric = tables[name].headline or ("", "")
        found: dict[str, list[float]] = {}
        for line in lines(folder):
            here = (line["benchmark"], line["probe"], line["metric"]) == (name, probe, metric)
            if here and line["encoder"] in material.ENCODERS:
                found.setdefault(line["encoder"], []).append(line["value"])
        values.append([np.mean(found[encoder]) for encoder in material.ENCODERS])
    ranks = np.mean([rankdata(-np.array(column)) for column in values], axis=0)
    wanted = dict(zip(material.ENCODERS, ranks, strict=True))
    shown = {row.cells[0].text: row.cells[1].key for row in table.body[:-1]}
    assert shown == pytest.approx(wanted)
    assert list(shown.values()) == sorted(shown.values())  # type: ignore[type-var]
    assert table.body[-1].cells[0].text == "best floor"
    assert table.body[-1].cells[3].text.startswith("0.1")  # HEST


def test_an_encoder_with_fewer_tables_stands_behind(tmp_path: Path, folder: Path) -> None:
    """First in the only table that it was measured on, and no match for a mean over all."""
    some = [line for line in lines(folder / "nucls") if line["encoder"] != "lemon_vits8_mild"]
    best = [{**line, "value": 0.99, "encoder": "late", "encoder_hash": "f" * 16}
            for line in some if line["encoder"] == HARD]  # fmt: skip
    rows = [*some, *best, *lines(folder / "hest")]
    rows += [{**row, "encoder": "twin", "encoder_hash": "e" * 16}
             for row in rows if row["encoder"] == "muse_vits16"]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = gather(Report(results=(str(tmp_path),), resamples=100))
    text = leaderboard(read.boards, read.everything, command="x").pages["leaderboard.html"]
    table = Page(text).of("Overview")[0]
    names = [row.cells[0].text for row in table.body]
    assert set(names[-3:-1]) == {"late", "lemon_vits8_mild"}
    late = table.body[names.index("late")].cells
    assert late[1].text == "1.0over 1 of 2" and late[2].text == "–"
    # Third and fourth of NuCLS, second and third of HEST: equal values share their ranks.
    pair = [table.body[names.index(name)].cells[1].key for name in ("twin", "muse_vits16")]
    assert pair == [3.0, 3.0]
    assert "Best mean rank: uni &lt;gated&gt;" in text


def test_cross_domain_matrix(folder: Path, page: Page) -> None:
    table = next(t for t in page.of("MIDOG++", "", "Across") if t.kind == "matrix")
    values = {line["metric"].partition("/")[2]: line["value"]
              for line in lines(folder / "midogpp-cross")
              if line["encoder"] == HARD and ">" in line["metric"]}  # fmt: skip
    across = [cell.text for cell in table.head[0].cells[1:]]
    assert across == sorted(material.DOMAINS)
    for row in table.body:
        for name, cell in zip(across, row.cells[1:], strict=True):
            assert cell.text == f"{values[f'{row.cells[0].text}>{name}']:.3f}"
            assert "background" in cell.attributes["style"] and "color" in cell.attributes["style"]
    shown = page.of("MIDOG++", "", "Across")[0]
    assert [c.text for c in shown.head[0].cells] == ["Encoder", "same domain", "other domains"]


def test_shades_can_be_read() -> None:
    for share in np.linspace(0, 1, 101):
        pair = [tuple(bytes.fromhex(colour[1:])) for colour in shade(float(share))]
        assert contrast(*pair) >= 4.5
    # Reference values of WCAG 2.1.
    assert contrast((255, 255, 255), (0, 0, 0)) == pytest.approx(21)
    assert contrast((255, 255, 255), (119, 119, 119)) == pytest.approx(4.48, abs=0.01)


def test_breakdowns_and_robustness(folder: Path, page: Page) -> None:
    by = next(t for t in page.of("NuCLS") if t.caption.endswith("by hospital."))
    assert [c.text for c in by.head[0].cells[1:]] == sorted(material.DOMAINS)
    line = next(row for row in lines(folder / "nucls")
                if row["metric"] == "balanced_accuracy/hospital=human melanoma"
                and (row["encoder"], row["probe"]) == ("lemon_vits8", "logistic"))  # fmt: skip
    row = next(r for r in by.body if r.cells[0].text == "lemon_vits8")
    assert row.cells[3].text == f"{line['value']:.3f}"
    robust = page.of("NuCLS", "", "Robustness")[0].head[0].cells
    assert [c.text for c in robust[1:3]] == ["purity, class", "purity, class, chance"]
    assert not any("robustness" in title for title in columns(main_table(page, "NuCLS")))
    genes = next(t for t in page.of("HEST") if t.head[0].cells[0].text == "Gene")
    assert set(genes.names()) == set(material.GENES)


def test_published_figures_stand_apart(page: Page) -> None:
    table = page.of("NuCLS", "", "Published")[0]
    assert len(table.body) == 6 and all("published" in name for name in table.names())
    encoder, _, _, setting, source, value = (cell.text for cell in table.body[0].cells)
    assert encoder.startswith("LEMON (a1)") and value == "0.784"
    assert "arXiv 2603.25802" in source and "40 px" in setting
    assert not any("published" in name for name in main_table(page, "NuCLS").names())


def test_page_needs_nothing_and_runs_only_its_own_script(made: Leaderboard, page: Page) -> None:
    text = made.pages["leaderboard.html"]
    assert all(link.startswith(("data:image/png", "#")) for link in page.links)
    assert not re.search(r"url\(|@import|https?://[^\s]*\.(js|css)", text)
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy and "default-src 'none'" in page.policy
    assert "<gated>" not in text and "&lt;gated&gt;" in text
    heads = [c for t in page.tables for row in t.head for c in row.cells if c.tag == "th"]
    assert all("scope" in cell.attributes for cell in heads)


def test_same_rows_give_the_same_bytes(read: Material, made: Leaderboard) -> None:
    again = leaderboard(read.boards, read.everything, command="lemon-muse report results=x")
    assert again.pages == made.pages
    assert [p.png for p in again.pictures] == [p.png for p in made.pictures]
    assert [p.name for p in made.pictures] == [f"leaderboard-{n}" for n in
                                               ("brcam2c", "hest", "midogpp", "nucls")]  # fmt: skip


def test_csv_holds_every_row_once(folder: Path, made: Leaderboard) -> None:
    found = list(csv.DictReader(io.StringIO(made.pages["leaderboard.csv"])))
    own = [row for row in found if row["kind"] != "published"]
    key = ("benchmark", "task", "encoder", "probe", "metric")
    shown = {tuple(row[k] for k in key): row for row in own}
    assert len(shown) == len(own)
    wanted: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines(folder):
        wanted.setdefault(tuple(line[k] for k in key), []).append(line)
    assert shown.keys() == wanted.keys()
    for place, group in wanted.items():
        mean = np.mean([line["value"] for line in group])
        assert float(shown[place]["value"]) == pytest.approx(mean, rel=1e-5)
        assert shown[place]["seeds"] == str(len(group))
    leads = [row for row in own if row["verdict"]]
    assert len(leads) == 4 * 10 and {row["kind"] for row in leads} == {"encoder"}
    assert {row["gmacs_of"] for row in own if row["encoder"] == "muse_vits16"} == {"window"}
    assert all(row["source"] and row["setting"] for row in found if row["kind"] == "published")
