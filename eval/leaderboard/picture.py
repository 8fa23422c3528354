"""Accuracy against cost: one picture a benchmark, a panel a table, as in the LEMON paper."""

import math
from typing import Any

from eval.leaderboard.labels import place_labels, spread
from eval.leaderboard.rows import Entry, Standing
from eval.leaderboard.words import benchmark_words, task_words
from eval.report.html import slug
from eval.report.style import ACCENT, INK, MUTED, WIDTH, Picture, canvas, drawn, short
from eval.report.words import METRIC_NAMES, number, probe_words

_COLOURS = (ACCENT, "#0072B2", "#009E73", "#B87400", "#D55E00", "#332288", "#117733", "#6B5B95",
            "#1F8A9E", "#7A4B2A", "#556B2F", "#444B57")  # fmt: skip


def picture_of(standings: list[Standing], benchmark: str) -> Picture | None:
    """The picture of one benchmark; None where no encoder has both a value and GMACs.

    Where there is a table of the default protocol, those of published protocols are not drawn.
    """
    mine = [s for s in standings if s.board.benchmark == benchmark and _points(s)]
    chosen = [s for s in mine if s.board.protocol != "paper"] or mine
    if not chosen:
        return None
    names = sorted({e.name for s in chosen for e, _, _ in _points(s)})
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    across = 1 if len(chosen) == 1 else 2
    down = -(-len(chosen) // across)
    with canvas(WIDTH if across == 2 else 0.75 * WIDTH, 370 * down) as figure:
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for ax, standing in zip(axes, chosen, strict=False):
            _panel(ax, standing, colours)
        for ax in axes[len(chosen) :]:
            ax.set_axis_off()
        figure.draw_without_rendering()
        for ax, standing in zip(axes, chosen, strict=False):
            _name_floors(ax, standing)
        # The names beside the panels take room: lay out again, and only then measure labels.
        figure.draw_without_rendering()
        for ax, standing in zip(axes, chosen, strict=False):
            _name_points(ax, standing)
        # A second layout would move the axes under the labels that have been placed.
        figure.set_layout_engine("none")
        alt = (
            f"{benchmark_words(benchmark)}: value of each encoder against multiply-accumulates a "
            "nucleus, floors as horizontal lines."
        )
        return drawn(figure, f"leaderboard-{slug(benchmark)}", alt)


def _points(standing: Standing) -> list[tuple[Entry, float, float]]:
    """Encoders with a headline value and GMACs: (entry, GMAC, value)."""
    found = []
    for entry in standing.encoders:
        cost, value = entry.costs.get("gmacs", math.nan), entry.value(standing.headline)
        if math.isfinite(cost) and math.isfinite(value):
            found.append((entry, cost, value))
    return found


def _floors(standing: Standing) -> list[tuple[Entry, float]]:
    """The best floor of each kind, best first: a sweep has a random network for every encoder."""
    kinds: dict[str, tuple[Entry, float]] = {}
    for floor in standing.floors:
        value = floor.value(standing.headline)
        kind = "random" if floor.name.startswith("random:") else floor.name.partition("@")[0]
        if math.isfinite(value):
            kinds.setdefault(kind, (floor, value))
    return list(kinds.values())


def _bars(standing: Standing, entry: Entry) -> tuple[float, float]:
    """Interval, or value ± standard deviation over seeds; NaN where neither is known."""
    cell = entry.cells[standing.headline] if standing.headline else None
    if cell is None:
        return math.nan, math.nan
    return (cell.value - cell.sd, cell.value + cell.sd) if cell.seeds > 1 else (cell.low, cell.high)


def _panel(ax: Any, standing: Standing, colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = _points(standing)
    for entry, cost, value in points:
        low, high = _bars(standing, entry)
        colour = colours[entry.name]
        if math.isfinite(low) and math.isfinite(high):
            ax.plot([cost, cost], [low, high], color=colour, lw=1.4, alpha=0.35, zorder=2)
        face = "white" if entry.shared else colour
        ax.plot(cost, value, "o", ms=6.5, mfc=face, mec=colour, mew=1.4, zorder=3)
    ax.set_xscale("log")
    costs = [cost for _, cost, _ in points]
    # At least a factor of ten: a narrower log axis has too few ticks to be read.
    low, high = min(costs) / 1.6, max(costs) * 1.6
    wider = max(1.0, 10 / (high / low)) ** 0.5
    ax.set_xlim(low / wider, high * wider)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(*_limits(standing))
    for floor, value in _floors(standing):
        best = floor is standing.best_floor
        ax.axhline(value, color=MUTED, lw=1.1 if best else 0.7, alpha=1 if best else 0.5,
                   ls=(0, (4, 3)), zorder=1)  # fmt: skip
    probe, metric = standing.headline or ("", "")
    board = standing.board
    name = task_words(board.task) or benchmark_words(board.benchmark)
    ax.set_title(short(f"{name} ({board.protocol})" if board.protocol else name, 64))
    shared = {entry.shared for entry, _, _ in points}
    note = " (rings: per window, which nuclei share)" if shared == {True, False} else ""
    ax.set_xlabel(f"GMAC per {'window' if shared == {True} else 'nucleus'}{note}")
    ax.set_ylabel(f"{METRIC_NAMES.get(metric, metric)}, {probe_words(probe, inside=True)}")


def _limits(standing: Standing) -> tuple[float, float]:
    """All encoders and the best floor; floors far below would squeeze what matters."""
    values = [value for _, _, value in _points(standing)]
    bars = [b for e, _, _ in _points(standing) for b in _bars(standing, e) if math.isfinite(b)]
    floor = standing.best_floor.value(standing.headline) if standing.best_floor else values[0]
    low, high = min(*values, floor, *bars), max(*values, floor, *bars)
    pad = 0.08 * (high - low) or 0.02
    return low - pad, high + 1.5 * pad


def _name_floors(ax: Any, standing: Standing) -> None:
    """Names right of the panel, moved apart; those below the panel are listed in its corner."""
    low, high = ax.get_ylim()
    named = _floors(standing)
    inside = [(f, v) for f, v in named if v >= low]
    height = ax.get_window_extent().height
    line = 11 * ax.figure.dpi / 96
    wanted = [(value - low) / (high - low) * height for _, value in inside]
    for (floor, _), y in zip(inside, spread(wanted, gap=line, top=height), strict=True):
        best = floor is standing.best_floor
        ax.text(1.012, y / height, short(floor.words, 36), transform=ax.transAxes, fontsize=6.5,
                va="center", color=INK if best else MUTED)  # fmt: skip
    below = [f"{short(f.words, 36)} {number(v)}" for f, v in named if v < low]
    if below:
        ax.text(0.99, 0.015, "below: " + ", ".join(below), transform=ax.transAxes, fontsize=6,
                va="bottom", ha="right", color=MUTED, gid="below")  # fmt: skip


def _name_points(ax: Any, standing: Standing) -> None:
    points = _points(standing)
    names = [short(entry.words, 26) for entry, _, _ in points]
    at = [(cost, value) for _, cost, value in points]
    bars = [_bars(standing, entry) for entry, _, _ in points]
    place_labels(ax, names, at, bars)
