"""The table of a study as Markdown."""

from eval.report.words import METRIC_NAMES, encoder_words, number, probe_words, signed
from launch.study import intervals
from launch.study.intervals import Estimate
from launch.study.report import Found, Line
from launch.study.settings import Study

SHORT = {"balanced_accuracy": "BA", "macro_f1": "F1"}


def page(cfg: Study, found: Found, failed: dict[str, str]) -> str:
    """Head, a table a benchmark and probe, what training costs, what is missing."""
    parts = [f"# {cfg.title}", _head(cfg)]
    for benchmark in cfg.benchmarks:
        for probe in found.probes(benchmark):
            nuclei, patients = found.sizes[benchmark]
            parts.append(f"## {benchmark}, {probe_words(probe, inside=True)}")
            parts.append(f"{nuclei} nuclei of {patients} patients.")
            parts.append(_table(cfg, found, benchmark, probe))
    parts += ["## Training", _costs(found)] if found.costs else []
    parts += [_missing(cfg, found, failed), *found.notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(cfg: Study) -> str:
    recipes, seeds = len(cfg.recipes), len(cfg.seeds)
    how = {"t": "and Student's t over seeds", "bootstrap": "and seeds, both with replacement"}
    return (
        f"{recipes} recipes, {seeds} seed(s) each; the reference is **{cfg.base}**. Values are "
        f"means over seeds. Brackets are 95 % intervals from {cfg.draws} draws of patients "
        f"{how[cfg.seeds_by]}; a difference is taken on the same patients and seeds. **Bold**: the "
        f"interval excludes zero. With {recipes - 1} comparison(s) a column, about one in twenty "
        f"is bold by chance."
    )


def _table(cfg: Study, found: Found, benchmark: str, probe: str) -> str:
    metrics = list(intervals.METRICS)
    heads = ["recipe", "seeds", *(METRIC_NAMES[m] for m in metrics)]
    heads += [f"{SHORT[m]} minus {cfg.base}" for m in metrics]
    rows = []
    for recipe in cfg.recipes:
        lines = [found.line(recipe, benchmark, probe, metric) for metric in metrics]
        mine = [line for line in lines if line is not None]
        if len(mine) == len(metrics):
            rows.append([recipe, str(len(mine[0].seeds)), *map(_value, mine), *map(_change, mine)])
    for key in [k for k in found.floors if k[0] == benchmark and k[2] == metrics[0]]:
        floor = found.floors[key]
        if floor["probe"] == probe:
            both = [found.floors[key[0], key[1], metric] for metric in metrics]
            values = [_floor(facts["value"], facts["ci_low"], facts["ci_high"]) for facts in both]
            rows.append([f"*{encoder_words(floor['floor'])}*", "", *values, "", ""])
    return _markdown(heads, rows)


def _floor(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return number(float("nan"))
    return number(value) if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _value(line: Line) -> str:
    found = line.estimate
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def _change(line: Line) -> str:
    return "" if line.difference is None else change(line.difference)


def change(found: Estimate) -> str:
    """A difference with its interval, bold where that excludes zero."""
    text = f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]"
    return f"**{text}**" if found.excludes_zero else text


def _costs(found: Found) -> str:
    rows = [
        [cost.recipe, str(len(cost.seeds)), str(cost.steps), str(cost.batch),
         f"{cost.per_s:,.0f} {cost.unit}", f"{cost.minutes:.1f}"]
        for cost in found.costs
    ]  # fmt: skip
    return _markdown(["recipe", "runs", "steps", "batch", "rate", "minutes a run"], rows)


def _missing(cfg: Study, found: Found, failed: dict[str, str]) -> str:
    """Runs that failed, with their reasons, and those that are still to come."""
    done = {f"{cost.recipe}-{seed}" for cost in found.costs for seed in cost.seeds}
    every = [f"{recipe}-{seed}" for recipe in cfg.recipes for seed in cfg.seeds]
    away = [name for name in every if name not in done and name not in failed]
    parts = []
    if failed:
        lines = [f"- {name}: {why}" for name, why in failed.items()]
        parts.append("\n".join(["## Failed", "", *lines]))
    if away:
        parts.append(f"Not trained yet: {', '.join(away)}.")
    return "\n\n".join(parts)


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
