"""`lemon-muse embed` against the plain way: nuclei per second and peak memory, same encoder.

The plain way: openslide `read_region` for each nucleus (in the order of a detector: tiles of 1024
px), PIL, torchvision transforms, a DataLoader of one process, batches of 256, features in memory.
Ours is the whole job: detection file, reading, parts on disk, Parquet. Both in fresh processes of
one thread, taking turns; process CPU time, so that other load matters little. Three encoders: a ViT
of one block and five tokens, with which reading dominates; one of two blocks of 48 and 26 tokens;
LEMON's ViT-S/8, with which reading does not matter.
"""

import statistics
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "wsi" / "cmu-1-small-region.svs"
FIELD, SIDE, NUCLEI, FEW, ROUNDS = 4000, 20_000, 100_000, 1000, 3
TINY = {"patch_size": 20, "embed_dim": 24, "depth": 1, "num_heads": 2}
PEER = "openslide read per nucleus + torchvision"


def run() -> list[dict]:
    from tests.eval.standins import small_encoder
    from tests.performance.big import write_repeated

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = small_encoder(folder / "small")
        points = write_repeated(folder / "big.svs", field=FIELD, times=SIDE // FIELD)
        big = _chosen(points, NUCLEI, folder / "big.csv")
        source = f"generated {SIDE:,} px"
        tiny = _vit(folder / "tiny", "vit_tiny_patch16_224", **TINY)
        rows = _compare(source, folder / "big.svs", 0.25, big, tiny, "tiny ViT", folder, rounds=1)
        rows += _compare(
            source, folder / "big.svs", 0.25, big, small, "small ViT", folder, rounds=1
        )
        if REAL.is_file():
            detected = _run_in_process(partial(_embed, REAL, None, small, folder / "found.parquet"))
            found = _detected(folder / "found.parquet")
            rows.append(_row(REAL.name, "small ViT, built-in detector included", detected, None))
            table = _chosen(found, len(found), folder / "real.csv")
            rows += _compare(REAL.name, REAL, 0.499, table, small, "small ViT", folder)
        few = _chosen(points, FEW, folder / "few.csv")
        large = _vit(folder / "vit_s", "vit_small_patch16_224", patch_size=8)
        rows += _compare(source, folder / "big.svs", 0.25, few, large, "ViT-S/8", folder, rounds=1)
    return rows


def _compare(
    source: str,
    slide: Path,
    mpp: float,
    table: Path,
    encoder: Path,
    network: str,
    folder: Path,
    rounds: int = ROUNDS,
) -> list[dict]:
    ours = partial(_embed, slide, table, encoder, folder / "ours.parquet")
    plain = partial(_plain, slide, mpp, table, encoder)
    figures: dict[str, list[dict]] = {"embed": [], PEER: []}
    for _ in range(rounds):
        for name, work in (("embed", ours), (PEER, plain)):
            figures[name].append(_run_in_process(work))
            (folder / "ours.parquet").unlink(missing_ok=True)
    middle = {name: _median(found) for name, found in figures.items()}
    _same(middle, figures)
    return [
        _row(source, f"{network}, {name}", middle[name], middle[PEER]) for name in ("embed", PEER)
    ]


def _median(found: list[dict]) -> dict[str, Any]:
    keys = ("cpu", "wall", "peak")
    return {"count": found[0]["count"], **{k: statistics.median(f[k] for f in found) for k in keys}}


def _same(middle: dict[str, dict], figures: dict[str, list[dict]]) -> None:
    """Both ways must have worked on the same nuclei; on copied pixels features are equal too."""
    if middle["embed"]["count"] != middle[PEER]["count"]:
        raise ValueError("the two ways worked on different nuclei")
    apart = abs(figures["embed"][0]["mean"] - figures[PEER][0]["mean"])
    print(f"  mean size of all features, ours less plain: {apart:.2g}", flush=True)


def _row(source: str, what: str, mine: dict, peer: dict | None) -> dict:
    rate = mine["count"] / mine["cpu"]
    return {
        "name": "embed", "what": f"{source}, {mine['count']} nuclei, {what}", "peer": PEER,
        "ours": rate, "unit": "nuclei/s/core",
        "ratio": rate * peer["cpu"] / peer["count"] if peer else None, "cores": 1, "device": "cpu",
        "data": source, "peak_mib": round(mine["peak"]), "wall_s": round(mine["wall"], 1),
    }  # fmt: skip


def _run_in_process(work: Any) -> dict[str, Any]:
    """What `work` gives, with CPU seconds, wall seconds and peak MiB of a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work,))


def _measured(work: Any) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    work(warm=True)  # imports and the first use of every library
    cpu, wall = time.process_time(), time.perf_counter()
    count, mean = work(warm=False)
    return {
        "count": count,
        "mean": mean,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "peak": _peak(),
    }


def _peak() -> float:
    """MiB of this program alone; `ru_maxrss` would begin with that of the process it came from."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _embed(slide: Path, table: Path | None, encoder: Path, out: Path, *, warm: bool) -> Any:
    from pyarrow import parquet

    from launch.embed import Embed, run

    if warm:
        few, out = out.with_name("warm.csv"), out.with_name("warm.parquet")
        if table is not None:
            few.write_text("\n".join(table.read_text().splitlines()[:50]) + "\n")
            table = few
    run(Embed(encoder=str(encoder), slide=slide, nuclei=table, out=out, merge=0, workers=1))
    if warm:
        out.unlink()
        return None
    found = parquet.read_table(out, columns=["feature"])["feature"].combine_chunks()
    return len(found), float(np.abs(found.flatten().to_numpy()).mean())


def _plain(slide: Path, mpp: float, table: Path, encoder: Path, *, warm: bool) -> Any:
    import torch
    from torch.utils.data import DataLoader

    from lemon_muse.encoder import load

    network = load(encoder)
    xy = np.loadtxt(table, delimiter=",", skiprows=1)[: 50 if warm else None]
    parts = []
    with torch.inference_mode():
        for images in DataLoader(_Crops(slide, mpp, xy, network), batch_size=256):
            parts.append(network(images).numpy())
    found = np.concatenate(parts)
    return len(found), float(np.abs(found).mean())


class _Crops:
    """One read, one conversion, one transform a nucleus."""

    def __init__(self, slide: Path, mpp: float, xy: np.ndarray, encoder: Any) -> None:
        import openslide
        from torchvision import transforms

        self.slide, self.xy = openslide.OpenSlide(slide), xy
        self.side = round(encoder.image_size * encoder.mpp / mpp)
        size = encoder.image_size
        steps: list[Any] = [] if self.side == size else [transforms.Resize((size, size), 3)]
        steps += [transforms.ToTensor(), transforms.Normalize(encoder.mean, encoder.std)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.xy)

    def __getitem__(self, index: int) -> Any:
        x, y = np.floor(self.xy[index] - self.side / 2 + 0.5).astype(int).tolist()
        image = self.slide.read_region((x, y), 0, (self.side, self.side)).convert("RGB")
        return self.transform(image)


def _chosen(points: np.ndarray, count: int, path: Path) -> Path:
    """A csv of some nuclei, tile by tile as a detector writes them."""
    rng = np.random.default_rng(0)
    points = points[np.sort(rng.permutation(len(points))[:count])]
    tile = points // 1024
    points = points[np.lexsort((tile[:, 0], tile[:, 1]))]
    np.savetxt(path, points, fmt="%.2f", delimiter=",", header="x,y", comments="")
    return path


def _detected(path: Path) -> np.ndarray:
    from pyarrow import parquet

    table = parquet.read_table(path, columns=["x_px", "y_px"])
    return np.stack([table["x_px"].to_numpy(), table["y_px"].to_numpy()], 1)


def _vit(folder: Path, architecture: str, **words: Any) -> Path:
    """The folder of an untrained ViT of 40 px windows at 0.25 µm/px."""
    import timm

    from lemon_muse.encoder import Encoder, save_encoder

    arguments: dict[str, Any] = {"img_size": 40, **words}
    encoder = Encoder(
        timm.create_model(architecture, num_classes=0, **arguments),
        architecture=architecture,
        arguments=arguments,
        image_size=40,
        mpp=0.25,
        mean=(0.6, 0.4, 0.55),
        std=(0.2, 0.2, 0.15),
        name=folder.name,
    )
    return save_encoder(encoder, folder)


if __name__ == "__main__":
    for row in run():
        print(row)
