"""The plain table that `lemon-muse eval` prints: the encoder, then its floors, probe by probe."""

import math
from pathlib import Path

import numpy as np

from eval import bootstrap, results
from eval.results import Row

HEADER = ("balanced accuracy", "macro-F1")
METRICS = ("balanced_accuracy", "macro_f1")


def summary(rows: list[Row], *, encoder: str, out: Path, seed: int = 0) -> str:
    """One aligned block a probe, floors below the encoder.

    Values stand with their 95 % interval over patients; the last column is the encoder's balanced
    accuracy minus the floor's on the same resampled patients, with its interval and two-sided p.

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
        last = [f"balanced accuracy of {encoder} minus this"] if len(names) > 1 else []
        lines = [[probe, *HEADER, *last]]
        for name in names:
            values = [_cell(cells.get((name, probe, metric))) for metric in METRICS]
            if last:
                pair = [cells.get((n, probe, METRICS[0])) for n in (encoder, name)]
                same = name == encoder or None in pair
                values.append("" if same else _difference(pair, out=out, seed=seed))
            lines.append([name, *values])
        blocks.append(aligned(lines))
    return "\n\n".join(blocks)


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
            stored.append({k: file[k] for k in ("labels", "predicted", "patient", "classes")})
    mine, other = stored
    found = bootstrap.paired_difference(
        mine["predicted"],
        other["predicted"],
        mine["labels"],
        mine["patient"],
        classes=len(mine["classes"]),
        seed=seed,
    )[METRICS[0]]
    if math.isnan(found["p"]):
        return f"{found['difference']:+.3f}"
    return (
        f"{found['difference']:+.3f} [{found['ci_low']:+.3f}, {found['ci_high']:+.3f}] "
        f"p {found['p']:.3f}"
    )
