"""The sentence at the head of the page: which floors the encoder beats, and which it does not."""

from dataclasses import dataclass

from eval.report.tables import PAIRED, Board, Difference
from eval.report.words import METRIC_NAMES, encoder_words, interval, listed, probe_words, signed


@dataclass(frozen=True)
class Verdict:
    """What one probe says about the foreground encoder.

    state: 'beats' (above every floor in every metric, intervals against the best one exclude 0),
    'ahead' (above every floor, but chance is not excluded), 'behind' (some floor is not beaten) or
    'alone' (there is no floor to compare with).
    """

    probe: str
    state: str
    sentence: str


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
    if lost:
        beaten = sorted(
            {encoder_words(d.floor) for d in mine} - {encoder_words(d.floor) for d in lost}
        )
        sentence = f"Does not beat {listed([_against(d) for d in lost])}."
        if beaten:
            sentence += f" Ahead of {listed(beaten)} in both."
        return Verdict(probe, "behind", sentence)
    best = [d for m in PAIRED if (d := board.against_best_floor(encoder, probe, m)) is not None]
    floors = len({d.floor for d in mine})
    every = "the only floor" if floors == 1 else f"all {floors} floors"
    against = listed([_against(d) for d in best])
    if all(d.verdict == "above" for d in best):
        return Verdict(probe, "beats", f"Beats {every}; the best one: {against}.")
    why = (
        "the interval includes 0, so it may be chance"
        if any(d.low <= 0 for d in best)
        else "without predictions of both there is no interval"
    )
    return Verdict(probe, "ahead", f"Ahead of {every}, the best one: {against}; {why}.")


def _against(difference: Difference) -> str:
    bounds = interval(difference.low, difference.high, sign=True)
    value = f"{signed(difference.value)} {bounds}".strip()
    metric = METRIC_NAMES[difference.metric]
    return f"{encoder_words(difference.floor)} in {metric} ({value})"


def headline(board: Board) -> str:
    """One honest line over all probes."""
    found = verdicts(board)
    if not found:
        return "The results hold floors only: there is no encoder to judge."
    groups: dict[str, list[str]] = {}
    for verdict in found:
        groups.setdefault(verdict.state, []).append(probe_words(verdict.probe))
    parts = []
    if "beats" in groups:
        parts.append(f"beats every floor with {listed(groups['beats'])}")
    if "ahead" in groups:
        parts.append(
            f"is ahead of every floor with {listed(groups['ahead'])}, though not beyond doubt"
        )
    for verdict in found:
        if verdict.state == "behind":
            parts.append(f"does not beat {_unbeaten(board, verdict.probe)} "
                         f"with {probe_words(verdict.probe)}")  # fmt: skip
    if not parts:
        return "No floor was measured, so the values stand alone."
    return f"{board.encoders[0]} {'; it '.join(parts)}."


def _unbeaten(board: Board, probe: str) -> str:
    names = {
        encoder_words(d.floor)
        for d in board.differences
        if (d.encoder, d.probe) == (board.encoders[0], probe) and d.value <= 0
    }
    return listed(sorted(names))
