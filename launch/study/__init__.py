"""`lemon-muse study`: training recipes compared under an equal budget, with intervals."""

from pathlib import Path

from launch.study.settings import Study

__all__ = ["Study", "run"]


def run(cfg: Study) -> Path:
    """Train, probe, write table and picture; returns the table's file. See `launch.study.work`."""
    from launch.study.work import run as go

    return go(cfg)
