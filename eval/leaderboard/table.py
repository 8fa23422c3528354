"""The tables of the leaderboard as HTML: one of each standing, and the overview over all."""

import math
from collections.abc import Sequence

from eval.leaderboard.rows import COSTS, Cell, Entry, Standing
from eval.leaderboard.words import (
    COST_NAMES,
    SHORT,
    VERDICTS,
    benchmark_words,
    cost_words,
    headline_words,
    task_words,
)
from eval.report import html
from eval.report.words import DASH, interval, number, probe_words, signed

_CLASS = {"above": "v-above", "ahead": "v-ahead", "untested": "v-ahead", "not above": "v-not"}
_SHORT = {
    "ahead": "lead may be chance",
    "untested": "lead not tested",
    "not above": "not above floor",
}


def standing_table(standing: Standing) -> str:
    """Encoders and floors in one order, sortable; '' where no probe was measured."""
    probes = standing.probes()
    if not probes:
        return ""
    costs = [c for c in COSTS if any(c in e.costs for e in standing.entries)]
    leads = standing.best_floor is not None and bool(standing.encoders)
    places = [(probe, metric) for probe, metrics in probes for metric in metrics]
    best = {place: standing.best(place) for place in places}
    lines = []
    for entry in standing.entries:
        cells = [cost_cell(entry, name) for name in costs]
        cells += [cell_of(entry.cells.get(p), best=entry.value(p) == best[p]) for p in places]
        cells += [_lead_cell(entry, standing)] if leads else []
        lines.append(
            f"<tr{_row_class(entry, standing)}>{_name(entry, standing)}{''.join(cells)}</tr>"
        )
    caption = f"Sorted by {headline_words(standing)}." if standing.headline else ""
    if any(cell.seeds > 1 for entry in standing.entries for cell in entry.cells.values()):
        caption += " ±: standard deviation over seeds, their number in brackets."
    head = _head(standing, costs, probes, leads)
    return (
        f'<div class="scroll"><table class="sortable"><caption>{html.esc(caption)}</caption>'
        f"<thead>{head}</thead>\n<tbody>{chr(10).join(lines)}</tbody></table></div>"
    )


def _head(
    standing: Standing, costs: list[str], probes: list[tuple[str, list[str]]], leads: bool
) -> str:
    """Two lines: probes over their metrics; all other columns through both."""
    first = ['<th scope="col" rowspan="2" data-col="0">Encoder</th>']
    second, column = [], 1
    for name in costs:
        first.append(_sortable(COST_NAMES[name], column, ' rowspan="2"'))
        column += 1
    for probe, metrics in probes:
        words = html.esc(probe_words(probe))
        first.append(f'<th scope="colgroup" colspan="{len(metrics)}">{words}</th>')
        for metric in metrics:
            here = (probe, metric) == standing.headline
            sort = ' aria-sort="descending"' if here else ""
            second.append(_sortable(SHORT.get(metric, metric), column, sort))
            column += 1
    if leads:
        first.append(_sortable("Lead over the best floor", column, ' rowspan="2"'))
    return f"<tr>{''.join(first)}</tr><tr>{''.join(second)}</tr>"


def _sortable(title: str, column: int, more: str = "") -> str:
    return f'<th scope="col" class="num" data-col="{column}"{more}>{html.esc(title)}</th>'


def _row_class(entry: Entry, standing: Standing) -> str:
    kinds = ["floor-row"] if entry.is_floor else []
    kinds += ["best-floor"] if entry is standing.best_floor else []
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _name(entry: Entry, standing: Standing) -> str:
    tag = ""
    if entry.is_floor:
        word = "best floor" if entry is standing.best_floor else "floor"
        tag = f'<span class="tag">{word}</span>'
    elif entry.lead and entry.lead.verdict == "not above":
        tag = '<span class="tag v-not">not above the best floor</span>'
    title = html.esc(f"{entry.name} {entry.hash}".strip())
    return f'<th scope="row" title="{title}">{html.esc(entry.words)}{tag}</th>'


def _td(value: float, content: str) -> str:
    """A numeric cell: `data-v` is what the script sorts by, empty where there is no value."""
    key = repr(float(value)) if math.isfinite(value) else ""
    return f'<td class="num" data-v="{key}">{content}</td>'


def cost_cell(entry: Entry, name: str) -> str:
    value = entry.costs.get(name, math.nan)
    return _td(value, html.esc(cost_words(name, value, shared=entry.shared)))


def cell_of(cell: Cell | None, *, best: bool = False) -> str:
    """A value with its interval, or with its spread over seeds."""
    if cell is None:
        return _td(math.nan, DASH)
    return _td(cell.value, html.value_cell(number(cell.value), bounds(cell), best=best))


def bounds(cell: Cell) -> str:
    """'[0.58, 0.64]', or '± 0.004 (3)': standard deviation over seeds, and how many."""
    if cell.seeds > 1:
        return f"± {number(cell.sd)} ({cell.seeds})"
    return interval(cell.low, cell.high)


def _lead_cell(entry: Entry, standing: Standing) -> str:
    lead = entry.lead
    if lead is None:
        return _td(math.nan, "")
    limits = interval(lead.low, lead.high, sign=True)
    cell = entry.cells[standing.headline] if standing.headline else None
    if limits and cell and cell.seeds > 1:
        limits = f"newest seed: {limits}"
    words = f'<span class="say {_CLASS[lead.verdict]}">{html.esc(VERDICTS[lead.verdict])}</span>'
    return _td(lead.value, html.value_cell(signed(lead.value), limits) + words)


def columns_of(standings: Sequence[Standing]) -> list[Standing]:
    """What the overview ranks: default protocol and test, where there is any such table."""
    ranked = [s for s in standings if s.headline and s.encoders]
    for wanted in (lambda s: s.board.protocol != "paper", lambda s: s.board.split != "val"):
        chosen = [s for s in ranked if wanted(s)]
        ranked = chosen or ranked
    return ranked


def mean_ranks(columns: Sequence[Standing]) -> dict[str, tuple[float, int]]:
    """Mean rank among encoders (1 = best, equal values share) and over how many columns."""
    ranks: dict[str, list[float]] = {}
    for standing in columns:
        values = {e.name: e.value(standing.headline) for e in standing.encoders}
        values = {name: v for name, v in values.items() if math.isfinite(v)}
        for name, value in values.items():
            above = sum(other > value for other in values.values())
            equal = sum(other == value for other in values.values())
            ranks.setdefault(name, []).append(above + (equal + 1) / 2)
    return {name: (sum(found) / len(found), len(found)) for name, found in ranks.items()}


def overview(columns: list[Standing]) -> str:
    """Encoders by mean rank, a column a table; the best floor of each column beneath."""
    ranks = mean_ranks(columns)
    # A mean over fewer columns is no match for one over all.
    names = sorted(ranks, key=lambda n: (-ranks[n][1], ranks[n][0], n))
    lines = []
    for name in names:
        rank, count = ranks[name]
        some = "" if count == len(columns) else f"over {count} of {len(columns)}"
        cells = [_td(rank, html.value_cell(number(rank, 1), some))]
        words = name
        for standing in columns:
            entry = next((e for e in standing.encoders if e.name == name), None)
            words = entry.words if entry else words
            cells.append(_short_cell(entry, standing))
        head = f'<th scope="row">{html.esc(words)}</th>'
        lines.append(f"<tr>{head}{''.join(cells)}</tr>")
    floors = [_floor_cell(standing) for standing in columns]
    foot = f'<tr class="floor-row"><th scope="row">best floor</th><td></td>{"".join(floors)}</tr>'
    top = [
        '<th scope="col" data-col="0">Encoder</th>',
        '<th scope="col" class="num" data-col="1" aria-sort="ascending">Mean rank</th>',
    ]
    for i, standing in enumerate(columns, start=2):
        top.append(_overview_head(standing, i))
    return (
        '<div class="scroll"><table class="sortable"><caption>Sorted by mean rank among encoders.'
        f"</caption><thead><tr>{''.join(top)}</tr></thead>\n<tbody>{chr(10).join(lines)}</tbody>"
        f"<tfoot>{foot}</tfoot></table></div>"
    )


def _overview_head(standing: Standing, column: int) -> str:
    board = standing.board
    place = f"{benchmark_words(board.benchmark)}, {task_words(board.task)}".rstrip(", ")
    what = html.esc(headline_words(standing))
    name = html.esc(place)
    return (
        f'<th scope="col" class="num" data-col="{column}">{name}<span class="ci">{what}</span></th>'
    )


def _short_cell(entry: Entry | None, standing: Standing) -> str:
    value = entry.value(standing.headline) if entry else math.nan
    if entry is None or not math.isfinite(value):
        return _td(math.nan, DASH)
    verdict = entry.lead.verdict if entry.lead else "above"
    short = _SHORT.get(verdict, "")
    best = max(e.value(standing.headline) for e in standing.encoders
               if math.isfinite(e.value(standing.headline)))  # fmt: skip
    content = html.value_cell(number(value), "", best=value == best)
    note = f'<span class="say {_CLASS[verdict]}">{short}</span>' if short else ""
    return _td(value, content + note)


def _floor_cell(standing: Standing) -> str:
    floor = standing.best_floor
    if floor is None:
        return _td(math.nan, DASH)
    value = floor.value(standing.headline)
    return _td(value, html.value_cell(number(value), floor.words))
