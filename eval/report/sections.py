"""The sections of the page that come from result rows and the run folder."""

from collections.abc import Sequence

import numpy as np

from eval.report import html
from eval.report.inputs import Row, RunFolder
from eval.report.pairs import PAIRED
from eval.report.style import Picture
from eval.report.tables import Board
from eval.report.verdict import headline, score_lines, verdicts
from eval.report.words import (
    METRIC_NAMES,
    interval,
    metric_words,
    number,
    probe_words,
    signed,
)


def header(title: str, board: Board, facts: Sequence[tuple[str, str]]) -> str:
    """Title, verdict, what was measured, and one card a probe."""
    cards = []
    for verdict in verdicts(board):
        big, scores = score_lines(board, verdict.probe)
        of = "".join(f"<div>{html.esc(line)}</div>" for line in scores)
        gaps = "".join(f"<li>{html.esc(line)}</li>" for line in verdict.lines)
        cards.append(
            f'<div class="card {verdict.state}"><h3>{html.esc(probe_words(verdict.probe))}</h3>'
            f'<div class="big">{html.esc(big)}</div><div class="of">{of}</div>'
            f'<p class="state">{html.esc(verdict.sentence)}</p><ul>{gaps}</ul>'
            f"<p>{html.esc(verdict.rest)}</p></div>"
        )
    return "\n".join(
        [
            '<header><p class="eyebrow">Nucleus encoder report</p>',
            f"<h1>{html.esc(title)}</h1>",
            html.paragraph(headline(board), "lead"),
            html.facts(facts),
            f'<div class="cards">{"".join(cards)}</div></header>',
        ]
    )


def curves(folder: RunFolder | None, picture: Picture | None) -> str:
    """Learning curves and the last values of a run."""
    if folder is None:
        return html.missing("No run folder was given (run=), so there are no learning curves.")
    if picture is None:
        return html.missing("metrics.jsonl holds none of the quantities that are drawn here.")
    last = {key: float(values[-1]) for key, (_, values) in folder.metrics.items()}
    steps = max(float(s[-1]) for s, _ in folder.metrics.values())
    pairs = [("Steps", f"{steps:,.0f}")]
    if "loss" in last:
        chance = f" (chance {number(last['chance'])})" if "chance" in last else ""
        pairs.append(("Last loss", f"{number(last['loss'])}{chance}"))
    if "effective_rank" in last:
        pairs.append(("Last effective rank", number(last["effective_rank"], 1)))
    if "crops_per_s" in folder.metrics:
        median = float(np.nanmedian(folder.metrics["crops_per_s"][1]))
        pairs.append(("Median throughput", f"{median:,.0f} crops/s"))
    if "data_wait" in folder.metrics:
        share = float(np.nanmedian(folder.metrics["data_wait"][1])) * 100
        pairs.append(("Median wait for data", f"{number(share, 1)} %"))
    if "mfu" in folder.metrics:
        share = float(np.nanmedian(folder.metrics["mfu"][1])) * 100
        pairs.append(("Median FLOPs utilisation", f"{number(share, 1)} %"))
    caption = (
        "A healthy run leaves the chance level (dashed) early, keeps the standard deviation and "
        "the effective rank of its features well above zero, and hardly waits for data. "
        "Pale lines are the logged values, dark ones a running mean."
    )
    beware = (
        "a falling loss alone does not mean better features, the online probe does; it is measured "
        "on held-out patients of the pretraining data, not on the test patients below."
    )
    notes = "".join(html.paragraph(note, "missing") for note in folder.notes)
    return html.facts(pairs) + html.figure(picture, caption, warn=beware) + notes


def probe_table(board: Board) -> str:
    """Encoders and floors by probe: 95 % intervals beneath, best bold, differences right."""
    metrics = board.metrics()
    paired = [m for m in PAIRED if m in metrics] if board.floors and board.encoders else []
    head = ["Encoder or floor", *(METRIC_NAMES[m] for m in metrics)]
    head += [f"lead, {METRIC_NAMES[m]}" for m in paired]
    groups = []
    for probe in board.probes:
        names = board.present(probe)
        best = {m: board.best(probe, m) for m in metrics}
        lines = []
        for name in names:
            ours = name in board.encoders
            line = [f'<span class="{"ours" if ours else "floor"}" title="{html.esc(name)}">'
                    f"{html.esc(board.words(name))}</span>"]  # fmt: skip
            for metric in metrics:
                row = board.cells.get((name, probe, metric))
                value, bounds = ("", "") if row is None else (
                    number(row.value), interval(row.ci_low, row.ci_high))  # fmt: skip
                line.append(html.value_cell(value, bounds, best=best[metric] == name))
            for metric in paired:
                gap = board.lead(name, probe, metric)
                line.append(
                    html.value_cell(signed(gap.value), interval(gap.low, gap.high, sign=True))
                    if gap
                    else ""
                )
            lines.append(line)
        if lines:
            groups.append((probe_words(probe), lines))
    return html.table(head, groups)


def probe_notes(board: Board) -> str:
    """How to read the table: what the intervals are, and which are missing."""
    text = (
        "In brackets: 95 % intervals. Bold: the best of the column. "
        "Lead: in an encoder's line its lead over the best floor; in a floor's line the lead of "
        f"{board.encoders[0] if board.encoders else 'the encoder'} over that floor. Where the "
        "predictions of both are there, the lead has an interval: patients are drawn with "
        "replacement and both are scored on the same draw, which is sharper than comparing two "
        "separate intervals."
    )
    if board.differences and not any(np.isfinite(d.low) for d in board.differences):
        text += " Here the predictions are missing, so the differences have no intervals."
    notes = "".join(html.missing(note) for note in board.notes)
    return html.paragraph(text) + notes


def class_table(board: Board) -> str:
    """F1 of each class for the foreground encoder, and beneath it the best floor's."""
    encoder = board.encoders[0]
    probes = [
        p
        for p in board.probes
        if any((encoder, p, f"f1/{c}") in board.cells for c in board.classes)
    ]
    if not probes:
        return ""
    head = ["Class"]
    for probe in probes:
        head += [f"{probe_words(probe)}: F1", "best floor"]
    lines = []
    for cls in board.classes:
        line = [html.swatch(board.colours[cls], cls)]
        for probe in probes:
            metric = f"f1/{cls}"
            row = board.cells.get((encoder, probe, metric))
            floor = board.best(probe, metric, board.floors) if board.floors else None
            other = board.cells[floor, probe, metric] if floor else None
            ahead = row is not None and (other is None or row.value > other.value)
            line.append(
                html.value_cell(number(row.value), interval(row.ci_low, row.ci_high), best=ahead)
                if row
                else ""
            )
            line.append(
                html.value_cell(number(other.value), board.words(floor or ""), best=not ahead)
                if other
                else ""
            )
        lines.append(line)
    return html.table(head, [("", lines)])


def gene_table(board: Board) -> str:
    """Pearson's r of each gene for the foreground encoder, highest first, beside the best floor."""
    encoder = board.encoders[0]
    groups = []
    for probe in board.probes:
        found = {m: row for (n, p, m), row in board.cells.items()
                 if (n, p) == (encoder, probe) and m.startswith("pearson/")}  # fmt: skip
        floor = board.best(probe, "pearson", board.floors) if board.floors else None
        lines = []
        for metric, row in sorted(found.items(), key=lambda pair: -pair[1].value):
            other = board.cells.get((floor or "", probe, metric))
            own = html.value_cell(number(row.value), interval(row.ci_low, row.ci_high))
            beside = html.value_cell(number(other.value), "") if other else ""
            lines.append([html.esc(metric.partition("/")[2]), own, beside])
        if lines:
            best = f"; best floor: {board.words(floor)}" if floor else ""
            groups.append((f"{probe_words(probe)}{best}", lines))
    if not groups:
        return html.missing("The results hold no values of single genes.")
    return html.table(["Gene", f"Pearson's r of {encoder}", "best floor"], groups)


def all_numbers(rows: list[Row]) -> str:
    """Every row of the result files, folded away."""
    head = [
        "Benchmark",
        "Encoder",
        "Probe",
        "Split",
        "Metric",
        "Value",
        "95 % interval",
        "n",
        "Seed",
    ]
    lines = []
    for row in rows:
        place = " · ".join(p for p in (row.benchmark, row.task, row.protocol) if p)
        name = f"{row.encoder} {row.encoder_hash[:8]}".strip()
        texts = [place, name, row.probe, row.split, metric_words(row.metric)]
        numbers = [number(row.value, 4), interval(row.ci_low, row.ci_high), f"{row.n:,}", row.seed]
        lines.append([html.esc(t) for t in [*texts, *numbers]])
    return html.folded(f"All {len(rows):,} rows", html.table(head, [("", lines)], text_columns=5))
