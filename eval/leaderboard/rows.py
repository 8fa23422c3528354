"""From boards and rows to the tables of the leaderboard: who is measured, how well, at what cost.

One table (`Standing`) a benchmark, task, protocol, split and version of the data. Encoders and
floors stand in one order, by the headline metric; published figures never do.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from eval.published import Published, of
from eval.report.inputs import Row
from eval.report.tables import Board, unique_names

HEADLINES = ("balanced_accuracy", "pearson", "macro_f1", "accuracy", "auroc")
# The probe whose value ranks, where equally many encoders have it: convex ones before others.
RANKING = ("logistic", "ridge", "linear", "uni", "knn", "finetune")
SHOWN = ("balanced_accuracy", "macro_f1", "auroc", "pearson")
ROBUSTNESS = "robustness"
COSTS = ("parameters", "gmacs", "nuclei_per_second", "images_per_second")
NAN = float("nan")


@dataclass(frozen=True)
class Cell:
    """One metric of one probe on one encoder.

    `value` is the mean over seeds; `low` and `high` are the 95 % interval of a single seed, NaN
    with several, where `sd` (n - 1) is known instead; `n` nuclei were scored.
    """

    value: float
    low: float
    high: float
    sd: float
    seeds: int
    n: int


@dataclass(frozen=True)
class Lead:
    """Headline value minus that of the best floor; low and high: paired 95 % interval or NaN.

    With several seeds `value` is that of the means, and the interval that of the newest seed.
    verdict: 'above' (the interval excludes 0), 'ahead' (above, but that may be chance), 'untested'
    (above, and there is no interval) or 'not above'.
    """

    floor: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if not self.value > 0:
            return "not above"
        if not math.isfinite(self.low):
            return "untested"
        return "above" if self.low > 0 else "ahead"


@dataclass(frozen=True)
class Entry:
    """One line: an encoder or a floor. `shared`: its GMACs are those of a window that several
    nuclei share. `cells`: (probe, metric) -> Cell."""

    name: str
    words: str
    hash: str
    is_floor: bool
    costs: dict[str, float]
    shared: bool
    cells: dict[tuple[str, str], Cell]
    lead: Lead | None = None

    def value(self, place: tuple[str, str] | None) -> float:
        """The value of a (probe, metric), NaN where there is none."""
        cell = self.cells.get(place) if place else None
        return cell.value if cell else NAN


@dataclass(frozen=True)
class Standing:
    """One table. `headline` is the (probe, metric) that ranks; None: nothing can be ranked."""

    board: Board
    entries: list[Entry]
    headline: tuple[str, str] | None
    best_floor: Entry | None
    published: list[Published] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        board = self.board
        return board.benchmark, board.task, board.protocol, board.split, board.version

    @property
    def encoders(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.is_floor]

    @property
    def floors(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_floor]

    def probes(self) -> list[tuple[str, list[str]]]:
        """Probes of the table with their metrics, the ranking one first."""
        out = []
        first = self.headline[0] if self.headline else ""
        for probe in sorted(self.board.probes, key=lambda p: (p != first, _place(p))):
            metrics = [m for m in self._metrics() if self.has(probe, m)]
            if metrics:
                out.append((probe, metrics))
        return out

    def _metrics(self) -> tuple[str, ...]:
        """Accuracy only where something published is one: alone it says little."""
        paper = any(p.metric == "accuracy" for p in self.published)
        return (*SHOWN, "accuracy") if paper or self.board.protocol == "paper" else SHOWN

    def has(self, probe: str, metric: str) -> bool:
        return any((probe, metric) in entry.cells for entry in self.entries)

    def best(self, place: tuple[str, str]) -> float:
        """The highest value of a (probe, metric); NaN where nobody has one."""
        values = [v for e in self.entries if math.isfinite(v := e.value(place))]
        return max(values, default=NAN)


def standings(boards: list[Board], rows: list[Row]) -> list[Standing]:
    """The tables of all boards.

    Args:
        boards: from `tables.boards`, of the newest rows: they hold the paired differences.
        rows: all rows, all seeds; of equal measurements with equal seed the last one counts.
    """
    label = unique_names(rows)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        place = (row.benchmark, row.task, row.protocol, row.split, row.version)
        groups.setdefault(place, []).append(row)
    out = []
    for board in boards:
        place = (board.benchmark, board.task, board.protocol, board.split, board.version)
        entries = _entries(board, groups[place], label)
        headline = _headline(board, entries)
        floors = [e for e in entries if e.is_floor and math.isfinite(e.value(headline))]
        best = max(floors, key=lambda e: e.value(headline), default=None)
        entries = [_with_lead(board, entry, best, headline) for entry in entries]
        entries.sort(key=lambda e: (_last(e.value(headline)), e.is_floor, e.name))
        said = of(board.benchmark, board.task)
        out.append(Standing(board, entries, headline, best, said))
    return out


def _last(value: float) -> float:
    """Key for descending order with NaN at the end."""
    return -value if math.isfinite(value) else math.inf


def _place(probe: str) -> int:
    return RANKING.index(probe) if probe in RANKING else len(RANKING)


def _headline(board: Board, entries: list[Entry]) -> tuple[str, str] | None:
    """The first metric of `HEADLINES` that there is, by the probe that most encoders have."""
    ranked = [e for e in entries if not e.is_floor] or entries
    for metric in HEADLINES:
        counts = {
            probe: sum((probe, metric) in entry.cells for entry in ranked)
            for probe in board.probes
            if probe != ROBUSTNESS
        }
        most = max(counts.values(), default=0)
        if most:
            return min((p for p, n in counts.items() if n == most), key=_place), metric
    return None


def _entries(board: Board, rows: list[Row], label: dict[tuple[str, str], str]) -> list[Entry]:
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(label[row.encoder, row.encoder_hash], []).append(row)
    out = []
    for name, mine in members.items():
        newest = mine[-1]
        costs, shared = _costs(mine)
        entry = Entry(
            name,
            board.words(name),
            newest.encoder_hash,
            newest.is_floor,
            costs,
            shared,
            _cells(mine),
        )
        out.append(entry)
    return out


def _costs(rows: list[Row]) -> tuple[dict[str, float], bool]:
    """Positive finite costs, from the newest row that has each; whether nuclei share a window."""
    costs: dict[str, float] = {}
    shared = False
    for row in rows:
        for name in COSTS:
            value = row.params.get(name)
            if isinstance(value, int | float) and math.isfinite(value) and value > 0:
                costs[name] = float(value)
        shared = row.params.get("gmacs_of") == "window" if "gmacs" in row.params else shared
    return costs, shared


def _cells(rows: list[Row]) -> dict[tuple[str, str], Cell]:
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if math.isfinite(row.value):
            found.setdefault((row.probe, row.metric), {})[row.seed] = row
    out = {}
    for place, seeds in found.items():
        last = list(seeds.values())[-1]
        values = np.array([row.value for row in seeds.values()])
        if len(values) == 1:
            out[place] = Cell(last.value, last.ci_low, last.ci_high, NAN, 1, last.n)
        else:
            mean, sd = float(values.mean()), float(values.std(ddof=1))
            out[place] = Cell(mean, NAN, NAN, sd, len(values), last.n)
    return out


def _with_lead(
    board: Board, entry: Entry, floor: Entry | None, headline: tuple[str, str] | None
) -> Entry:
    """The entry with its lead over the best floor; the interval is that of the newest seed."""
    if entry.is_floor or floor is None or headline is None:
        return entry
    value = entry.value(headline) - floor.value(headline)
    if not math.isfinite(value):
        return entry
    wanted = (entry.name, floor.name, *headline)
    pairs = {(d.encoder, d.floor, d.probe, d.metric): d for d in board.differences}
    pair = pairs.get(wanted)
    low, high = (pair.low, pair.high) if pair else (NAN, NAN)
    return replace(entry, lead=Lead(floor.name, value, low, high))


def unique(values: Iterable[str]) -> list[str]:
    """Values in the order of their first appearance."""
    return list(dict.fromkeys(values))
