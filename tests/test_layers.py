"""The rooms and who may call whom (DESIGN: launch -> {data_prep, eval} -> lemon_muse)."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "lemon_muse": {"lemon_muse"},
    "data_prep": {"lemon_muse", "data_prep"},
    "eval": {"lemon_muse", "eval"},
    "launch": {"lemon_muse", "data_prep", "eval", "launch"},
}
FILES = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Dotted names of every import in a file, late ones too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots & ROOMS.keys() <= ROOMS[room]


def test_methods_import_no_data_reader() -> None:
    readers = {"lemon_muse.data.shards", "lemon_muse.data.reader", "lemon_muse.data.table"}
    for path in (ROOT / "lemon_muse" / "methods").glob("*.py"):
        assert not imported(path) & readers, path


@pytest.mark.parametrize("name", ["schedules.py", "data/geometry.py"])
def test_the_lowest_floor_knows_only_torch_and_numpy(name: str) -> None:
    allowed = {"torch", "numpy", "math", "collections", "typing"}
    assert {n.split(".")[0] for n in imported(ROOT / "lemon_muse" / name)} <= allowed


def test_every_package_is_installed() -> None:
    listed = configparser.ConfigParser()
    listed.read(ROOT / "setup.cfg")
    packages = set(listed["options"]["packages"].split())
    found = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for p in (ROOT / room).rglob("__init__.py")
    }
    assert packages == found | {"lemon_muse.configs"}


def test_import_has_no_side_effect_and_help_is_light() -> None:
    """`lemon-muse --help` must not load torch: it answers in a fraction of a second."""
    code = (
        "import sys, launch.cli; launch.cli.main(['--help']); "
        "heavy = {'torch', 'sklearn', 'timm', 'matplotlib', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prep crops" in done.stdout
