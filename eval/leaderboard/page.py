"""The leaderboard's page: overview, a section a benchmark, and how to read it."""

from eval.leaderboard.details import details
from eval.leaderboard.rows import Standing, unique
from eval.leaderboard.script import CSS, SCRIPT
from eval.leaderboard.table import columns_of, mean_ranks, overview, standing_table
from eval.leaderboard.words import benchmark_words, headline_words, title_of
from eval.report import html
from eval.report.page import shell
from eval.report.style import Picture
from eval.report.words import listed, number

FOOTER = (
    "Every value stands in leaderboard.csv, every table in leaderboard.tex; the pictures lie "
    "beside this page as PNG files."
)
_HOW = (
    "Values stand with their 95 % interval over patients where there is one seed, and as mean "
    "± standard deviation where there are several. The spread over seeds says how much "
    "chance there is in training the probe, not how much there is in the choice of patients.",
    "Lead: the headline value minus that of the best floor, with the interval of the paired "
    "difference (the same patients drawn for both) where the predictions of both lie beside the "
    "results; with several seeds the interval is that of the newest one.",
    "A floor is what is reached without pretraining: the majority class, colours, principal "
    "components of the pixels, or the same network with random weights. An encoder that is not "
    "above the best floor has shown nothing on that data.",
    "Protocol default is free of leaks: whole patients are held out and nothing is chosen on test. "
    "Protocol paper repeats a publication with its flaws, only to compare with its figures.",
    "GMAC: billions of multiply-accumulates of the forward pass, whose FLOPs are twice as many. "
    "Encoders that are read off a dense map spend them once a window, for all nuclei in it.",
)


def as_page(standings: list[Standing], pictures: dict[str, Picture], *, command: str) -> str:
    """The whole document.

    Args:
        standings: in the order in which tables shall stand within their benchmark.
        pictures: benchmark -> picture.
    """
    columns = columns_of(standings)
    parts = []
    if columns:
        parts.append(("overview", "Overview", _overview(columns)))
    for name in unique(sorted(s.board.benchmark for s in standings)):
        mine = [s for s in standings if s.board.benchmark == name]
        body = _benchmark(mine, pictures.get(name))
        parts.append((f"b-{html.slug(name)}", benchmark_words(name), body))
    how = "".join(html.paragraph(text) for text in _HOW) + html.code(command)
    parts.append(("how", "How to read this, and how to make it again", how))
    return shell(
        "Leaderboard", _top(standings, columns), parts, footer=FOOTER, css=CSS, script=SCRIPT
    )


def _top(standings: list[Standing], columns: list[Standing]) -> str:
    encoders = unique(e.name for s in standings for e in s.encoders)
    benchmarks = unique(s.board.benchmark for s in standings)
    pairs = [e.lead for s in columns for e in s.encoders if e.lead]
    below = sum(lead.verdict == "not above" for lead in pairs)
    unsure = sum(lead.verdict == "ahead" for lead in pairs)
    untested = sum(lead.verdict == "untested" for lead in pairs)
    says = [f"{_count(len(encoders), 'encoder')} on {_count(len(benchmarks), 'benchmark')}."]
    ranks = mean_ranks(columns)
    whole = {name: rank for name, (rank, count) in ranks.items() if count == len(columns)}
    if len(whole) > 1:
        first = min(whole.values())
        names = " and ".join(name for name, rank in whole.items() if rank == first)
        over = _count(len(columns), "table")
        says.append(f"Best mean rank: {names} ({number(first, 1)} over {over}).")
    if pairs:
        says.append(
            f"Of {len(pairs)} results, {below} do not beat the best floor; for {unsure} more the "
            f"lead may be chance, and for {untested} it could not be tested."
        )
    facts = [
        ("Encoders", str(len(encoders))),
        ("Benchmarks", ", ".join(benchmark_words(name) for name in benchmarks)),
        ("Tables", str(len(standings))),
        ("Seeds of a value, at most", str(_most_seeds(standings))),
    ]
    return "\n".join(
        [
            '<header><p class="eyebrow">Nucleus encoders</p>',
            "<h1>Leaderboard</h1>",
            html.paragraph(" ".join(says), "lead"),
            html.facts(facts),
            "</header>",
        ]
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _most_seeds(standings: list[Standing]) -> int:
    return max((c.seeds for s in standings for e in s.entries for c in e.cells.values()), default=0)


def _overview(columns: list[Standing]) -> str:
    text = (
        "One column a table: its headline value. Bold: the best encoder of a column. Ranks are "
        "taken among encoders; floors stand beneath."
    )
    return html.paragraph(text) + overview(columns)


def _benchmark(standings: list[Standing], picture: Picture | None) -> str:
    parts = []
    if picture:
        lacking = unique(
            e.words for s in standings for e in s.encoders if "gmacs" not in e.costs and s.headline
        )
        away = f" Not drawn, as their GMACs are not known: {listed(lacking)}." if lacking else ""
        caption = (
            "Value against cost. Dashed: the best floor of each kind. Bars: 95 % intervals, or one "
            "standard deviation over seeds. Up and to the left is better."
        )
        parts.append(html.figure(picture, caption + away))
    elif any(s.headline and s.encoders for s in standings):
        parts.append(
            html.missing("No row says how many GMACs an encoder needs, so there is no picture.")
        )
    for standing in standings:
        parts.append(f"<h3>{html.esc(title_of(standing, standings))}</h3>")
        parts.append(_facts(standing))
        parts.append(standing_table(standing))
        parts += [html.missing(note) for note in standing.board.notes]
        parts.append(details(standing))
    return "\n".join(part for part in parts if part)


def _facts(standing: Standing) -> str:
    """How many nuclei, which data, what ranks."""
    board = standing.board
    cells = [e.cells[standing.headline] for e in standing.entries
             if standing.headline and standing.headline in e.cells]  # fmt: skip
    counts = unique(f"{cell.n:,}" for cell in cells if cell.n)
    predicted = next(iter(board.predictions.values()), None)
    people = f", {len(set(predicted.patient))} patients" if predicted else ""
    nuclei = f"{' or '.join(counts)}{people}" if counts else ""
    return html.facts(
        [
            ("Nuclei scored", nuclei),
            ("Ranked by", headline_words(standing)),
            ("Version of the data", board.version),
        ]
    )
