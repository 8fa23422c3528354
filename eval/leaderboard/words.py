"""How places and costs read on the leaderboard."""

import math

from eval.leaderboard.rows import Standing
from eval.report.words import DASH, METRIC_NAMES, probe_words

BENCHMARKS = {
    "brcam2c": "BRCA-M2C",
    "folder": "own folder",
    "hest": "HEST",
    "midogpp": "MIDOG++",
    "nucls": "NuCLS",
    "ocelot": "OCELOT",
    "puma": "PUMA",
}
SHORT = {
    "balanced_accuracy": "bal. acc.",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "pearson": "Pearson's r",
}
COST_NAMES = {
    "parameters": "Parameters, M",
    "gmacs": "GMAC per nucleus",
    "nuclei_per_second": "Nuclei/s",
    "images_per_second": "Images/s",
}
VERDICTS = {
    "above": "above the best floor",
    "ahead": "above it, but this may be chance",
    "untested": "above it; no paired interval",
    "not above": "does not beat the best floor",
}


def benchmark_words(name: str) -> str:
    return BENCHMARKS.get(name, name)


def task_words(task: str) -> str:
    """'mitosis cross:domain' -> 'mitosis, trained on one domain, tested on the others'."""
    name, _, plan = task.partition(" ")
    kind, _, by = plan.partition(":")
    if kind == "cross":
        return f"{name}, trained on one {by}, tested on the others"
    if kind == "leave_out":
        return f"{name}, each {by} left out in turn"
    return f"{name}, {kind} by {by}" if by else f"{name}, {kind}" if kind else name


def title_of(standing: Standing, among: list[Standing]) -> str:
    """Task, protocol and whatever else tells a table from the others of its benchmark."""
    board = standing.board
    parts = [task_words(board.task) or benchmark_words(board.benchmark)]
    parts.append(f"protocol {board.protocol or 'not stated'}")
    if board.split not in ("", "test"):
        parts.append(f"split {board.split}")
    same = [s for s in among if s.key[:4] == standing.key[:4]]
    if len(same) > 1:
        parts.append(f"data {board.version}")
    return " · ".join(parts)


def headline_words(standing: Standing) -> str:
    """'balanced accuracy, logistic regression'."""
    if standing.headline is None:
        return ""
    probe, metric = standing.headline
    return f"{METRIC_NAMES.get(metric, metric)}, {probe_words(probe, inside=True)}"


def cost_words(name: str, value: float, *, shared: bool = False) -> str:
    """A cost with three digits; GMACs of a window that nuclei share say so."""
    if not math.isfinite(value):
        return DASH
    if name == "parameters":
        return f"{value / 1e6:,.1f}"
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{text} per window" if shared and name == "gmacs" else text
