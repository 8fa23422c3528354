"""The leaderboard as LaTeX: a booktabs table a standing, and one of published figures beneath."""

import math

from eval.leaderboard.details import published_metric
from eval.leaderboard.rows import Entry, Standing
from eval.leaderboard.words import (
    COST_NAMES,
    SHORT,
    benchmark_words,
    cost_words,
    headline_words,
    title_of,
)
from eval.report.html import slug
from eval.report.words import number, probe_words

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    # A bracket after a line's end or a command would be read as its optional argument.
    "[": "{[}", "]": "{]}",
    "µ": r"\textmu{}", "μ": r"\textmu{}", "±": r"\textpm{}", "×": r"\texttimes{}",
    "–": "--", "—": "---", "−": r"\textminus{}", "·": r"\textperiodcentered{}", "…": r"\dots{}",
    "\n": " ", "\t": " ",
}  # fmt: skip
_COSTS = ("parameters", "gmacs")
_TOP = """% Written by lemon-muse report. In the preamble of the document:
% \\usepackage[T1]{fontenc} \\usepackage{textcomp} \\usepackage{booktabs}
"""


def escape(text: str) -> str:
    """Text as LaTeX prints it; letters beyond ASCII stay as they are (UTF-8)."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def as_latex(standings: list[Standing]) -> str:
    """All tables with something to rank, benchmark by benchmark."""
    parts = [_TOP]
    shown: set[tuple[str, str]] = set()
    for standing in standings:
        if standing.headline is None:
            continue
        parts.append(_table(standing, standings))
        place = (standing.board.benchmark, standing.board.task)
        if standing.published and place not in shown:
            shown.add(place)
            parts.append(_published(standing))
    return "\n".join(parts)


def _table(standing: Standing, among: list[Standing]) -> str:
    probes = standing.probes()
    costs = [c for c in _COSTS if any(c in e.costs for e in standing.entries)]
    places = [(probe, metric) for probe, metrics in probes for metric in metrics]
    best = {place: standing.best(place) for place in places}
    first, rules, second = [""] * (1 + len(costs)), [], ["Encoder", *(COST_NAMES[c] for c in costs)]
    column = len(second) + 1
    for probe, metrics in probes:
        first.append(rf"\multicolumn{{{len(metrics)}}}{{c}}{{{escape(probe_words(probe))}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + len(metrics) - 1}}}")
        second += [SHORT.get(metric, metric) for metric in metrics]
        column += len(metrics)
    second.append("interval")
    first.append("")
    lines = [_line(standing, e, costs, places, best) for e in standing.encoders]
    floors = [_line(standing, e, costs, places, best) for e in standing.floors]
    body = [*lines, *([r"\midrule"] if lines and floors else []), *floors]
    board = standing.board
    what = escape(f"{benchmark_words(board.benchmark)}: {title_of(standing, among)}")
    caption = (
        f"{what}. Encoders, then floors, by {escape(headline_words(standing))}; its interval is "
        "the 95\\,\\% interval over patients, or the standard deviation over seeds. "
        r"Bold: the best of a column; \textdagger{}: not above the best floor."
    )
    label = slug("-".join(standing.key[:4]))
    return _environment(
        caption,
        label,
        "l" + "r" * (column - 1),
        [_row(first), "".join(rules), _row([escape(s) for s in second]), r"\midrule", *body],
    )


def _line(
    standing: Standing,
    entry: Entry,
    costs: list[str],
    places: list[tuple[str, str]],
    best: dict[tuple[str, str], float],
) -> str:
    below = entry.lead is not None and entry.lead.verdict == "not above"
    cells = [escape(entry.words) + (r"\textdagger{}" if below else "")]
    for name in costs:
        value = entry.costs.get(name, math.nan)
        cells.append(escape(cost_words(name, value, shared=entry.shared)))
    for place in places:
        value = entry.value(place)
        text = escape(number(value))
        cells.append(rf"\textbf{{{text}}}" if value == best[place] else text)
    cells.append(_interval(standing, entry))
    return _row(cells)


def _interval(standing: Standing, entry: Entry) -> str:
    cell = entry.cells.get(standing.headline) if standing.headline else None
    if cell is None:
        return ""
    if cell.seeds > 1:
        return escape(f"± {number(cell.sd)} ({cell.seeds} seeds)")
    known = math.isfinite(cell.low) and math.isfinite(cell.high)
    return escape(f"{number(cell.low)}–{number(cell.high)}") if known else ""


def _published(standing: Standing) -> str:
    lines = []
    for p in standing.published:
        metric = published_metric(standing, p.metric)
        cells = [p.encoder, probe_words(p.probe), metric, p.printed, p.setting, p.source]
        lines.append(_row([escape(cell) for cell in cells]))
    board = standing.board
    place = escape(f"{benchmark_words(board.benchmark)}, {board.task}")
    caption = (
        f"Published figures for {place}, as printed. Protocols differ from those of the other "
        "tables and among each other."
    )
    label = slug(f"published-{board.benchmark}-{board.task}")
    columns = r"lllrp{0.28\textwidth}p{0.24\textwidth}"
    head = _row(["Encoder", "Probe", "Metric", "Value", "Protocol and data", "Source"])
    return _environment(caption, label, columns, [head, r"\midrule", *lines])


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _environment(caption: str, label: str, columns: str, lines: list[str]) -> str:
    body = "\n".join(lines)
    return (
        "\\begin{table*}[t]\n\\centering\\small\n"
        f"\\caption{{{caption}}}\n\\label{{tab:{label}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n"
        "\\end{tabular}\n\\end{table*}\n"
    )
