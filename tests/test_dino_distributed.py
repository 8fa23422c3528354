"""K gloo ranks with unequal numbers of nuclei, or none, equal one process that has them all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import dino_worker
from tests.dino_worker import REDUCTIONS, SCENES, Arrays

ROOT = Path(__file__).resolve().parents[1]


def ranks(world: int, out: Path) -> list[Arrays]:
    """What each of `world` processes saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "dino_worker.py"), str(out)],
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    return [dict(np.load(out / f"rank{r}.npz")) for r in range(world)]


@pytest.fixture(scope="module")
def one() -> Arrays:
    return dino_worker.observe(0, 1)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(world: int, one: Arrays, tmp_path: Path) -> None:
    seen = ranks(world, tmp_path)
    for name in SCENES:
        counts = [int(r.pop(f"{name}/rows")) for r in seen]
        assert sum(counts) == one[f"{name}/rows"]
        assert len(set(counts)) > 1 or name == "nothing"
        assert (counts[-1] == 0) == (name in ("nothing", "one rank has none"))
    for rank in seen:
        assert rank.keys() == one.keys() - {f"{name}/rows" for name in SCENES}
        for key, value in rank.items():
            rounding = 1e-6 + 1e-5 * float(np.abs(one[key]).max())
            np.testing.assert_allclose(value, one[key], rtol=0, atol=rounding, err_msg=key)
            np.testing.assert_array_equal(value, seen[0][key], err_msg=key)  # bit for bit


def test_one_process_saw_something(one: Arrays) -> None:
    """What the ranks are compared with is neither empty nor the same for every reduction."""
    for name in SCENES:
        empty = name == "nothing"
        assert (one[f"{name}/pair/pairs"] == 0) == empty
        gradients = [one[f"{name}/{r}/grad head.last_layer.weight_v"] for r in REDUCTIONS]
        for i, gradient in enumerate(gradients):
            assert gradient.any() != empty
            for other in gradients[:i]:
                assert np.array_equal(gradient, other) == empty
        assert one[f"{name}/pair/grad image_head.last_layer.weight_v"].any()
        assert one[f"{name}/sinkhorn"].any() != empty
    assert one["nothing/centre"].any() == 0 < np.abs(one["unequal/centre"]).max()
    with_rows, after = one["one rank has none/centre"], one["unequal again/centre"]
    assert not np.allclose(with_rows, after)
