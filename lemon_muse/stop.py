"""Signals that end a run in good order."""

import signal
from types import FrameType


class Stop:
    """Turns SIGTERM, SIGUSR2 and Ctrl-C into a wish that the loop grants between two steps.

    `final` after SIGTERM and Ctrl-C: nobody will start the job again. SIGUSR2 is the scheduler's
    warning before a time limit or a preemption.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.wanted, self.final, self.name = False, False, ""

    def __enter__(self) -> "Stop":
        try:
            self.before = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        except ValueError:  # not the main thread (tests): signals stay as they are
            self.before = {}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted, self.name = True, signal.Signals(number).name
        self.final = self.final or number != signal.SIGUSR2

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
