"""What is evaluated: an encoder, a random encoder or a floor; each gives features of a table."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import floors
from eval.features import cache_key, cached, features
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

WORD = re.compile(r"(?P<name>\w+)(?:@(?P<size>\d+)px(?P<mpp>\d*\.?\d+))?")


@dataclass(frozen=True)
class Source:
    """A name, a content hash, the window it sees and how its features are made.

    `features` maps a table to float32 [n, d]; None for the majority class, which has none.
    `network` is the encoder where there is one.
    """

    name: str
    hash: str
    size: int
    mpp: float
    features: Callable[[Table], np.ndarray] | None
    network: Any = None

    @property
    def is_floor(self) -> bool:
        return self.name.startswith(("floor:", "random:"))

    def load(self, table: Table, *, benchmark: str, version: str, folder: Path) -> np.ndarray:
        """Features of every row, from the cache in `folder` where they are there."""
        if self.features is None:
            raise ValueError(f"{self.name} has no features")
        compute = self.features
        key = cache_key(self.hash, benchmark, version, table.content_hash, self.size, self.mpp)
        return cached(folder / f"{key}.npy", lambda: compute(table), rows=len(table))


def resolve(word: str, *, seed: int, workers: int, device: str, batch: int) -> Source:
    """The source that the word `encoder=` means.

    Args:
        word: an encoder folder; 'random:<encoder folder>'; 'floor:<name>', optionally with
            a window, as in 'floor:colour@80px0.5'.
    """
    if word.startswith("floor:"):
        found = WORD.fullmatch(word.removeprefix("floor:"))
        if not found or found["name"] not in floors.FLOORS:
            raise UserError(
                f"encoder='{word}' is no floor: use one of "
                f"{', '.join('floor:' + name for name in floors.FLOORS)}."
            )
        size = int(found["size"] or floors.WINDOW)
        mpp = float(found["mpp"] or floors.MPP)
        if size < 1 or mpp <= 0:
            raise UserError(f"encoder='{word}': the window needs at least 1 px and mpp above 0.")
        return floor(found["name"], size=size, mpp=mpp, seed=seed, workers=workers)
    from lemon_muse.encoder import load

    encoder = load(Path(word.removeprefix("random:")))
    settings: dict[str, Any] = {"workers": workers, "device": device, "batch": batch}
    if word.startswith("random:"):
        return randomised(encoder, seed=seed, **settings)
    return from_encoder(encoder, name=encoder.name, **settings)


def from_encoder(encoder: Any, *, name: str, workers: int, device: str, batch: int) -> Source:
    """The source of an object that keeps the Encoder contract."""

    def compute(table: Table) -> np.ndarray:
        return features(encoder, table, batch=batch, workers=workers, device=device, name=name)

    size, mpp = int(encoder.image_size), float(encoder.mpp)
    return Source(name, encoder.content_hash, size, mpp, compute, encoder)


def randomised(encoder: Any, *, seed: int, workers: int, device: str, batch: int) -> Source:
    """The same architecture with fresh weights, named 'random:<name>'."""
    fresh = floors.random_encoder(encoder, seed=seed)
    name = f"random:{encoder.name.removeprefix('random:')}"
    return from_encoder(fresh, name=name, workers=workers, device=device, batch=batch)


def floor(name: str, *, size: int, mpp: float, seed: int, workers: int) -> Source:
    """A floor on windows of `size` px at `mpp`; its name tells the window."""
    if name == "majority":
        return Source("floor:majority", cache_key("majority", floors.VERSION), 0, 0.0, None)

    def compute(table: Table) -> np.ndarray:
        return floors.floor_features(name, table, size=size, mpp=mpp, seed=seed, workers=workers)

    key = cache_key("floor", name, floors.VERSION, size, mpp, seed)
    return Source(f"floor:{name}@{size}px{mpp:g}", key, size, mpp, compute)


def floors_of(subject: Source, *, seed: int, workers: int, device: str, batch: int) -> list[Source]:
    """All floors beside a subject: on its window, and on LEMON's where that is another one."""
    windows = [(subject.size, subject.mpp)] if subject.size else []
    lemon = (floors.WINDOW, floors.MPP)
    if lemon not in windows:
        windows.append(lemon)
    out = []
    if subject.network is not None and not subject.is_floor:
        settings: dict[str, Any] = {"workers": workers, "device": device, "batch": batch}
        out.append(randomised(subject.network, seed=seed, **settings))
    for size, mpp in windows:
        for name in floors.FLOORS[1:]:
            out.append(floor(name, size=size, mpp=mpp, seed=seed, workers=workers))
    out.append(floor("majority", size=0, mpp=0.0, seed=seed, workers=workers))
    return [source for source in out if source.name != subject.name]
