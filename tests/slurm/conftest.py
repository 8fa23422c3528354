"""A real SLURM of two nodes on loopback for the tests that carry the marker `slurm`."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import write_blob_shards
from tests.slurm.drill import Cluster

HERE = Path(__file__).resolve().parent
# Unix sockets live below it and have short names: not pytest's tmp_path.
STATE = Path("/tmp/lemon-slurm")
# Another cluster (of another checkout) may hold the script's usual ports.
PORT = "37810"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The running cluster; a skip with the reason where it cannot be had."""
    given = {**os.environ, "SLURM_CI_PORT": PORT, "SLURM_CI_GPUS": "8"}
    up = subprocess.run(
        ["bash", HERE / "up.sh", STATE], capture_output=True, text=True, env=given, timeout=600
    )
    if up.returncode:
        reason = (up.stderr.strip().splitlines() or ["no word"])[-1]
        pytest.skip(f"no SLURM here: {reason}")
    folder = tmp_path_factory.mktemp("slurm")
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SUBMITIT"))},
        "SLURM_CONF": str(STATE / "etc" / "slurm.conf"),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(HERE.parents[1]),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    try:
        yield Cluster(folder, env, STATE, sys.executable)
    finally:
        subprocess.run(["bash", HERE / "down.sh", STATE, "--purge"], capture_output=True)


@pytest.fixture(scope="session")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small crop shards."""
    return write_blob_shards(tmp_path_factory.mktemp("crops") / "crops")


@pytest.fixture(scope="session")
def unbroken(cluster: Cluster, crops: Path) -> Path:
    """The run folder of a training on two nodes that nothing has disturbed."""
    out = cluster.folder / "unbroken"
    sent = cluster.submit(["nodes=2"], cluster.train(crops, out))
    cluster.wait(sent, "done", seconds=240)
    return out


@pytest.fixture(autouse=True)
def _between() -> Iterator[None]:
    """A job that has ended still holds its nodes for a moment."""
    yield
    time.sleep(0.5)
