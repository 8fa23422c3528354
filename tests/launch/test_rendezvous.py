"""Ranks meet at a file: groups do not mix, and who does not come is named in time."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Sums a number over the ranks, or says why it cannot.
RANK = """
import sys, time, torch
from lemon_muse import distributed
from lemon_muse.errors import RunError
began = time.monotonic()
try:
    with distributed.process_group("cpu"):
        print(distributed.sum_over_ranks(torch.tensor([float(sys.argv[1])])).item())
except RunError as error:
    print(f"{time.monotonic() - began:.0f}|{error}")
    sys.exit(1)
"""
WAIT_S = 4


def start(file: Path, rank: int, world: int, number: int = 0, **more: str) -> subprocess.Popen:
    env = {
        **{k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LEMON_MUSE_RENDEZVOUS": str(file),
        "LEMON_MUSE_HOST": "127.0.0.1",
        **more,
    }
    words = [sys.executable, "-c", RANK, str(number)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def told() -> Iterator:
    """What a process prints, once it has ended; none outlives the test."""
    begun: list[subprocess.Popen] = []

    def wait(*processes: subprocess.Popen, code: int) -> list[str]:
        begun.extend(processes)
        said = [process.communicate(timeout=240) for process in processes]
        assert [process.returncode for process in processes] == [code] * len(said), said
        return [out.strip() for out, _ in said]

    yield wait
    for process in begun:
        process.kill()


def test_two_groups_meet_at_once_and_an_old_file_does_not_mislead(told, tmp_path: Path) -> None:
    # The file of a start that has ended: nobody listens at its port.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    old = tmp_path / "a.json"
    old.write_text(json.dumps({"host": "127.0.0.1", "port": port}))
    # Ranks 1 come first, and find the old file and none.
    first, third = start(old, 1, 2, 10), start(tmp_path / "b.json", 1, 2, 30)
    second, fourth = start(old, 0, 2, 1), start(tmp_path / "b.json", 0, 2, 3)
    assert told(first, second, third, fourth, code=0) == ["11.0", "11.0", "33.0", "33.0"]
    assert json.loads(old.read_text())["port"] != port


def test_who_does_not_come_is_named_in_time(told, tmp_path: Path) -> None:
    wait = {"LEMON_MUSE_RENDEZVOUS_S": str(WAIT_S)}
    alone = start(tmp_path / "c.json", 0, 3, **wait)
    orphan = start(tmp_path / "d.json", 1, 2, **wait)
    leader, orphaned = told(alone, orphan, code=1)
    assert f"waited {WAIT_S} s for rank(s) 1, 2 of 3" in leader
    assert f"waited {WAIT_S} s for {tmp_path / 'd.json'}, which rank 0 writes" in orphaned
    for said in (leader, orphaned):
        assert WAIT_S <= int(said.split("|")[0]) <= 10 * WAIT_S and said.count("\n") == 0


def test_a_wrong_interface_is_a_sentence(told, tmp_path: Path) -> None:
    both = [start(tmp_path / "e.json", r, 2, GLOO_SOCKET_IFNAME="none0") for r in (0, 1)]
    for said in told(*both, code=1):
        assert "did not meet" in said and "none0" in said and "GLOO_SOCKET_IFNAME" in said
