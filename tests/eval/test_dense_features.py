"""Features read off maps: windows, squares and batches against one nucleus cut out by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from eval import dense
from eval.dense import dense_features, windows_of
from lemon_muse.data import geometry
from lemon_muse.data.table import Table, read_image
from lemon_muse.errors import RunError
from tests.eval.standins import dense_encoder

# Width, height and mpp of the images; the last is smaller than any window.
IMAGES = [(150, 131, 0.5), (260, 300, 0.25), (64, 128, 0.5), (43, 50, 0.5)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Coloured noise, and nuclei everywhere up to the very border."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(1)
    paths, xy = [], []
    for i, (width, height, _) in enumerate(IMAGES):
        rough = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3)).astype(np.uint8)
        image = np.kron(rough, np.ones((5, 5, 1), np.uint8))[:height, :width]
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(image).save(paths[-1])
        points = rng.random((12, 2)) * (width, height)
        points[:3] = (0, 0), (width, height), (width, 0)
        xy.append(points)
    n = np.repeat(np.arange(len(IMAGES)), 12)
    order = rng.permutation(len(n))  # the rows of an image do not stand together
    n, points = n[order], np.concatenate(xy)[order]
    names = np.array([f"p{i}" for i in n])
    return Table(
        image=np.array(paths)[n],
        x=points[:, 0],
        y=points[:, 1],
        mpp=np.array([mpp for _, _, mpp in IMAGES])[n],
        label=n % 2,
        patient=names,
        slide=names,
        split=np.full(len(n), "train"),
        classes=("a", "b"),
    )


def mirrored(image: np.ndarray, start: int, window: int, axis: int) -> np.ndarray:
    """`window` pixels from `start` along an axis of an image that goes on as in a mirror."""
    side = image.shape[axis]
    place = np.arange(start, start + window) % (2 * side)
    return np.take(image, np.where(place < side, place, 2 * side - 1 - place), axis)


def by_hand(encoder: torch.nn.Module, table: Table, row: int, window: int, valid: int) -> tuple:
    """Feature and square (x, y of its corner) of one nucleus at 0.5 µm/px, without `eval.dense`."""
    image = read_image(Path(table.image[row]))
    image, scale = geometry.resample(image, source_mpp=float(table.mpp[row]), mpp=0.5)
    point = np.array([table.x[row], table.y[row]]) * scale
    corner = []
    for at, side in zip(point, (image.shape[1], image.shape[0]), strict=True):
        corners = list(range(0, max(side - valid, 0) + 1, valid)) if side >= valid else []
        if not corners:
            corner.append((side - valid) // 2)
            continue
        if corners[-1] + valid < side:
            corners.append(side - valid)
        # The first square that holds it; the last one also holds the very border.
        holds = [c for c in corners if at < c + valid]
        corner.append(holds[0] if holds else corners[-1])
    start = [c - (window - valid) // 2 for c in corner]
    pixels = mirrored(mirrored(image, start[0], window, 1), start[1], window, 0)
    images = torch.tensor(pixels).permute(2, 0, 1)[None] / 255
    images = (images - torch.tensor(encoder.mean)[:, None, None]) / torch.tensor(encoder.std)[
        :, None, None
    ]
    grid = 2 * torch.tensor((point - start) / window, dtype=torch.float32) - 1
    with torch.inference_mode():
        maps = encoder.network(images)[1]
        found = F.grid_sample(
            maps,
            grid[None, None, None],
            padding_mode="border",
            align_corners=encoder.settings.convention == "released",
        )
    return found.flatten().numpy(), tuple(corner)


@pytest.mark.parametrize("convention", ["released", "centre"])
@pytest.mark.parametrize(("window", "valid"), [(64, 64), (96, 64), (96, 50), (128, 33)])
def test_every_nucleus_equals_a_window_cut_by_hand(
    table: Table, window: int, valid: int, convention: str
) -> None:
    encoder = dense_encoder(convention=convention)
    found = dense_features(encoder, table, window=window, valid=valid, mpp=0.5, batch=30)
    assert found.shape == (len(table), encoder.dim) and found.dtype == np.float32
    wanted = np.stack([by_hand(encoder, table, i, window, valid)[0] for i in range(len(table))])
    assert np.abs(wanted).mean() > 0.05
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_context_changes_features_and_the_square_does_not_hide_it(table: Table) -> None:
    encoder = dense_encoder()
    narrow = dense_features(encoder, table, window=64, valid=64, mpp=0.5)
    wide = dense_features(encoder, table, window=128, valid=64, mpp=0.5)
    apart = np.abs(narrow - wide).max(1)
    assert (apart > 1e-2).mean() > 0.9


def test_neither_batch_nor_threads_change_anything(table: Table) -> None:
    encoder = dense_encoder()
    size = {"window": 96, "valid": 64, "mpp": 0.5}
    first = dense_features(encoder, table, **size, batch=1)  # type: ignore[arg-type]
    second = dense_features(encoder, table, **size, batch=4096, workers=2)  # type: ignore[arg-type]
    np.testing.assert_allclose(first, second, atol=1e-4)
    half = dense_features(encoder, table, **size, bf16=True)  # type: ignore[arg-type]
    assert 0 < np.abs(half - first).max() < 0.2 * np.abs(first).max()


def test_squares_share_no_nucleus_and_hold_them_all(table: Table) -> None:
    seen: list[int] = []
    for part in windows_of(table, window=96, valid=64, mpp=0.5):
        assert part.pixels.shape[1:] == (96, 96, 3) and (np.diff(part.owner) >= 0).all()
        assert set(part.owner) == set(range(len(part)))
        assert (part.points >= 16).all() and (part.points <= 80).all()
        seen += part.rows.tolist()
    assert sorted(seen) == list(range(len(table)))


def test_a_part_of_the_windows_keeps_their_nuclei(table: Table) -> None:
    every = dense.joined(list(windows_of(table, window=64, valid=64, mpp=0.5)))
    chosen = np.array([5, 0, 3])
    part = every.part(chosen)
    np.testing.assert_array_equal(part.pixels, every.pixels[chosen])
    for i, window in enumerate(chosen):
        mine = every.owner == window
        np.testing.assert_array_equal(part.rows[part.owner == i], every.rows[mine])
        np.testing.assert_array_equal(part.points[part.owner == i], every.points[mine])
    assert len(part.rows) == np.isin(every.owner, chosen).sum()


def test_numbers_that_are_not_finite_are_said(table: Table) -> None:
    encoder = dense_encoder()
    encoder.network.decoder.hyper_feats.conv_list[0].layer[1].running_var.fill_(-1)  # type: ignore
    with pytest.raises(RunError, match="not finite for 48 of 48"):
        dense_features(encoder, table, window=64, valid=64, mpp=0.5)
    with pytest.raises(ValueError, match="at most window=64"):
        dense_features(encoder, table, window=64, valid=96, mpp=0.5)
    with pytest.raises(RunError, match="no nucleus"):
        empty = table.take(np.array([], np.int64))
        dense_features(encoder, empty, window=64, valid=64, mpp=0.5)
