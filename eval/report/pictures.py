"""Plots of the probe results: values with intervals, F1 of each class, confusion matrices."""

import textwrap
from typing import Any

import numpy as np

from eval.metrics import confusion
from eval.report.pairs import PAIRED
from eval.report.style import (
    ACCENT,
    FAINT,
    INK,
    MUTED,
    WIDTH,
    Picture,
    canvas,
    drawn,
    short,
)
from eval.report.tables import Board
from eval.report.words import METRIC_NAMES, listed, probe_words

_OTHERS = ("#0072B2", "#009E73", "#E69F00", "#56B4E9", "#D55E00")


def encoder_colour(board: Board, name: str) -> str:
    """The foreground encoder is plum, further encoders have colours, floors are grey."""
    if name not in board.encoders:
        return FAINT
    place = board.encoders.index(name)
    return ACCENT if place == 0 else _OTHERS[(place - 1) % len(_OTHERS)]


def dots_and_whiskers(board: Board, name: str) -> Picture | None:
    """Balanced accuracy and macro-F1 of every encoder and floor, one column of panels a probe."""
    metrics = [m for m in PAIRED if m in board.metrics()]
    probes = [p for p in board.probes if board.present(p)]
    if not metrics or not probes:
        return None
    rows = [n for n in board.names if any(n in board.present(p) for p in probes)]
    height = 60 + len(metrics) * (46 + 21 * len(rows))
    with canvas(WIDTH, height) as figure:
        grid = figure.subplots(len(metrics), len(probes), sharex="row", squeeze=False)
        for line, metric in zip(grid, metrics, strict=True):
            for ax, probe in zip(line, probes, strict=True):
                _whisker_panel(ax, board, rows, probe, metric)
                _name_rows(ax, board, rows if ax is line[0] else [])
        for ax, probe in zip(grid[0], probes, strict=True):
            ax.set_title(probe_words(probe))
        return drawn(figure, name, f"{_listed(metrics)} with 95 % intervals by encoder and probe.")


def _listed(metrics: list[str]) -> str:
    """'Balanced accuracy and macro-F1'."""
    text = listed([METRIC_NAMES[m] for m in metrics])
    return text[0].upper() + text[1:]


def _whisker_panel(ax: Any, board: Board, rows: list[str], probe: str, metric: str) -> None:
    for y, name in enumerate(rows):
        row = board.cells.get((name, probe, metric))
        if row is None or not np.isfinite(row.value):
            continue
        colour = encoder_colour(board, name)
        heavy = name in board.encoders
        if np.isfinite(row.ci_low) and np.isfinite(row.ci_high):
            width = 2.4 if heavy else 1.6
            ax.plot([row.ci_low, row.ci_high], [y, y], color=colour, lw=width, alpha=0.75)
        ax.plot(row.value, y, "o", color=colour, ms=6.5 if heavy else 5, mec="white", mew=0.8)
    floor = board.best(probe, metric, board.floors) if board.floors else None
    if floor:
        value = board.cells[floor, probe, metric].value
        ax.axvline(value, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(METRIC_NAMES[metric])
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)


def _name_rows(ax: Any, board: Board, rows: list[str]) -> None:
    ax.set_yticks(range(len(rows)), [short(board.words(n), 36) for n in rows])
    for tick, name in zip(ax.yaxis.get_major_ticks(), rows, strict=True):
        tick.label1.set_color(INK if name in board.encoders else MUTED)
        tick.label1.set_fontweight("bold" if [name] == board.encoders[:1] else "normal")


def class_f1(board: Board, name: str) -> Picture | None:
    """F1 of each class: the foreground encoder with its interval, floors as grey rings."""
    probes = [
        p for p in board.probes
        if any((n, p, f"f1/{c}") in board.cells for n in board.encoders[:1] for c in board.classes)
    ]  # fmt: skip
    if not probes or not board.encoders:
        return None
    with canvas(WIDTH, 62 + 24 * len(board.classes)) as figure:
        axes = figure.subplots(1, len(probes), sharey=True, sharex=True, squeeze=False)[0]
        for ax, probe in zip(axes, probes, strict=True):
            for y, cls in enumerate(board.classes):
                _class_line(ax, board, y, probe, cls)
            ax.set_title(probe_words(probe))
            ax.set_yticks(range(len(board.classes)), [short(c, 26) for c in board.classes])
            ax.set_ylim(len(board.classes) - 0.4, -0.6)
            ax.set_xlim(-0.02, 1.02)
            ax.set_xlabel("F1")
            ax.spines["left"].set_visible(False)
        return drawn(figure, name, "F1 of each class by probe, the encoder against the floors.")


def _class_line(ax: Any, board: Board, y: int, probe: str, cls: str) -> None:
    for floor in board.floors:
        row = board.cells.get((floor, probe, f"f1/{cls}"))
        if row:
            ax.plot(row.value, y, "o", mfc="white", mec=FAINT, mew=1.1, ms=4.5)
    row = board.cells.get((board.encoders[0], probe, f"f1/{cls}"))
    if row is None:
        return
    colour = board.colours[cls]
    ax.plot([row.ci_low, row.ci_high], [y, y], color=colour, lw=2.4, alpha=0.75)
    ax.plot(row.value, y, "o", color=colour, ms=6.5, mec="white", mew=0.8)


def confusions(board: Board, name: str) -> Picture | None:
    """Row-normalised confusion matrices of the foreground encoder, counts in the cells."""
    found = [
        (p, board.predictions[board.encoders[0], p])
        for p in board.probes
        if board.encoders and (board.encoders[0], p) in board.predictions
    ][:3]
    if not found:
        return None
    most = max(len(prediction.classes) for _, prediction in found)
    # Three classes need no larger cells than ten do; many classes need the width.
    across, widest = (3, 340) if most <= 8 else (2, 510) if most <= 12 else (1, 900)
    columns = min(len(found), across)
    rows = -(-len(found) // columns)
    side = min(widest, 120 + 56 * most)
    with canvas(min(WIDTH, side * columns + 60), side * rows) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for i, (ax, (probe, prediction)) in enumerate(zip(axes, found, strict=True)):
            k = len(prediction.classes)
            counts = confusion(prediction.labels, prediction.predicted, classes=k)
            _matrix(ax, counts, [_lines(c) for c in prediction.classes], first=i % columns == 0)
            ax.set_title(probe_words(probe), pad=8)
        return drawn(figure, name, "Confusion matrices: true class down, predicted class across.")


def _lines(name: str) -> str:
    """A class name on two lines at most, so that names side by side do not overlap."""
    return textwrap.fill(short(name, 24), 13, max_lines=2, placeholder="…")


def _matrix(ax: Any, counts: np.ndarray, classes: list[str], *, first: bool) -> None:
    total = counts.sum(1, keepdims=True)
    share = counts / np.maximum(total, 1)
    ax.imshow(share, cmap="Purples", vmin=0, vmax=1)
    small = len(classes) > 6
    for i, j in np.ndindex(*counts.shape):
        colour = "white" if share[i, j] > 0.55 else INK
        size = 6.5 if small else 8.5
        ax.text(j, i - 0.1, f"{100 * share[i, j]:.0f} %", ha="center", va="center", color=colour,
                fontsize=size, fontweight="bold" if i == j else "normal")  # fmt: skip
        ax.text(j, i + 0.2, f"{counts[i, j]:,}", ha="center", va="center", color=colour,
                fontsize=size - 1.5, alpha=0.85)  # fmt: skip
    ax.set_xticks(range(len(classes)), classes, rotation=45 if small else 0)
    ax.set_yticks(range(len(classes)), classes if first else [""] * len(classes))
    ax.set_xlabel("predicted")
    if first:
        ax.set_ylabel("true")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
