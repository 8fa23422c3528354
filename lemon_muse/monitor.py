"""What a run tells: metrics.jsonl, TensorBoard, a progress bar or plain lines; on rank 0 only."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from lemon_muse.data.files import write_atomic


class Monitor:
    """Log scalars of a run.

    Args:
        folder: the run folder.
        first, steps: step that the run starts at, and its last one.
        active: False on ranks other than 0: every call is then a no-op.
    """

    def __init__(self, folder: Path, *, first: int, steps: int, active: bool) -> None:
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.path = folder / "metrics.jsonl"
        _drop_from(self.path, first)
        self.file = self.path.open("a", encoding="utf-8")
        # purge_step: what a killed run logged beyond its checkpoint is taken back.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=first, unit="step", disable=not self.terminal, dynamic_ncols=True
        )
        self.first, self.steps, self.began = first, steps, time.monotonic()

    def step(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        if self.active:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics: `step` counts finished steps."""
        if not self.active:
            return
        line: dict[str, Any] = {"step": step, **{k: _short(v) for k, v in values.items()}}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        shown = {
            k: v
            for k, v in line.items()
            if k in ("loss", "crops_per_s", "rois_per_s", "data_wait", "effective_rank")
            or k.startswith("probe/")
        }
        if self.terminal:
            self.bar.set_postfix({k.removeprefix("probe/"): v for k, v in shown.items()})
        else:
            done = step - self.first
            left = (time.monotonic() - self.began) / max(done, 1) * (self.steps - step)
            text = "  ".join(f"{k} {v}" for k, v in shown.items())
            self.say(f"step {step}/{self.steps}  {text}  time left {_clock(left)}")

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if not self.active:
            return
        if self.terminal:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            self.board.close()


class Clock:
    """Throughput and the share of time that training waits for data, between two log lines."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.crops, self.waited, self.busy = 0, 0.0, 0.0
        self.mark = time.perf_counter()

    def start_waiting(self) -> None:
        self.mark = time.perf_counter()

    def got_data(self) -> None:
        now = time.perf_counter()
        self.waited += now - self.mark
        self.mark = now

    def worked(self, crops: int) -> None:
        now = time.perf_counter()
        self.busy += now - self.mark
        self.crops += crops
        self.mark = now

    def rates(self, unit: str = "crops_per_s") -> dict[str, float]:
        total = max(self.waited + self.busy, 1e-9)
        return {unit: self.crops / total, "data_wait": self.waited / total}


def _drop_from(path: Path, first: int) -> None:
    """Remove lines beyond the step that a resumed run starts at."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= first and first > 0:
                kept.append(line)
        except (ValueError, KeyError):  # the last line of a killed run may be cut off
            continue
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
