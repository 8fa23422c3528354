"""The settings of `lemon-muse study`, and the runs that they ask for."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from lemon_muse.config import Config, read, validate
from lemon_muse.errors import UserError
from lemon_muse.recipe import FREE, Train

# Keys of a recipe that are no words of `train`.
OWN = ("config", "data", "eval", "without")


class Study(Config):
    """Compare training recipes: each with every seed, under the same words, on the same patients.

    A recipe is a group of words of `train`, with four keys of its own: config (a recipe file that
    it starts from), data (other shards than the study's), without (common words that it does not
    take) and eval (words of `eval`). Words of the recipe beat common ones, those beat its file:

      recipes:
        a1+gray: {config: lemon_vits8.yaml}
        a0: {config: lemon_vits8.yaml, view: {policy: a0}}
      common: {steps: 600, batch: 256}
      benchmarks:
        brca: {benchmark: brcam2c, root: data/brca-m2c}
    """

    recipes: dict[str, dict[str, Any]] = Field(
        description="name: words of train, and config=FILE, data=, without= (common words), eval="
    )
    reference: str = Field(
        "", description="recipe that the others are compared with; empty = the first"
    )
    common: dict[str, Any] = Field({}, description="words of train for all: the equal budget")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="seeds of every recipe")
    data: Path | None = Field(None, description="folder of shards; a recipe may have its own")
    benchmarks: dict[str, dict[str, Any]] = Field(
        description="name: words of eval, at least benchmark and root; of classes"
    )
    probe: str = Field("knn,logistic", description="probes, as in eval")
    floors: bool = Field(True, description="also measure the floors, once")
    only: str = Field("", description="names with commas: train these now; the table has all")
    out: Path = Field(Path("runs/study"), description="folder; the same words continue the study")
    jobs: int = Field(1, ge=1, description="runs at a time")
    threads: int = Field(1, ge=1, description="CPU threads of each run")
    draws: int = Field(2000, ge=100, description="draws of patients and seeds for intervals")
    seeds_by: Literal["t", "bootstrap"] = Field(
        "t", description="the seeds' part of intervals: Student's t, or seeds with replacement"
    )
    title: str = Field("Study", description="heading of the table")

    @model_validator(mode="after")
    def _fits(self) -> "Study":
        for name in (*self.recipes, *self.benchmarks):
            # No dot: recipes.a.b=… is two keys.
            if not re.fullmatch(r"\w[\w+-]*", name):
                raise ValueError(f"'{name}' names files: use letters, digits, '_', '+' and '-'.")
        if not self.recipes or not self.benchmarks or not self.seeds:
            raise ValueError("a study needs at least one of recipes, benchmarks and seeds.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds= has one seed twice.")
        for name in [self.reference] if self.reference else []:
            if name not in self.recipes:
                raise ValueError(f"reference={name} is no recipe; there are {self._names()}.")
        for name in self.chosen:
            if name not in self.recipes:
                raise ValueError(f"only= names '{name}'; the recipes are {self._names()}.")
        return self

    def _names(self) -> str:
        return ", ".join(self.recipes)

    @property
    def base(self) -> str:
        """The recipe that the others are compared with."""
        return self.reference or next(iter(self.recipes))

    @property
    def chosen(self) -> list[str]:
        """Recipes that are to be trained now, the reference first."""
        names = [name.strip() for name in self.only.split(",") if name.strip()]
        names = names or list(self.recipes)
        return sorted(names, key=lambda name: name != self.base)


@dataclass(frozen=True)
class Trial:
    """One recipe with one seed: the settings of its run and words of its evaluation."""

    recipe: str
    seed: int
    train: Train
    eval: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.train.out

    def beside(self, ending: str) -> Path:
        """A file beside the run folder."""
        return self.folder.parent / f"{self.name}{ending}"

    @property
    def encoder_hash(self) -> str | None:
        """Content hash of the finished encoder; None where there is none yet."""
        path = self.folder / "encoder" / "config.json"
        if not path.is_file():
            return None
        return str(json.loads(path.read_text(encoding="utf-8"))["lemon_muse"]["content_hash"])


def trials(cfg: Study, names: list[str] | None = None) -> list[Trial]:
    """The runs of these recipes (all by default): all with the first seed, then the next one.

    Raises:
        UserError: a recipe is no valid set of words, or has no data.
    """
    return [trial(cfg, name, seed) for seed in cfg.seeds for name in names or cfg.recipes]


def known(cfg: Study) -> list[Trial]:
    """The runs of all recipes that can be had: those not chosen may lack their shards."""
    names = []
    for name in cfg.recipes:
        try:
            trial(cfg, name, cfg.seeds[0])
        except UserError:
            if name in cfg.chosen:
                raise
            continue
        names.append(name)
    return trials(cfg, names)


def trial(cfg: Study, name: str, seed: int) -> Trial:
    """The run of one recipe and seed."""
    recipe = cfg.recipes[name]
    data = recipe.get("data") or cfg.data
    if data is None:
        raise UserError(f"recipe {name} has no shards: give data= or recipes.{name}.data=.")
    tree = read(Train, [recipe["config"]]) if recipe.get("config") else {}
    without = recipe.get("without") or []
    if unknown := [key for key in without if key not in cfg.common]:
        raise UserError(f"recipe {name} is without '{unknown[0]}', which is no common word.")
    merge(tree, {k: v for k, v in cfg.common.items() if k not in without})
    merge(tree, {k: v for k, v in recipe.items() if k not in OWN})
    own = {"data": str(data), "out": str(cfg.out / "runs" / f"{name}-{seed}"), "seed": seed}
    try:
        settings = validate(Train, {**tree, **own, "name": f"{name}-{seed}"})
    except UserError as error:
        raise UserError(f"recipe {name}: {error}") from None
    return Trial(name, seed, settings, dict(recipe.get("eval") or {}))


def merge(tree: dict[str, Any], words: dict[str, Any]) -> None:
    """Put words into a tree of words, in place: groups are joined, anything else is replaced.

    A key may be dotted, as on the command line.
    """
    for key, value in words.items():
        first, _, rest = key.partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, dict):
            group = tree.get(first)
            tree[first] = dict(group) if isinstance(group, dict) else {}
            merge(tree[first], value)
        else:
            tree[first] = copy.deepcopy(value)


def refuse_others(found: list[Trial]) -> None:
    """Runs in the folder must be those that are asked for.

    Raises:
        UserError: a run folder holds a run of other settings.
    """
    for one in found:
        path = one.folder / "config.yaml"
        if not path.is_file():
            continue
        before = validate(Train, yaml.safe_load(path.read_text(encoding="utf-8")))
        mine, other = _flat(one.train), _flat(before)
        differ = [
            f"{key}: {other.get(key)} -> {mine.get(key)}"
            for key in sorted(mine.keys() | other.keys())
            if mine.get(key) != other.get(key)
        ]
        if differ:
            raise UserError(
                f"{one.folder} holds a run with other settings ({'; '.join(differ[:3])}); remove "
                f"that folder, or give the study another out=."
            )


def _flat(train: Train) -> dict[str, Any]:
    """What decides the result, under dotted keys; the shards' place counts as well."""
    out: dict[str, Any] = {"data": str(train.data.resolve())}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if prefix + key in FREE:
                continue
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                out[prefix + key] = value

    walk(train.model_dump(mode="json"), "")
    return out
