"""The sentence at the head of the page: which floors the encoder beats, and which it does not."""

from dataclasses import dataclass, field

from eval.report.pairs import PAIRED, Difference
from eval.report.tables import Board
from eval.report.words import (
    METRIC_NAMES,
    interval,
    listed,
    named,
    number,
    probe_words,
    signed,
)


@dataclass(frozen=True)
class Verdict:
    """What one probe says about the foreground encoder.

    state: 'beats' (above every floor in balanced accuracy and macro-F1, or in Pearson's r of a
    regression, and the intervals of the differences to the best floor exclude 0), 'ahead' (above
    every floor, but chance is not excluded), 'behind' (some floor is not beaten) or 'alone' (there
    is no floor to compare with).
    """

    probe: str
    state: str
    sentence: str
    lines: list[str] = field(default_factory=list)
    rest: str = ""


def verdicts(board: Board) -> list[Verdict]:
    """One verdict a probe that the foreground encoder was measured with."""
    if not board.encoders:
        return []
    encoder = board.encoders[0]
    return [_verdict(board, encoder, p) for p in board.probes if encoder in board.present(p)]


def _verdict(board: Board, encoder: str, probe: str) -> Verdict:
    mine = [d for d in board.differences if (d.encoder, d.probe) == (encoder, probe)]
    if not mine:
        return Verdict(probe, "alone", "No floor was measured with this probe.")
    lost = [d for d in mine if d.value <= 0]
    best = [d for m in PAIRED if (d := board.against_best_floor(encoder, probe, m)) is not None]
    if lost:
        losers = list(dict.fromkeys(d.floor for d in lost))
        beaten = [f for f in dict.fromkeys(d.floor for d in mine) if f not in losers]
        sentence = f"Does not beat {listed([named(board.words(f)) for f in losers])}."
        rest = f"Ahead of {listed([named(board.words(f)) for f in beaten])}." if beaten else ""
        return Verdict(probe, "behind", sentence, [_line(board, d) for d in best], rest)
    floors = len({d.floor for d in mine})
    every = "the only floor" if floors == 1 else f"all {floors} floors"
    lines = [_line(board, d) for d in best]
    if all(d.verdict == "above" for d in best):
        return Verdict(probe, "beats", f"Beats {every}.", lines)
    why = (
        "The interval includes 0: this may be chance."
        if any(d.low <= 0 for d in best)
        else "Without predictions of both there is no interval."
    )
    return Verdict(probe, "ahead", f"Ahead of {every}.", lines, why)


def _line(board: Board, difference: Difference) -> str:
    bounds = interval(difference.low, difference.high, sign=True)
    value = f"{signed(difference.value)} {bounds}".strip()
    place = "over" if difference.value > 0 else "to"
    return f"{value} {METRIC_NAMES[difference.metric]} {place} {board.words(difference.floor)}"


def headline(board: Board) -> str:
    """One honest line over all probes."""
    found = verdicts(board)
    if not found and board.encoders:
        return f"{board.encoders[0]} was measured without a probe that floors can be held against."
    if not found:
        return "The results hold floors only: there is no encoder to judge."
    parts = []
    beats = [_gap(board, v.probe) for v in found if v.state == "beats"]
    ahead = [_gap(board, v.probe) for v in found if v.state == "ahead"]
    if beats:
        parts.append(f"beats every floor with {listed(beats)}")
    if ahead:
        parts.append(f"is ahead of every floor with {listed(ahead)}, though not beyond doubt")
    behind: dict[str, list[str]] = {}
    for verdict in found:
        if verdict.state == "behind":
            behind.setdefault(_unbeaten(board, verdict.probe), []).append(
                probe_words(verdict.probe, inside=True)
            )
    if behind:
        lost = [f"{floors} with {listed(probes)}" for floors, probes in behind.items()]
        parts.append(f"does not beat {listed(lost)}")
    if not parts:
        return "No floor was measured, so the values stand alone."
    judged = f"{board.encoders[0]} {'; it '.join(parts)}."
    metric = METRIC_NAMES[board.headline_metric]
    return f"{judged} Differences are to the best floor, in {metric}." if beats else judged


def _gap(board: Board, probe: str) -> str:
    """'logistic regression (+0.086)'."""
    gap = board.against_best_floor(board.encoders[0], probe, board.headline_metric)
    words = probe_words(probe, inside=True)
    return f"{words} ({signed(gap.value)})" if gap else words


def _unbeaten(board: Board, probe: str) -> str:
    mine = [d for d in board.differences if (d.encoder, d.probe) == (board.encoders[0], probe)]
    lost = dict.fromkeys(named(board.words(d.floor)) for d in mine if d.value <= 0)
    if len(lost) <= 2:
        return listed(list(lost))
    return f"{len(lost)} of {len({d.floor for d in mine})} floors"


def score_lines(board: Board, probe: str) -> tuple[str, list[str]]:
    """The large number of a card and the lines beneath it."""
    big, lines = "", []
    for metric in PAIRED:
        row = board.cells.get((board.encoders[0], probe, metric))
        if row is not None:
            # The large number is not said twice: its line gives only what it is.
            shown = number(row.value) if big else ""
            big = big or number(row.value)
            parts = (METRIC_NAMES[metric], shown, interval(row.ci_low, row.ci_high))
            lines.append(" ".join(part for part in parts if part))
    return big, lines
