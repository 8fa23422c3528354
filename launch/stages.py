"""From words to stages and tasks: `-- JOB … -- JOB …` is a chain, `sweep.KEY=a,b` an array."""

import importlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemon_muse.config import Config, load, read
from lemon_muse.errors import UserError

# Jobs whose processes share the work when they are started with the same words.
SHARING = ("prep all", "prep nuclei", "prep crops", "prep rois")
# Jobs that run on several ranks.
RANKED = ("train",)


@dataclass(frozen=True)
class Stage:
    """One job of a chain.

    Attributes:
        job: its name, as 'train' or 'prep crops'.
        tasks: the words of every task, each beginning with the job's name.
    """

    job: str
    tasks: tuple[tuple[str, ...], ...]


def split(words: Sequence[str]) -> list[list[str]]:
    """The sections between `--`.

    Raises:
        UserError: a section is empty.
    """
    sections: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            sections.append([])
        else:
            sections[-1].append(word)
    if not all(sections):
        raise UserError(
            "submit needs a job after every --, as in: submit slurm.yaml -- train demo.yaml data=D"
        )
    return sections


def own_words(section: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings of the stage (key=value before the job's name), and the job's words."""
    count = next((i for i, word in enumerate(section) if "=" not in word), len(section))
    if count == len(section):
        raise UserError(f"'{' '.join(section)}' names no job; write one after --, as in: -- train.")
    return list(section[:count]), list(section[count:])


def job_name(words: Sequence[str]) -> str:
    """The job that words begin with."""
    from launch.cli import JOBS, split_name

    name, _ = split_name(list(words))
    if name in ("submit", "status"):
        raise UserError(f"'{name}' cannot be submitted; submit one of: {', '.join(JOBS)}.")
    return name


def settings_of(words: Sequence[str]) -> Config:
    """The settings of a job, from its words.

    Raises:
        UserError: a wrong word.
    """
    model, rest = _model(words)
    return load(model, rest)


def with_workers(words: Sequence[str], count: int) -> list[str]:
    """The words with workers= for this many CPUs, where the job has that key and no value yet."""
    model, rest = _model(words)
    if "workers" in read(model, rest) or "workers" not in model.model_fields:
        return list(words)
    # One CPU is left to the process that the readers feed.
    return [*words, f"workers={max(1, count - 1)}"]


def _model(words: Sequence[str]) -> tuple[type[Config], list[str]]:
    """The settings model of the job that words begin with, and the words after its name."""
    from launch.cli import JOBS, split_name

    name, rest = split_name(list(words))
    module, model, _ = JOBS[name]
    found: type[Config] = getattr(importlib.import_module(module), model)
    return found, rest


def expand(
    words: Sequence[str], *, sweep: dict[str, Any], copies: int = 1
) -> tuple[tuple[str, ...], ...]:
    """The words of every task of a stage.

    Args:
        words: of the job.
        sweep: values by dotted key: a list, or one string with commas; every combination is a
            task, whose out= gets a folder of its own below the given one.
        copies: tasks with the same words, for jobs that share their work.

    Raises:
        UserError: copies of a job that does not share, a sweep without values or without out=, or
            with the same value twice.
    """
    name = job_name(words)
    if sweep and copies > 1:
        raise UserError("tasks= and sweep. exclude each other: a sweep has a task a combination.")
    if copies > 1:
        if name not in SHARING:
            raise UserError(
                f"tasks={copies}: {name} does not share its work; only {', '.join(SHARING)} do. "
                f"Use sweep.KEY=a,b for several runs, nodes= for a larger one."
            )
        return (tuple(words),) * copies
    if not sweep:
        return (tuple(words),)
    given = next((w.partition("=")[2] for w in reversed(words) if w.startswith("out=")), None)
    flat = _flat(sweep)
    if given is None and "out" not in flat:
        raise UserError("a sweep needs out=FOLDER among the job's words: each task gets one below.")
    values = [_values(key, value) for key, value in flat.items()]
    tasks = []
    for chosen in itertools.product(*values):
        changes = [f"{key}={value}" for key, value in zip(flat, chosen, strict=True)]
        own = list(words) + changes
        if "out" not in flat:
            label = ",".join(f"{k.split('.')[-1]}={v}" for k, v in zip(flat, chosen, strict=True))
            own.append(f"out={Path(str(given)) / label.replace('/', '_')}")
        tasks.append(tuple(own))
    return tuple(tasks)


def _values(key: str, value: Any) -> list[str]:
    items = value if isinstance(value, list) else _text(value).split(",")
    found = [text for item in items if (text := _text(item).strip())]
    if not found:
        raise UserError(f"sweep.{key} has no value; write sweep.{key}=a,b.")
    if len(set(found)) < len(found):
        raise UserError(f"sweep.{key} has a value twice: two tasks would write the same folder.")
    return found


def _text(value: Any) -> str:
    """As it is written in a word: what is no string as JSON, which YAML reads."""
    return value if isinstance(value, str) else json.dumps(value)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
