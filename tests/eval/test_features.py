"""Features: row order, batches, the cache on disk."""

from pathlib import Path

import numpy as np
import pytest

from eval import features as features_module
from eval.benchmarks.folder import Folder
from lemon_muse.errors import RunError
from lemon_muse.synthetic import write_images
from tests.eval.standins import TinyEncoder


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    write_images(folder, slides=4, side=256, seed=3)
    return folder


def test_features_are_in_table_order_and_ignore_batch_and_threads(tissue: Path) -> None:
    table = Folder().load(tissue)
    net = TinyEncoder()
    found = features_module.features(net, table, batch=7, workers=2)
    one = [features_module.encode(net.eval(), table.crops(40, 0.25, np.array([i]))) for i in (0, 9)]
    np.testing.assert_allclose(found[[0, 9]], np.concatenate(one), atol=1e-5)
    np.testing.assert_allclose(found, features_module.features(net, table), atol=1e-5)
    assert found.dtype == np.float32 and net.seen[0][1:] == (3, 40, 40)
    assert max(shape[0] for shape in net.seen[:5]) <= 7


def test_non_finite_features_stop_the_job(tissue: Path) -> None:
    net = TinyEncoder()
    net.layer.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        features_module.features(net, Folder().load(tissue))


def test_the_cache_is_used_and_a_damaged_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.arange(6, dtype=np.float32).reshape(3, 2)

    path = tmp_path / "deep" / "a.npy"
    for _ in range(2):
        np.testing.assert_array_equal(features_module.cached(path, compute, rows=3), compute())
    assert len(calls) == 3  # twice by the comparison above, once by the cache
    path.write_bytes(path.read_bytes()[:-5])
    features_module.cached(path, compute, rows=3)
    assert "damaged" in caplog.text
    assert len(calls) == 4
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.json", "a.npy"]
