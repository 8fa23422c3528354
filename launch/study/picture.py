"""The forest plot of a study: each recipe's difference to the reference, with its interval."""

import math
from typing import Any

from eval.report.style import ACCENT, INK, MUTED, WIDTH, canvas, drawn, short
from eval.report.words import METRIC_NAMES, probe_words
from launch.study import intervals
from launch.study.report import Found, Line
from launch.study.settings import Study

ROW = 21  # CSS px a recipe
COLOURS = {"balanced_accuracy": ACCENT, "macro_f1": "#0072B2"}


def forest(cfg: Study, found: Found) -> bytes | None:
    """PNG; a row a benchmark, a column a probe. None where nothing can be compared yet."""
    compared = [line for line in found.lines if line.difference is not None]
    if not compared:
        return None
    recipes = [name for name in cfg.recipes if any(line.recipe == name for line in compared)]
    marks = [name for name in cfg.benchmarks if any(line.benchmark == name for line in compared)]
    probes = list(dict.fromkeys(line.probe for line in compared))
    across = max(2, len(probes))
    height = len(marks) * (ROW * len(recipes) + 62) + 30
    with canvas(WIDTH * len(probes) / across, height) as figure:
        grid = figure.subplots(len(marks), len(probes), squeeze=False, sharey=True, sharex="row")
        for row, mark in enumerate(marks):
            for column, probe in enumerate(probes):
                here = [x for x in compared if (x.benchmark, x.probe) == (mark, probe)]
                _panel(grid[row][column], here, recipes)
                grid[row][column].set_title(f"{mark}, {probe_words(probe, inside=True)}")
                if row == len(marks) - 1:
                    grid[row][column].set_xlabel(f"difference to {short(cfg.base)}")
        _legend(figure)
        return drawn(figure, "study", "Differences of recipes to the reference.").png


def _panel(ax: Any, lines: list[Line], recipes: list[str]) -> None:
    ax.axvline(0, color=MUTED, lw=1)
    for line in lines:
        found = line.difference
        assert found is not None
        up = list(intervals.METRICS).index(line.metric)
        y = recipes.index(line.recipe) + 0.17 * (2 * up - 1)
        colour = COLOURS[line.metric]
        if math.isfinite(found.low):
            ax.plot([found.low, found.high], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        face = colour if found.excludes_zero else "white"
        ax.plot(found.value, y, "o", ms=4.5, mfc=face, mec=colour, mew=1.2, zorder=3)
    ax.set_yticks(range(len(recipes)), [short(name, 28) for name in recipes])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(len(recipes) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    for y in range(1, len(recipes)):
        ax.axhline(y - 0.5, color="#edf0f4", lw=0.8, zorder=0)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=colour, marker="o", ms=4.5, mfc=colour, lw=1.6,
               label=METRIC_NAMES[metric])
        for metric, colour in COLOURS.items()
    ]  # fmt: skip
    marks += [
        Line2D([], [], color=MUTED, marker="o", ms=4.5, mfc=MUTED, lw=0,
               label="95 % interval excludes zero"),
        Line2D([], [], color=MUTED, marker="o", ms=4.5, mfc="white", lw=0, label="it does not"),
    ]  # fmt: skip
    figure.legend(handles=marks, loc="outside lower center", ncols=4)
