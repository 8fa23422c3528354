"""The command: overview, help of every job, exit codes, near names."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from lemon_muse import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0 and cli.main(["--version"]) == 0
    said = capsys.readouterr().out
    assert all(job in said for job in cli.JOBS) and said.strip().endswith(__version__)


@pytest.mark.parametrize("job", cli.JOBS)
def test_help_of_every_job(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*job.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: lemon-muse {job}" in said and "default" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "there is no job 'trian'; did you mean 'train'?"),
        (["prep"], "'prep' needs a second word; use one of: prep all, prep manifest,"),
        (["train"], "'data' is required"),
        (["train", "nowhere.yaml"], "there is no file 'nowhere.yaml'"),
    ],
)
def test_wrong_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_print_config_can_be_fed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "demo.yaml", "data=d", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(printed)
    assert cli.main(["train", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_from_another_folder_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("lemon-muse: there is no job")


def test_a_defect_is_exit_1_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(words: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run_job", broken)
    assert cli.main(["train"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "defect of lemon-muse" in said
