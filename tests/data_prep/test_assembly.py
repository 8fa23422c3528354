"""Parts, groups and index: killed anywhere, shared by processes, extended; always the same set."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import assembly, check, claims, crops, manifest, nuclei
from data_prep.nuclei_table import read_table
from data_prep.pool import in_processes
from data_prep.sources import Source, open_sources
from lemon_muse.data.reader import BlockReader
from lemon_muse.data.shards import open_index
from lemon_muse.data.slides import open_slide
from lemon_muse.errors import RunError, UserError
from tests.data_prep.conftest import SLIDES, prepared

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"block": 64, "group": 2, "shard_mb": 1, "size": 48}


def prep(data: Path, out: Path, **changes: object) -> Path:
    return crops.run(crops.Crops(data=data, out=out, **{"workers": 0, **SMALL, **changes}))  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def everything(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    index = open_index(folder)
    reader = BlockReader(index)
    columns = [reader.columns(b) for b in range(len(index.blocks))]
    joined = {k: np.concatenate([c[k] for c in columns]) for k in columns[0]}
    return np.concatenate([reader.pixels(b) for b in range(len(index.blocks))]), joined


@pytest.fixture(scope="module")
def unbroken(nuclei_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prep(nuclei_folder, tmp_path_factory.mktemp("set") / "crops")


def command(data: Path, out: Path, workers: int = 1) -> list[str]:
    words = [f"{k}={v}" for k, v in SMALL.items()]
    start = [sys.executable, "-m", "launch.cli", "prep", "crops"]
    return [*start, f"data={data}", f"out={out}", f"workers={workers}", *words]


def test_every_nucleus_of_every_slide_once_with_its_pixels(
    unbroken: Path, nuclei_folder: Path, slide_folder: Path
) -> None:
    pixels, columns = everything(unbroken)
    count = 0
    for number in range(SLIDES):
        name = f"case{number // 2}-{number}"
        table = read_table(nuclei_folder / f"{name}.parquet")
        here = np.flatnonzero(columns["slide"] == name)
        order = here[np.argsort(columns["id"][here])]
        np.testing.assert_array_equal(columns["id"][order], np.sort(table.id))
        assert set(columns["patient"][here]) == {name[:5]}
        count += len(here)
        with open_slide(slide_folder / f"{name}.svs") as slide:
            for row in order[::17]:  # against the slide read by itself
                x, y = float(columns["x"][row]), float(columns["y"][row])
                left, top = (int(np.floor(v - 24 + 0.5)) for v in (x, y))
                if left >= 0 and top >= 0 and max(left, top) + 48 <= 900:
                    plain = slide.read(0, left, top, 48, 48)
                    np.testing.assert_array_equal(pixels[row], plain)
    assert count == len(pixels)


def test_blocks_mix_the_slides_of_a_group(unbroken: Path) -> None:
    index = open_index(unbroken)
    assert len(index.header["groups"]) == 3
    reader = BlockReader(index)
    mixed = [len(set(reader.columns(b)["slide"])) for b in range(len(index.blocks))]
    assert max(mixed) == 2 and np.mean(mixed) > 1.4
    assert all("vectors" in slide["stain"] for slide in index.header["slides"].values())
    assert not (unbroken / "work").exists()


@pytest.mark.slow
def test_killed_ten_times_at_random_it_is_the_unbroken_set(
    unbroken: Path, nuclei_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "crops"
    dice = random.Random(0)
    killed = 0
    for _ in range(10):
        job = subprocess.Popen(
            command(nuclei_folder, out),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Most of the time goes into imports: kill from the moment at which it writes.
        deadline = time.monotonic() + 60
        while not (out / "plan.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 4))
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            killed += 1
        job.wait()
        if (out / "index.json").is_file():
            open_index(out)  # what looks finished is finished
            if killed < 10:
                shutil.rmtree(out)
    assert killed >= 5
    assert subprocess.run(command(nuclei_folder, out), cwd=ROOT, check=False).returncode == 0
    assert files(out) == files(unbroken)


def test_killed_after_each_piece_it_is_the_unbroken_set(
    unbroken: Path, nuclei_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deterministic kills: the job dies after the n-th replaced file, for every n that there is."""
    out = tmp_path / "crops"
    died = 0
    real = Path.replace
    for limit in range(1, 60):
        left = [limit % 7 + 1]

        def replace(self: Path, target: Path, left: list[int] = left) -> Path:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replace)
        try:
            prep(nuclei_folder, out)
            break
        except KeyboardInterrupt:
            died += 1
            assert not (out / "index.json").is_file()
    assert died >= 4 and files(out) == files(unbroken)


def test_two_processes_share_the_work(unbroken: Path, nuclei_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "crops"
    jobs = [
        subprocess.Popen(
            command(nuclei_folder, out, workers=0), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    assert files(out) == files(unbroken)


def test_without_locks_nothing_is_corrupted(
    unbroken: Path, nuclei_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", refuse)
    assert files(prep(nuclei_folder, tmp_path / "crops")) == files(unbroken)


def test_new_slides_extend_the_set(slide_folder: Path, tmp_path: Path) -> None:
    some = tmp_path / "slides"
    some.mkdir()
    every = sorted(slide_folder.iterdir())
    for path in every[:6]:  # three slides with their nuclei
        os.link(path, some / path.name)
    out = prep(prepared(some, tmp_path / "p"), tmp_path / "crops")
    before, count = files(out), open_index(out).count
    for path in every[6:]:
        os.link(path, some / path.name)
    prep(prepared(some, tmp_path / "p"), out)
    after = files(out)
    assert all(after[name] == bytes_ for name, bytes_ in before.items() if name.endswith(".tar"))
    _, columns = everything(out)
    assert len(set(columns["slide"])) == SLIDES and open_index(out).count > count
    pairs = set(zip(columns["slide"].tolist(), columns["id"].tolist(), strict=True))
    assert len(pairs) == len(columns["id"])


def test_changed_nuclei_and_a_foreign_set_are_refused(
    slide_folder: Path, unbroken: Path, tmp_path: Path
) -> None:
    some = tmp_path / "slides"
    shutil.copytree(slide_folder, some)
    out = prep(prepared(some, tmp_path / "p"), tmp_path / "crops")
    first = min(some.glob("*.geojson"))
    lines = first.read_text().splitlines()
    first.write_text("\n".join([lines[0], *lines[2:]]))
    with pytest.raises(UserError, match="have changed since they were cut"):
        prep(prepared(some, tmp_path / "p"), out)
    foreign = tmp_path / "foreign"
    shutil.copytree(unbroken, foreign)
    (foreign / "plan.json").unlink()
    with pytest.raises(UserError, match="of another making"):
        prep(prepared(some, tmp_path / "p"), foreign)


def test_a_broken_slide_stops_no_other_and_can_be_mended(
    slide_folder: Path, tmp_path: Path
) -> None:
    some = tmp_path / "slides"
    shutil.copytree(slide_folder, some)
    data = prepared(some, tmp_path / "p")
    bad = some / "case0-1.svs"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"case0-1\.svs cannot be read.*All other slides are done"):
        prep(data, tmp_path / "crops")
    assert not (tmp_path / "crops" / "index.json").exists()
    bad.write_bytes(whole)
    prep(data, tmp_path / "crops")
    assert len(open_index(tmp_path / "crops").header["slides"]) == SLIDES


def full_disk(item: str) -> str:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_stops_the_job(workers: int) -> None:
    with pytest.raises(RunError, match="the disk is full; make room"):
        list(in_processes(full_disk, ["a", "b"], workers=workers))


def dies(item: str) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_what_killed_jobs_left_is_swept_and_a_missing_shard_is_made_again(
    unbroken: Path, nuclei_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "crops"
    shutil.copytree(unbroken, out)
    for name in ("crops-00001-000.tar.host-1.tmp", "index.json.1.tmp", "crops-00000-077.tar"):
        (out / name).write_bytes(b"left by a killed job")
    (out / "groups" / "00000.npy.1.tmp").write_bytes(b"left by a killed job")
    (out / "mine.tar").write_bytes(b"of the user")
    with pytest.raises(UserError, match=r"crops-00000-077\.tar is in the folder but not in the"):
        check.run(check.Check(data=out, out=tmp_path / "check"))
    (out / "crops-00001-000.tar").unlink()
    whole = (out / "crops-00002-000.tar").read_bytes()
    (out / "crops-00002-000.tar").write_bytes(whole[:-1])
    prep(nuclei_folder, out)
    (out / "mine.tar").unlink()
    assert files(out) == files(unbroken)
    assert len(list((out / "groups").iterdir())) == 6 and not (out / "work").exists()


def test_whoever_cuts_last_merges_at_once(
    nuclei_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is at work on the first slide of the only group, and done before this one."""
    out = tmp_path / "crops"
    sources, _ = open_sources(nuclei_folder, tables=tmp_path)
    real_cut, real_plan = crops.cut, assembly.make_plan
    order: list[str] = []
    other = contextlib.ExitStack()
    waits: list[float] = []
    cuts: list[str] = []

    def make_plan(job: assembly.Job, sources: list[Source]) -> tuple[list[list[str]], int]:
        groups, new = real_plan(job, sources)
        order.extend(groups[0])
        other.enter_context(claims.claim(job.part(order[0])))
        return groups, new

    def cut(cfg: crops.Crops, source: Source, part: Path) -> None:
        if not cuts:
            first = next(s for s in sources if s.slide == order[0])
            real_cut(cfg, first, out / "work" / "parts" / first.slide / "part")
            other.close()
        cuts.append(source.slide)
        real_cut(cfg, source, part)

    monkeypatch.setattr(assembly, "make_plan", make_plan)
    monkeypatch.setattr(crops, "cut", cut)
    monkeypatch.setattr(assembly.time, "sleep", waits.append)
    prep(nuclei_folder, out, group=8)
    assert cuts == order[1:] and not waits


def test_a_slide_that_crashes_its_reader_is_named(
    nuclei_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = 'cut 0 {"slide": "a"}'
    ((_, _, problem),) = in_processes(dies, [item], workers=1)
    assert assembly._named("a.svs", item, problem).startswith("a.svs: the library")
    assert "want of memory" in assembly._named("group 3", "merge 3", problem)

    def odd(cfg: crops.Crops, source: Source, part: Path) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(crops, "cut", odd)
    with pytest.raises(UserError, match=r"^/.*\.svs: ZeroDivisionError: odd\. \("):
        prep(nuclei_folder, tmp_path / "crops")


def test_a_manifest_without_a_usable_slide_is_said(slide_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    manifest.run(manifest.Manifest(data=str(slide_folder), out=table, workers=0))
    table.write_text(table.read_text().replace(",ok,", ",no mpp,it states none."))
    with pytest.raises(UserError, match=r"no slide that can be used.*it states none"):
        nuclei.run(nuclei.Nuclei(data=table, out=tmp_path / "n", workers=0))


def test_slides_that_moved_are_found_again(slide_folder: Path, tmp_path: Path) -> None:
    some = tmp_path / "slides"
    shutil.copytree(slide_folder, some)
    data = prepared(some, tmp_path / "p")
    some.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="there is no slide"):
        prep(data, tmp_path / "crops")
    prep(prepared(tmp_path / "moved", tmp_path / "p"), tmp_path / "crops")
    (data / "case0-1.parquet").unlink()
    with pytest.raises(UserError, match=r"there is no table of nuclei .*case0-1\.parquet"):
        prep(data, tmp_path / "again")


def test_per_slide_and_balance(nuclei_folder: Path, tmp_path: Path) -> None:
    _, columns = everything(prep(nuclei_folder, tmp_path / "a", per_slide=20))
    assert all((columns["slide"] == s).sum() == 20 for s in set(columns["slide"]))
    _, balanced = everything(prep(nuclei_folder, tmp_path / "b", per_slide=20, balance="type"))
    for slide in set(balanced["slide"]):
        table = read_table(nuclei_folder / f"{slide}.parquet")
        here = balanced["type"][balanced["slide"] == slide]
        kinds = {k: (table.type == k).sum() for k in set(table.type)}
        enough = [k for k, n in kinds.items() if n >= 20 // len(kinds) + 1]
        counts = [(here == k).sum() for k in enough]
        assert len(here) == 20 and max(counts) - min(counts) <= 1 + 20 % len(kinds)
    with pytest.raises(UserError, match="per_slide"):
        prep(nuclei_folder, tmp_path / "c", balance="type")


def test_memory_does_not_grow_with_the_nuclei(
    nuclei_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket smaller than the set: the same nuclei, each once, and blocks are still mixed."""
    monkeypatch.setattr(crops, "BUCKET", 200 * 48 * 48 * 3)
    out = prep(nuclei_folder, tmp_path / "crops", group=8)
    index = open_index(out)
    assert index.count > 400  # several buckets
    assert (index.blocks["count"][:-1] == 64).all()
    _, columns = everything(out)
    pairs = set(zip(columns["slide"].tolist(), columns["id"].tolist(), strict=True))
    assert len(pairs) == index.count
    reader = BlockReader(index)
    mixed = [len(set(reader.columns(b)["slide"])) for b in range(len(index.blocks))]
    assert np.mean(mixed) > 3.5
