"""Shards: what is written is read, by us, by webdataset, by tar and numpy; damage is found."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from lemon_muse.data import codec, shards
from lemon_muse.data.order import Order, part
from lemon_muse.data.reader import BlockReader, CropBatches
from lemon_muse.data.writer import ShardWriter
from lemon_muse.errors import RunError, UserError
from tests.conftest import blob_columns, blobs, write_blob_shards


def flip(path: Path, at: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[at] ^= 0x10
    path.write_bytes(payload)


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_round_trip(encoding: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = [blobs(n, 32, rng) for n in (64, 64, 37)]
    with ShardWriter(
        tmp_path, size=32, mpp=0.25, encoding=encoding, quality=98, shard_bytes=300_000
    ) as writer:
        for i, pixels in enumerate(written):
            writer.write(pixels, blob_columns(64 * i, len(pixels)))
    index = shards.open_index(tmp_path)
    assert index.count == 165 and list(index.blocks["count"]) == [64, 64, 37]
    reader = BlockReader(index)
    for i, pixels in enumerate(written):
        got = reader.pixels(i)
        if encoding == "raw":
            np.testing.assert_array_equal(got, pixels)
        else:
            assert np.abs(got.astype(int) - pixels).mean() < 4
        np.testing.assert_array_equal(reader.columns(i)["id"], 64 * i + np.arange(len(pixels)))
    everything = np.concatenate(written).reshape(-1, 3) / 255
    np.testing.assert_allclose(index.header["mean"], everything.mean(0), atol=1e-6)
    np.testing.assert_allclose(index.header["std"], everything.std(0), atol=1e-6)


def test_plain_webdataset_and_plain_tar_read_them(crop_shards: Path) -> None:
    index = shards.open_index(crop_shards)
    reader = BlockReader(index)
    urls = [str(index.shard(i)) for i in range(len(index.header["shards"]))]
    for block, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False).decode()):
        np.testing.assert_array_equal(sample["pixels.npy"], reader.pixels(block))
        assert set(sample["meta.npz"]) == set(shards.COLUMNS)
    assert block == len(index.blocks) - 1
    with tarfile.open(urls[0]) as tar:
        member = tar.extractfile("000000000003.pixels.npy")
        assert member is not None
        np.testing.assert_array_equal(np.load(io.BytesIO(member.read())), reader.pixels(3))
        assert {m.mtime for m in tar.getmembers()} == {0}  # reproducible, and no PAX headers


def test_cells_of_a_jpeg_sheet_do_not_leak() -> None:
    """The same crop beside black and beside noise decodes to the same pixels."""
    rng = np.random.default_rng(1)
    one = blobs(1, 64, rng)
    beside = [np.zeros((31, 64, 64, 3), np.uint8), rng.integers(0, 256, (31, 64, 64, 3), np.uint8)]
    decoded = []
    for others in beside:
        _, payload = codec.encode(np.concatenate([others[:7], one, others[7:]]), "jpeg", 90)
        decoded.append(codec.decode(np.frombuffer(payload, np.uint8), "jpeg", 32, 64)[7])
    np.testing.assert_array_equal(*decoded)


def test_each_nucleus_once_a_pass_and_windows_mix() -> None:
    counts = np.array([64] * 30 + [17])
    order = Order(counts, seed=5, batch=48, window=8)
    starts = np.concatenate([[0], np.cumsum(counts)])
    passes = []
    for first in (0, order.steps_a_pass):
        seen = []
        for step in range(first, first + order.steps_a_pass):
            block, row = order.batch_at(step)
            assert len(block) == 48 and len(np.unique(block)) >= 6
            assert (row < counts[block]).all()
            seen.append(starts[block] + row)
        flat = np.concatenate(seen)
        assert len(np.unique(flat)) == len(flat) == counts.sum() // 48 * 48
        passes.append(flat)
    assert not np.array_equal(*passes)  # another permutation each pass


def test_the_order_is_a_pure_function(crop_shards: Path) -> None:
    """Asked in any sequence, by any reader, a step gives the same samples."""
    index = shards.open_index(crop_shards)
    a = CropBatches(index, seed=1, batch=32, window=3, rank=0, world=1, workers=2)
    forward = [b["samples"] for b in a.iterate(0, 50)]
    b = CropBatches(index, seed=1, batch=32, window=3, rank=0, world=1, workers=0)
    for step in (49, 3, 21, 22, 0):
        got = b.batch_at(step)
        np.testing.assert_array_equal(got["samples"], forward[step])
    reader = BlockReader(index)
    blocks, rows = index.locate(got["samples"])
    plain = np.stack([reader.pixels(int(i))[r] for i, r in zip(blocks, rows, strict=True)])
    np.testing.assert_array_equal(got["pixels"], plain)


def test_uneven_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be split evenly over 3 ranks"):
        part(32, 0, 3)


def test_a_writer_that_dies_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def die() -> None:
        with ShardWriter(tmp_path, size=32, mpp=0.25) as writer:
            writer.write(blobs(8, 32, rng), blob_columns(0, 8))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        die()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"has no index\.json"):
        shards.open_index(tmp_path)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    writer = ShardWriter(tmp_path, size=32, mpp=0.25)

    def full(name: str, payload: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_member", full)
    with pytest.raises(RunError, match=r"the disk is full; make room"), writer:
        writer.write(blobs(8, 32, rng), blob_columns(0, 8))
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "index.json").exists()


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the set would be empty"):
        ShardWriter(tmp_path, size=32, mpp=0.25).close()


def test_damage_is_found(tmp_path: Path) -> None:
    folder = write_blob_shards(tmp_path / "set", count=200)
    tar = folder / "crops-00000-000.tar"
    whole = tar.read_bytes()

    flip(tar, 5000)
    index = shards.open_index(folder)
    reader = BlockReader(index)
    reader.columns(0)  # intact metadata says nothing of the pixels
    with pytest.raises(RunError, match=r"block 0 of .* has changed since it was written"):
        reader.pixels(0)

    tar.write_bytes(whole[:-4096])
    with pytest.raises(UserError, match=r"bytes long instead of"):
        shards.open_index(folder)
    tar.unlink()
    with pytest.raises(UserError, match="is missing"):
        shards.open_index(folder)
    tar.write_bytes(whole)

    blocks = folder / "blocks.npy"
    kept = blocks.read_bytes()
    flip(blocks, 200)
    with pytest.raises(UserError, match=r"does not belong to its index\.json"):
        shards.open_index(folder)
    blocks.write_bytes(kept)

    header = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**header, "schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        shards.open_index(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        shards.open_index(folder)


def test_sheets_need_whole_jpeg_blocks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 16"):
        ShardWriter(tmp_path, size=60, mpp=0.25, encoding="jpeg")


def test_batches_name_the_slide_of_each_sample(crop_shards: Path) -> None:
    index = shards.open_index(crop_shards)
    batches = CropBatches(index, seed=3, batch=24, window=4, rank=1, world=2, workers=0)
    assert "slide" not in batches.batch_at(0)
    batches.with_slides = True
    names = list(index.slides)
    assert names == sorted(names) and len(names) > 1
    batch = batches.batch_at(2)
    for sample, number in zip(batch["samples"], batch["slide"], strict=True):
        block, row = index.locate(np.array([sample]))
        assert batches.reader.columns(int(block[0]))["slide"][row[0]] == names[number]
