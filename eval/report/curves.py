"""Learning curves of a run as small multiples."""

from typing import Any

import numpy as np

from eval.report.inputs import RunFolder
from eval.report.style import ACCENT, FAINT, INK, WIDTH, Picture, canvas, drawn

_BLUE = "#0072B2"
_MOST_POINTS = 1500

# title, keys (the first is drawn boldly), scale of the values
_PANELS: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("Loss", ("loss",), 1),
    (
        "Online KNN on held-out patients",
        ("probe/knn_balanced_accuracy", "probe/knn_macro_f1"),
        1,
    ),
    ("Feature standard deviation", ("feature_std",), 1),
    ("Effective rank of the features", ("effective_rank",), 1),
    ("Uniformity (lower: better spread)", ("uniformity",), 1),
    ("Learning rate", ("lr",), 1),
    ("Momentum of the teacher", ("momentum",), 1),
    ("Throughput, crops per second", ("crops_per_s",), 1),
    ("Waiting for data, % of the step", ("data_wait",), 100),
)
_LABELS = {
    "probe/knn_balanced_accuracy": "balanced accuracy",
    "probe/knn_macro_f1": "macro-F1",
}
_NOISY = {"loss", "crops_per_s", "data_wait", "feature_std", "uniformity", "effective_rank"}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean over `width` points that ignores NaN; shorter at both ends.

    Args:
        values: float [n].
        width: points of the window; 1 changes nothing.
    """
    good = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0))])
    count = np.concatenate([[0], np.cumsum(good)])
    at = np.arange(len(values))
    low = np.maximum(at - width // 2, 0)
    high = np.minimum(at + (width + 1) // 2, len(values))
    n = count[high] - count[low]
    with np.errstate(invalid="ignore"):
        return np.where(n > 0, (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def learning_curves(folder: RunFolder) -> Picture | None:
    """Every panel for which the run has numbers, three in a row; None where it has none."""
    panels = [p for p in _PANELS if any(key in folder.metrics for key in p[1])]
    if not panels:
        return None
    rows = -(-len(panels) // 3)
    with canvas(WIDTH, 24 + 190 * rows) as figure:
        axes = figure.subplots(rows, 3, squeeze=False).ravel()
        end = max(float(steps[-1]) for steps, _ in folder.metrics.values())
        for ax, (title, keys, scale) in zip(axes, panels, strict=False):
            _panel(ax, folder, keys, scale)
            ax.set_title(title)
            ax.set_xlim(0, max(end, 1))
            ax.margins(y=0.12)
            ax.locator_params(axis="x", nbins=5, integer=True)
            ax.yaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_major_formatter("{x:,g}")
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[max(0, len(panels) - 3) : len(panels)]:
            ax.set_xlabel("step")
        names = ", ".join(title.lower() for title, *_ in panels)
        return drawn(figure, "curves", f"Learning curves over the steps of the run: {names}.")


def _panel(ax: Any, folder: RunFolder, keys: tuple[str, ...], scale: float) -> None:
    bold = True
    for key in keys:
        if key not in folder.metrics:
            continue
        steps, values = folder.metrics[key]
        stride = -(-len(steps) // _MOST_POINTS)
        values = values * scale
        marks = "o" if len(steps) <= 40 and key.startswith("probe/") else ""
        width = max(1, len(steps) // 40) if key in _NOISY else 1
        colour = _BLUE if bold else FAINT
        if width > 1:
            ax.plot(steps[::stride], values[::stride], color="#b9d3e6", lw=0.7)
        line = smooth(values, width)[::stride]
        label = _LABELS.get(key, "")
        ax.plot(steps[::stride], line, color=colour, lw=1.5, marker=marks, ms=3, label=label)
        if marks and bold and np.isfinite(values).any():
            best = int(np.nanargmax(values))
            ax.annotate(
                f"{values[best]:.3f}", (steps[best], values[best]), xytext=(0, 5),
                textcoords="offset points", ha="center", fontsize=7, color=INK,
            )  # fmt: skip
        bold = False
    if "chance" in folder.metrics and keys[0] == "loss":
        steps, values = folder.metrics["chance"]
        ax.plot(steps, values, color=ACCENT, lw=1.1, ls=(0, (4, 3)), label="chance level")
    if any(line.get_label() and line.get_label()[0] != "_" for line in ax.get_lines()):
        ax.legend(loc="best", handlelength=1.6)
