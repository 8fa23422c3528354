"""The runs of a study, some at a time: each trains and is evaluated in processes of its own.

A run holds a lock on a file beside its folder, which its processes inherit: where a study was
killed and its runs go on, the same words wait for them instead of training twice.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch.study.settings import Study, Trial, known, refuse_others, trials
from lemon_muse.config import dump, validate
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import RunError, Stopped, UserError
from lemon_muse.stop import Stop

EVERY = 60.0  # seconds between two lines about the runs that go on
LOOK = 0.2  # seconds between two looks at the processes
MARK = "== study: "  # begins the line in a run's log before what a process says


def run(cfg: Study) -> Path:
    """Train and evaluate what is not there yet; the table is written after each run.

    Returns:
        The table, out/study.md; beside it study.json, study.png, results.jsonl, predictions/.

    Raises:
        UserError: a recipe, a benchmark or the folder's older runs do not fit.
        RunError: some runs failed; the others are done, and the table names those that are not.
        Stopped: a signal; the runs have saved, the same words go on.
    """
    from launch.study.report import write

    chosen = trials(cfg, cfg.chosen)
    every = known(cfg)
    _check(cfg, chosen)
    refuse_others(every)
    (cfg.out / "runs").mkdir(parents=True, exist_ok=True)
    queue = Queue(cfg, chosen)
    queue.work(lambda: write(cfg, every, queue.failed))
    page = write(cfg, every, queue.failed)
    print(page.read_text(encoding="utf-8"))
    print(f"table: {page}\npicture: {cfg.out / 'study.png'}", flush=True)
    if queue.failed:
        raise RunError(
            f"{len(queue.failed)} of {len(chosen)} runs failed: {', '.join(queue.failed)}; the "
            f"others are done. {page} says why; mend them and run the same words."
        )
    return page


def _check(cfg: Study, chosen: list[Trial]) -> None:
    """Mistakes that would only show when a run starts, or after it."""
    from eval import benchmarks
    from eval.settings import Eval

    for name, words in cfg.benchmarks.items():
        try:
            settings = validate(Eval, {**words, "encoder": "of the study"})
            benchmarks.find(settings.benchmark)
            if not settings.root.is_dir():
                raise UserError(f"there is no folder {settings.root}; give benchmarks.{name}.root=")
        except UserError as error:
            raise UserError(f"benchmark {name}: {error}") from None
    for one in {trial.recipe: trial for trial in chosen}.values():
        try:
            one.train.check(one.train.open_data())
            for words in eval_words(cfg, one).values():
                _check_probes(validate(Eval, words).probe)
        except UserError as error:
            raise UserError(f"recipe {one.recipe}: {error}") from None


def _check_probes(words: str) -> None:
    from eval.probes import PROBES

    known = (*PROBES, "robustness", "all")
    for word in words.split(","):
        if word.strip() not in known:
            raise UserError(f"probe={words} is not known; there are {', '.join(known)}.")


def eval_words(cfg: Study, trial: Trial) -> dict[str, dict[str, Any]]:
    """What is evaluated of a run: benchmark of the study -> words of eval.

    Floors are measured beside the reference's first run.
    """
    own = {
        "encoder": str(trial.folder),
        "out": str(cfg.out),
        "floors": cfg.floors and (trial.recipe, trial.seed) == (cfg.base, cfg.seeds[0]),
        "device": trial.train.device,
    }
    found = {
        name: {"probe": cfg.probe, **words, **trial.eval, **own}
        for name, words in cfg.benchmarks.items()
    }
    # As it is read back: words that come from Python may hold paths and tuples.
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(found, default=str))
    return plain


def scored(cfg: Study, trial: Trial) -> dict[str, list[dict[str, Any]]]:
    """Result rows of a finished run, by benchmark of the study; {} where they are not there."""
    path = trial.beside(".rows.json")
    if not path.is_file() or trial.encoder_hash is None:
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["hash"] != trial.encoder_hash:
        return {}
    jobs = eval_words(cfg, trial)
    rows: dict[str, list[dict[str, Any]]] = found["rows"]
    return {name: rows[name] for name in jobs if found["jobs"].get(name) == jobs[name] and
            name in rows}  # fmt: skip


@dataclass
class Going:
    """A run that goes on: its process, what the process does, the lock."""

    trial: Trial
    process: subprocess.Popen[bytes]
    part: Literal["train", "eval"]
    lock: int
    began: float = field(default_factory=time.monotonic)


class Queue:
    """Runs that wait, that go on, and that failed (name: why)."""

    def __init__(self, cfg: Study, chosen: list[Trial]) -> None:
        self.cfg = cfg
        self.count = len(chosen)
        self.waiting = list(chosen)
        self.going: list[Going] = []
        self.failed: dict[str, str] = {}
        self.foreign: set[str] = set()

    def work(self, report: Any) -> None:
        """Until nothing waits; `report` is called after each run that has been evaluated."""
        told = time.monotonic()
        with Stop() as stop:
            try:
                while self.waiting or self.going:
                    if stop.wanted:
                        raise Stopped(
                            f"stopped by {stop.name}; the runs have saved in {self.cfg.out}, run "
                            f"the same words to go on.",
                            again=not stop.final,
                        )
                    self._start()
                    time.sleep(LOOK)
                    if any(self._look(one) for one in list(self.going)):
                        report()
                    if time.monotonic() - told > EVERY:
                        told = time.monotonic()
                        self._tell()
            finally:
                self._end()

    def _start(self) -> None:
        """Fill the free places with runs that nobody else holds."""
        for trial in list(self.waiting):
            if len(self.going) >= self.cfg.jobs:
                return
            lock = _locked(trial.beside(".lock"))
            if lock is None:
                if trial.name not in self.foreign:
                    self.foreign.add(trial.name)
                    self._say(trial.name, "is held by a study that was killed, or another one")
                continue
            self.waiting.remove(trial)
            if trial.encoder_hash is None:
                self._say(trial.name, f"train, {trial.train.steps} steps of {trial.train.batch}")
                self.going.append(Going(trial, self._train(trial, lock), "train", lock))
            elif len(scored(self.cfg, trial)) < len(self.cfg.benchmarks):
                self.going.append(Going(trial, self._eval(trial, lock), "eval", lock))
            else:
                self._say(trial.name, "done already")
                os.close(lock)

    def _train(self, trial: Trial, lock: int) -> "subprocess.Popen[bytes]":
        words = trial.beside(".yaml")
        write_atomic(words, dump(trial.train).encode())
        return self._process(trial, lock, "launch.cli", "train", str(words))

    def _eval(self, trial: Trial, lock: int) -> "subprocess.Popen[bytes]":
        task = {
            "hash": trial.encoder_hash,
            "jobs": eval_words(self.cfg, trial),
            "target": str(trial.beside(".rows.json")),
        }
        write_atomic(trial.beside(".eval.json"), json.dumps(task).encode())
        words = str(trial.beside(".eval.json"))
        return self._process(trial, lock, "launch.study.score", words)

    def _process(self, trial: Trial, lock: int, *words: str) -> "subprocess.Popen[bytes]":
        threads = {"OMP_NUM_THREADS": str(self.cfg.threads), "OMP_WAIT_POLICY": "passive"}
        with trial.beside(".log").open("ab") as log:
            log.write(f"{MARK}{' '.join(words)}\n".encode())
            log.flush()
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **threads},
                pass_fds=(lock,),
            )

    def _look(self, one: Going) -> bool:
        """Move a run on where its process has ended; whether it is through."""
        code = one.process.poll()
        if code is None:
            return False
        self.going.remove(one)
        trial, minutes = one.trial, (time.monotonic() - one.began) / 60
        if code == 0 and one.part == "train":
            self._say(trial.name, f"trained in {minutes:.1f} min; evaluation")
            self.going.append(Going(trial, self._eval(trial, one.lock), "eval", one.lock))
            return False
        os.close(one.lock)
        if code == 0:
            self._say(trial.name, f"evaluated in {minutes:.1f} min")
        else:
            self.failed[trial.name] = _reason(trial, one.part, code)
            self._say(trial.name, f"FAILED, {self.failed[trial.name]}")
        return True

    def _say(self, name: str, text: str) -> None:
        number = self.count - len(self.waiting)
        print(f"[{number}/{self.count}] {name}: {text}", file=sys.stderr, flush=True)

    def _tell(self) -> None:
        """One line: how far the runs that go on are."""
        said = [f"{one.trial.name} {_progress(one)}" for one in self.going]
        left = f"{len(self.waiting)} wait" if self.waiting else "none waits"
        print(f"{', '.join(said) or 'nothing runs'}; {left}", file=sys.stderr, flush=True)

    def _end(self) -> None:
        """Ask processes that go on to save and end, and wait for them."""
        for one in self.going:
            one.process.send_signal(signal.SIGTERM)
        for one in self.going:
            one.process.wait()
            os.close(one.lock)
        self.going.clear()


def _locked(path: Path) -> int | None:
    """An open file with the lock of a run, to be inherited by its processes; None where held."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _reason(trial: Trial, part: str, code: int) -> str:
    """The sentence that a job ended with; what earlier ones said is above it in the log."""
    text = trial.beside(".log").read_text(encoding="utf-8", errors="replace")
    lines = text.rpartition(MARK)[2].splitlines()
    said = [line.removeprefix("lemon-muse: ") for line in lines if line.startswith("lemon-muse: ")]
    why = said[-1] if said and code > 0 else f"ended with code {code}"
    return f"{part}: {why.rstrip('.')} (see {trial.beside('.log')})"


def _progress(one: Going) -> str:
    from launch.study.report import logged

    if one.part == "eval":
        return "is evaluated"
    lines = logged(one.trial.folder)
    return f"step {int(lines[-1]['step']) if lines else 0}/{one.trial.train.steps}"
