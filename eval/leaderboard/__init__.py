"""The leaderboard: many encoders on many benchmarks, beside floors and published figures.

One page, its pictures, a CSV and LaTeX, all of them pure functions of the result rows.
"""

from dataclasses import dataclass

from eval.leaderboard.export import as_csv
from eval.leaderboard.latex import as_latex
from eval.leaderboard.page import as_page
from eval.leaderboard.picture import picture_of
from eval.leaderboard.rows import standings, unique
from eval.report.inputs import Row
from eval.report.style import Picture
from eval.report.tables import Board


@dataclass(frozen=True)
class Leaderboard:
    """File name -> text, and the pictures, which also stand in the page."""

    pages: dict[str, str]
    pictures: list[Picture]


def leaderboard(boards: list[Board], rows: list[Row], *, command: str) -> Leaderboard:
    """All of it, from boards (newest rows, paired differences) and all rows (every seed).

    Args:
        command: the words that make it again, for the page.
    """
    tables = standings(boards, rows)
    tables.sort(key=lambda s: (s.board.protocol == "paper", s.board.split == "val", s.key))
    names = sorted({s.board.benchmark for s in tables})
    found = {name: picture_of(tables, name) for name in names}
    pictures = {name: picture for name, picture in found.items() if picture}
    pages = {
        "leaderboard.csv": as_csv(tables),
        "leaderboard.tex": as_latex(tables),
        "leaderboard.html": as_page(tables, pictures, command=command),
    }
    return Leaderboard(pages, [pictures[name] for name in unique(names) if name in pictures])
