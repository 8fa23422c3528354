"""Settings: strict, explained, printable, and every one of them read by some code."""

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from launch import cli
from lemon_muse.config import Config, dump, flat_keys, help_text, load
from lemon_muse.errors import UserError
from lemon_muse.methods import METHODS
from lemon_muse.recipe import LemonTrain, Train
from lemon_muse.recipe_muse import MuseTrain

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


class Inner(Config):
    """Inner things."""

    rate: float = Field(1.0, gt=0, description="a rate, 1/s")


class Outer(Config):
    """Outer things."""

    count: int = Field(3, description="how many")
    inner: Inner = Field(Inner(), description="inner")
    place: Path | None = Field(None, description="a folder")


def test_words_override_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "count: 5\ninner: {rate: 1e-3}\n"
    )  # PyYAML reads 1e-3 as text; the type mends it
    cfg = load(Outer, [str(file), "count=7", "place=/x=y"])
    assert (cfg.count, cfg.inner.rate, cfg.place) == (7, 1e-3, Path("/x=y"))


def test_what_is_printed_can_be_fed_back(tmp_path: Path) -> None:
    cfg = load(Outer, ["inner.rate=0.25", "place=/tmp"])
    (tmp_path / "b.yaml").write_text(dump(cfg))
    assert load(Outer, [str(tmp_path / "b.yaml")]) == cfg


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inner.rat=2"], "unknown key 'inner.rat'; did you mean 'inner.rate'?"),
        (["conut=2"], "unknown key 'conut'; did you mean 'count'?"),
        (["count=many"], "'count' is 'many': input should be a valid integer"),
        (["inner.rate=-1"], "'inner.rate' is -1: input should be greater than 0"),
        (["count"], "'count' is neither key=value nor a YAML file"),
        (["nowhere.yaml"], "there is no file 'nowhere.yaml'"),
        (["inner=3"], "'inner' is 3"),
    ],
)
def test_mistakes_are_one_clear_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        load(Outer, words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_off_and_no_are_words_and_false_is_not() -> None:
    class Switch(Config):
        """A switch."""

        mode: Literal["on", "off", "no"] = Field("on", description="a word")
        flag: bool = Field(True, description="a flag")

    assert load(Switch, ["mode=off", "flag=false"]) == Switch(mode="off", flag=False)
    assert load(Switch, ["mode=no"]).mode == "no"


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: [1,\n")
    with pytest.raises(UserError, match=r"c\.yaml is not readable YAML"):
        load(Outer, [str(tmp_path / "c.yaml")])


def test_help_shows_every_key_with_its_default() -> None:
    text = help_text(Outer)
    for key in flat_keys(Outer):
        assert key in text
    assert "a rate, 1/s" in text and "default 1.0" in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_loads_and_opens_with_its_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert first.startswith("#") and re.search(r"(lemon-muse|-m launch\.cli) train", first)
    assert "score" in first.lower()
    cfg = load(Train, [str(path), "data=somewhere"])
    assert load(Train, [str(path), "data=somewhere"]) == cfg


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


def all_models() -> list[type[Config]]:
    """The settings of every job, for every method where they depend on it."""
    import importlib

    jobs = [getattr(importlib.import_module(m), name) for m, name, _ in cli.JOBS.values()]
    trees: list[dict[str, Any]] = [{}, *({"method": {"name": name}} for name in METHODS)]
    return list(dict.fromkeys(job.variant(tree) for job in jobs for tree in trees))


def test_the_models_are_those_that_runs_get() -> None:
    found = set(all_models())
    assert found >= {LemonTrain, MuseTrain} and Train not in found


def test_every_field_is_read_by_some_code() -> None:
    """A key that nobody reads would be accepted and ignored."""
    source = "".join(
        p.read_text(encoding="utf-8")
        for room in ("lemon_muse", "data_prep", "eval", "launch")
        for p in (ROOT / room).rglob("*.py")
    )
    unread = []
    for model in all_models():
        for key in flat_keys(model):
            leaf = key.split(".")[-1]
            if not re.search(rf"\.{leaf}\b(?!\s*=[^=])|\.get\(\"{leaf}\"\)", source):
                unread.append(f"{model.__name__}.{key}")
    assert not unread


def test_every_field_says_what_it_is() -> None:
    def walk(model: type[Config], prefix: str) -> list[str]:
        bare = []
        for name, field in model.model_fields.items():
            bare += [] if field.description else [prefix + name]
            default = field.get_default(call_default_factory=True)
            if isinstance(default, Config):
                bare += walk(type(default), f"{prefix}{name}.")
        return bare

    assert not [name for model in all_models() for name in walk(model, f"{model.__name__}.")]


def test_colons_are_no_numbers_to_the_base_of_sixty() -> None:
    from lemon_muse.config import _read_value

    given = ["7:8", "12:30.5", "10", "-3", "0x10", "1.5", "1.0e-3", "true", "null", "1_000"]
    found = [_read_value("key", text) for text in given]
    assert found == ["7:8", "12:30.5", 10, -3, 16, 1.5, 1e-3, True, None, 1000]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.name=muse", "view.policy=size"], "goes with method.name=moco_v3 or dinov2; see"),
        (["view.placement=anchored"], "method.name=moco_v3 has no such key, it goes with "),
        (["method.name=muse", "method.crop_backbone={patch: 4}"], "goes with method.name=joint;"),
        (["method.name=muse", "view.placment=anchored"], "did you mean 'view.placement'?"),
        (["view.gaussians=5"], "'gaussians' has no effect: 'restain', its probability, is 0."),
    ],
)
def test_a_key_that_does_not_belong_is_named_as_such(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        load(Train, ["data=somewhere", *words])
    assert said in str(error.value) and not re.search(r"\n|\.\.$", str(error.value))
