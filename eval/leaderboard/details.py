"""What stands beneath a table of the leaderboard: matrices, breakdowns, robustness, published."""

import math
from collections.abc import Callable, Sequence

from eval.leaderboard.rows import ROBUSTNESS, SHOWN, Cell, Entry, Standing, unique
from eval.leaderboard.table import bounds
from eval.leaderboard.words import SHORT
from eval.report import html
from eval.report.words import DASH, METRIC_NAMES, metric_words, number, probe_words

Lookup = Callable[[Entry], Cell | None]
PUBLISHED_NOTE = (
    "Published figures, as printed. Their protocols differ from those here and among each other "
    "(windows, splits, probes, what was chosen on test): they are for orientation, not for ranking."
)
# Ends of the scale of a matrix: both ink colours keep a contrast of 4.5 and more on every shade.
_PALE, _DEEP = (247, 242, 250), (84, 39, 136)


def details(standing: Standing) -> str:
    """Everything beneath the table, what is long folded away."""
    parts = [cross_domain(standing), *by_group(standing), classes(standing), genes(standing),
             folds(standing), robustness(standing), published(standing)]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _ranked(standing: Standing, probe: str) -> list[Entry]:
    """Encoders, then the best floor: rows of the small tables."""
    best = standing.best_floor
    some = [*standing.encoders, *([best] if best else [])]
    if probe == ROBUSTNESS:
        some = standing.entries
    return [e for e in some if any(p == probe for p, _ in e.cells)]


def _name(entry: Entry) -> str:
    tag = '<span class="tag">floor</span>' if entry.is_floor else ""
    return f"{html.esc(entry.words)}{tag}"


def _grid(entries: Sequence[Entry], columns: Sequence[tuple[str, Lookup]], caption: str) -> str:
    """A table of values: a line an entry."""
    head = "".join(f'<th scope="col" class="num" data-col="{i}">{html.esc(title)}</th>'
                   for i, (title, _) in enumerate(columns, start=1))  # fmt: skip
    lines = []
    for entry in entries:
        cells = []
        for _, look in columns:
            cell = look(entry)
            key = repr(cell.value) if cell else ""
            text = html.value_cell(number(cell.value), bounds(cell)) if cell else DASH
            cells.append(f'<td class="num" data-v="{key}">{text}</td>')
        kind = ' class="floor-row"' if entry.is_floor else ""
        lines.append(f'<tr{kind}><th scope="row">{_name(entry)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="sortable"><caption>{html.esc(caption)}</caption>'
        f'<thead><tr><th scope="col" data-col="0">Encoder</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _at(place: tuple[str, str]) -> Lookup:
    return lambda entry: entry.cells.get(place)


def parts_of(standing: Standing) -> list[str]:
    """What stands behind 'metric/' under the headline's probe and metric, in order of rows."""
    if standing.headline is None:
        return []
    probe, metric = standing.headline
    start = f"{metric}/"
    found = [m for e in standing.entries for p, m in e.cells if p == probe and m.startswith(start)]
    return [name.removeprefix(start) for name in unique(found)]


def cross_domain(standing: Standing) -> str:
    """In and out of domain, and for each encoder what training on A gives on B."""
    if standing.headline is None or " cross:" not in standing.board.task:
        return ""
    probe, metric = standing.headline
    pairs = [tuple(p.split(">", 1)) for p in parts_of(standing) if ">" in p]
    domains = sorted({name for pair in pairs for name in pair})
    entries = _ranked(standing, probe)
    if not domains:
        return ""
    inside: Lookup = _at((probe, f"{metric}/in_domain"))
    columns: list[tuple[str, Lookup]] = [("same domain", inside),
                                         ("other domains", _at((probe, metric)))]  # fmt: skip
    out = ["<h4>Across domains</h4>"]
    if any(inside(e) for e in entries):
        caption = (
            f"{metric_words(metric)}, {probe_words(probe, inside=True)}: on held-out nuclei of the "
            "domain that was trained on, and on those of all others."
        )
        out.append(_grid(entries, columns, caption))
    tables = [
        html.paragraph(f"Trained on (down), tested on (across): {entry.words}")
        + _matrix(entry, domains, probe, metric)
        for entry in entries
    ]
    out += tables[:1]
    if len(tables) > 1:
        out.append(html.folded(f"The {len(tables) - 1} others", "\n".join(tables[1:])))
    return "\n".join(out)


def _matrix(entry: Entry, domains: list[str], probe: str, metric: str) -> str:
    cells = {(a, b): entry.value((probe, f"{metric}/{a}>{b}")) for a in domains for b in domains}
    known = [value for value in cells.values() if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    head = "".join(f'<th scope="col">{html.esc(b)}</th>' for b in domains)
    lines = []
    for a in domains:
        shown = "".join(_shade(cells[a, b], low, high, own=a == b) for b in domains)
        lines.append(f'<tr><th scope="row">{html.esc(a)}</th>{shown}</tr>')
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _shade(value: float, low: float, high: float, *, own: bool) -> str:
    if not math.isfinite(value):
        return f"<td>{DASH}</td>"
    share = (value - low) / (high - low) if high > low else 0.0
    back, ink = shade(share)
    text = f"<strong>{number(value)}</strong>" if own else number(value)
    return f'<td style="background:{back};color:{ink}">{text}</td>'


def shade(share: float) -> tuple[str, str]:
    """Background and ink, '#rrggbb', of a value at a share 0 … 1 of the scale."""
    back = [round(a + (b - a) * share) for a, b in zip(_PALE, _DEEP, strict=True)]
    dark, light = (0, 0, 0), (255, 255, 255)
    ink = dark if contrast(back, dark) >= contrast(back, light) else light
    return f"#{bytes(back).hex()}", f"#{bytes(ink).hex()}"


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """Contrast ratio of two sRGB colours, 1 … 21 (WCAG 2.1)."""

    def light(colour: Sequence[int]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    bright, dim = sorted((light(first), light(second)), reverse=True)
    return bright / dim


def by_group(standing: Standing) -> list[str]:
    """A folded table for each column of the data that the nuclei are broken down by."""
    if standing.headline is None:
        return []
    probe, metric = standing.headline
    groups: dict[str, list[str]] = {}
    for part in parts_of(standing):
        by, found, value = part.partition("=")
        if found:
            groups.setdefault(by, []).append(value)
    out = []
    for by, values in groups.items():
        columns = [(value, _at((probe, f"{metric}/{by}={value}"))) for value in sorted(values)]
        caption = f"{metric_words(metric)}, {probe_words(probe, inside=True)}, by {by}."
        out.append(html.folded(f"By {by}", _grid(_ranked(standing, probe), columns, caption)))
    return out


def classes(standing: Standing) -> str:
    """F1 of each class under the headline's probe, folded."""
    if standing.headline is None or not standing.board.classes:
        return ""
    probe = standing.headline[0]
    columns = [(name, _at((probe, f"f1/{name}"))) for name in standing.board.classes]
    caption = f"F1, {probe_words(probe, inside=True)}."
    return html.folded("By class", _grid(_ranked(standing, probe), columns, caption))


def genes(standing: Standing) -> str:
    """Correlation of each gene, folded: genes down, encoders across."""
    if standing.headline is None or standing.headline[1] != "pearson":
        return ""
    probe = standing.headline[0]
    entries = _ranked(standing, probe)
    names = [p for p in parts_of(standing) if "=" not in p and not p.startswith("fold_")]
    if not names or not entries:
        return ""

    def value(entry: Entry, gene: str) -> float:
        return entry.value((probe, f"pearson/{gene}"))

    lines = []
    for gene in sorted(names, key=lambda g: (-_known(value(entries[0], g)), g)):
        lines.append([html.esc(gene), *(html.esc(number(value(e, gene))) for e in entries)])
    table = html.table(["Gene", *(e.words for e in entries)], [("", lines)])
    return html.folded(f"By gene ({len(names)})", table)


def _known(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def folds(standing: Standing) -> str:
    """Mean and standard deviation over folds, as some papers report them, folded."""
    if standing.headline is None:
        return ""
    probe = standing.headline[0]
    entries = _ranked(standing, probe)
    metrics = [m for m in SHOWN if standing.has(probe, f"{m}/fold_mean")]
    if not metrics:
        return ""
    lines = []
    for entry in entries:
        line = [_name(entry)]
        for metric in metrics:
            pair = [entry.value((probe, f"{metric}/fold_{what}")) for what in ("mean", "sd")]
            known = math.isfinite(pair[0])
            line.append(html.esc(f"{number(pair[0])} ± {number(pair[1])}") if known else DASH)
        lines.append(line)
    head = ["Encoder", *(METRIC_NAMES.get(m, m) for m in metrics)]
    title = f"Mean ± standard deviation over folds, {probe_words(probe, inside=True)}"
    return html.folded(title, html.table(head, [("", lines)]))


def robustness(standing: Standing) -> str:
    """How much of the features is site, scanner or stain."""
    entries = _ranked(standing, ROBUSTNESS)
    names = unique(m for e in entries for p, m in e.cells if p == ROBUSTNESS)
    if not names:
        return ""
    columns = [
        (name.replace("_", " ").replace("/", ", "), _at((ROBUSTNESS, name))) for name in names
    ]
    note = (
        "Purity: share of nearest neighbours of the same class, or of the same group (hospital, "
        "scanner, domain), with its level by chance. Index: neighbours that share the class and "
        "not the group, among those that share only one of the two; 1 is best. Stain: how "
        "features hold when the same nuclei are stained anew."
    )
    table = _grid(entries, columns, "Measures on the features themselves; no probe.")
    return f"<h4>Robustness</h4>{html.paragraph(note)}{table}"


def published(standing: Standing) -> str:
    """Published figures in a group of their own."""
    if not standing.published:
        return ""
    lines = []
    for p in standing.published:
        line = [f'{html.esc(p.encoder)}<span class="tag">published</span>']
        line += [html.esc(probe_words(p.probe)), html.esc(published_metric(standing, p.metric))]
        line += [html.esc(p.setting), html.esc(p.source), html.esc(p.printed)]
        lines.append(line)
    head = ["Encoder", "Probe", "Metric", "Protocol and data", "Source", "Value"]
    table = html.table(head, [("", lines)], text_columns=5)
    if len(lines) > 12:
        table = html.folded(f"All {len(lines)} published figures", table)
    return f"<h4>Published figures</h4>{html.paragraph(PUBLISHED_NOTE)}{table}"


def published_metric(standing: Standing, metric: str) -> str:
    """'AUROC, other domains' where the task trains on one domain."""
    base, _, part = metric.partition("/")
    words = METRIC_NAMES.get(base, SHORT.get(base, base))
    if " cross:" not in standing.board.task:
        return words
    return f"{words}, {'same domain' if part == 'in_domain' else 'other domains'}"
