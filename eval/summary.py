"""The plain table that `lemon-muse eval` prints: the encoder, then its floors, probe by probe."""

import math
from pathlib import Path

import numpy as np

from eval import bootstrap, results
from eval.results import Row

# Of a predictions file of a classification.
ARRAYS = ("labels", "predicted", "patient", "classes")
# (metric, its heading) of a classification and of a regression; the first is compared.
CLASS = (("balanced_accuracy", "balanced accuracy"), ("macro_f1", "macro-F1"))
REGRESSION = (("pearson", "Pearson"),)


def summary(rows: list[Row], *, encoder: str, out: Path, seed: int = 0) -> str:
    """One aligned block a probe, floors below the encoder.

    Values stand with their 95 % interval over patients; the last column is the encoder's balanced
    accuracy (Pearson's r) minus the floor's on the same resampled patients (slides), with its
    interval and two-sided p.

    Args:
        rows: of one encoder and its floors, from `results.make_rows`.
        encoder: name of the encoder; every other name is a floor.
        out: the folder that holds predictions/.
    """
    cells = {(row["encoder"], row["probe"], row["metric"]): row for row in rows}
    names = list(dict.fromkeys(row["encoder"] for row in rows))
    names.sort(key=lambda name: name != encoder)
    blocks = []
    for probe in dict.fromkeys(row["probe"] for row in rows):
        mine = [row for row in rows if row["probe"] == probe]
        if probe == "robustness":
            blocks.append(_listed(mine, names))
            continue
        shown = REGRESSION if any(row["metric"] == "pearson" for row in mine) else CLASS
        first, title = shown[0]
        present = [n for n in names if any((n, probe, metric) in cells for metric, _ in shown)]
        last = [f"{title} of {encoder} minus this"] if len(present) > 1 else []
        lines = [[probe, *(heading for _, heading in shown), *last]]
        for name in present:
            values = [_cell(cells.get((name, probe, metric))) for metric, _ in shown]
            if last:
                pair = [cells.get((n, probe, first)) for n in (encoder, name)]
                same = name == encoder or None in pair
                values.append("" if same else _difference(pair, out=out, seed=seed))
            lines.append([name, *values])
        blocks.append(aligned(lines))
    return "\n\n".join(blocks)


def _listed(rows: list[Row], names: list[str]) -> str:
    """Measures of robustness: a line a metric, a column a source."""
    cells = {(row["encoder"], row["metric"]): row for row in rows}
    names = [n for n in names if any(name == n for name, _ in cells)]
    metrics = dict.fromkeys(row["metric"] for row in rows)
    lines = [["robustness", *names]]
    lines += [[m, *(_cell(cells.get((name, m))) for name in names)] for m in metrics]
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Columns padded to one width, two spaces apart."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def _cell(row: Row | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    if row["ci_low"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"


def _difference(pair: list[Row | None], *, out: Path, seed: int) -> str:
    stored = []
    for row in pair:
        assert row is not None  # the caller leaves such pairs out
        path = results.predictions_path(out, results.key_of(row), encoder=row["encoder"])
        with np.load(path, allow_pickle=False) as file:
            stored.append({k: file[k] for k in (*ARRAYS, "pearson") if k in file})
    mine, other = stored
    if "pearson" in mine:
        from eval import regression

        found = regression.paired_difference(
            mine["pearson"], other["pearson"], seed=seed, patient=mine["patient"]
        )
        return _said(found["pearson"])
    found = bootstrap.paired_difference(
        mine["predicted"],
        other["predicted"],
        mine["labels"],
        mine["patient"],
        classes=len(mine["classes"]),
        seed=seed,
    )
    return _said(found["balanced_accuracy"])


def _said(found: dict[str, float]) -> str:
    if math.isnan(found["p"]):
        return f"{found['difference']:+.3f}"
    return (
        f"{found['difference']:+.3f} [{found['ci_low']:+.3f}, {found['ci_high']:+.3f}] "
        f"p {found['p']:.3f}"
    )
