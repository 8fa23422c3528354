"""Progress on stderr: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

# Seconds between two plain lines: a log file should stay readable.
EVERY = 10.0


class Progress:
    """Counts up to `total`; use as a context and call `update`."""

    def __init__(self, total: int, *, what: str, unit: str) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = 0
        self.began = self.said = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def update(self, count: int) -> None:
        """Say that `count` more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.said > EVERY and self.done < self.total:
            self.said = time.monotonic()
            self._line()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if kind is None:
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = self.done / seconds
        left = (self.total - self.done) / rate if rate else float("inf")
        tail = f", {left:.0f} s left" if self.done < self.total else f", {seconds:.1f} s"
        print(
            f"{self.what}: {self.done}/{self.total} {self.unit}, {rate:.0f} {self.unit}/s{tail}",
            file=sys.stderr,
            flush=True,
        )
