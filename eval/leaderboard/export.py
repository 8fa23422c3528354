"""The leaderboard as a tidy CSV: a line a value, whatever table it stands in."""

import csv
import io
import math

from eval.leaderboard.rows import COSTS, Entry, Standing
from eval.published import Published

COLUMNS = (
    "kind", "benchmark", "task", "protocol", "split", "version", "encoder", "encoder_hash", "probe",
    "metric", "value", "ci_low", "ci_high", "sd_over_seeds", "seeds", "n", *COSTS, "gmacs_of",
    "lead", "lead_low", "lead_high", "lead_over", "verdict", "setting", "source",
)  # fmt: skip


def as_csv(standings: list[Standing]) -> str:
    """All values with a header; what is not known is empty.

    kind: encoder, floor or published. The columns lead… are filled where a value is the headline
    of its table; setting and source belong to published figures.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    seen: dict[Published, None] = {}
    for standing in standings:
        for entry in standing.entries:
            writer.writerows(_lines(standing, entry))
        seen |= dict.fromkeys(standing.published)
    writer.writerows(_published(figure) for figure in seen)
    return stream.getvalue()


def _lines(standing: Standing, entry: Entry) -> list[dict[str, str]]:
    names = ("benchmark", "task", "protocol", "split", "version")
    place = dict(zip(names, standing.key, strict=True))
    about = {**place, "kind": "floor" if entry.is_floor else "encoder", "encoder": entry.name}
    about |= {"encoder_hash": entry.hash, **{c: _number(v) for c, v in entry.costs.items()}}
    if "gmacs" in entry.costs:
        about["gmacs_of"] = "window" if entry.shared else "nucleus"
    out = []
    for (probe, metric), cell in entry.cells.items():
        line = {**about, "probe": probe, "metric": metric, "value": _number(cell.value)}
        line |= {"ci_low": _number(cell.low), "ci_high": _number(cell.high)}
        line |= {"sd_over_seeds": _number(cell.sd), "seeds": str(cell.seeds), "n": str(cell.n)}
        if entry.lead and (probe, metric) == standing.headline:
            lead = entry.lead
            line |= {"lead": _number(lead.value), "lead_low": _number(lead.low)}
            line |= {"lead_high": _number(lead.high), "lead_over": lead.floor}
            line |= {"verdict": lead.verdict}
        out.append(line)
    return out


def _published(figure: Published) -> dict[str, str]:
    return {
        "kind": "published",
        "benchmark": figure.benchmark,
        "task": figure.task,
        "encoder": figure.encoder,
        "probe": figure.probe,
        "metric": figure.metric,
        "value": _number(figure.value),
        "setting": figure.setting,
        "source": figure.source,
    }


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
