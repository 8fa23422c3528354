"""What is evaluated: an encoder, a random encoder or a floor; each gives features of a table."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval import floors, samplers
from eval.encoders import open_encoder
from eval.features import cache_key, cached
from lemon_muse.data.table import Table
from lemon_muse.errors import UserError

WORD = re.compile(r"(?P<name>\w+)(?:@(?P<size>\d+)px(?P<mpp>\d*\.?\d+))?")


@dataclass(frozen=True)
class Source:
    """A name, a hash, a window and how its features are made.

    `features` maps a table to float32 [n, d]; None for the majority class, which has none.
    `size` and `mpp` are the window around one nucleus that floors and pictures take beside it: what
    it sees, or, where nuclei are read off a map of a larger window, 40 px. `network` is the encoder
    where there is one, and `look` how it is read; `params` is for the rows.
    """

    name: str
    hash: str
    size: int
    mpp: float
    features: Callable[[Table], np.ndarray] | None
    network: Any = None
    look: samplers.Look | None = None
    params: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def is_floor(self) -> bool:
        return self.name.startswith(("floor:", "random:"))

    def path(self, table: Table, *, benchmark: str, version: str, folder: Path) -> Path:
        """The file of its features of a table."""
        key = cache_key(self.hash, benchmark, version, table.content_hash, self.size, self.mpp)
        return folder / f"{key}.npy"

    def load(self, table: Table, *, benchmark: str, version: str, folder: Path) -> np.ndarray:
        """Features of every row, from the cache in `folder` where they are there."""
        if self.features is None:
            raise ValueError(f"{self.name} has no features")
        compute = self.features
        path = self.path(table, benchmark=benchmark, version=version, folder=folder)
        return cached(path, lambda: compute(table), rows=len(table))

    @cached_property
    def cost(self) -> dict[str, float | int | str]:
        """What a forward pass costs, for the rows; {} of floors that have no network."""
        if self.network is None or self.look is None:
            return {}
        from eval.cost import cost

        return cost(self.network, self.look)


def resolve(
    word: str,
    *,
    seed: int,
    workers: int,
    device: str,
    batch: int,
    words: samplers.Words = samplers.ALL_OWN,
) -> Source:
    """The source that the word `encoder=` means.

    Args:
        word: an encoder folder, a released MUSE file (.pth), a timm folder, 'timm:NAME[,…]';
            'random:' before any of these; 'floor:<name>', optionally with a window, as in
            'floor:colour@80px0.5'.
        words: how features are read off the encoder.
    """
    if word.startswith("floor:"):
        if words.any:
            raise UserError(
                f"encoder='{word}': sampler=, window=, valid=, mpp= and resize= are not for "
                f"floors; a floor's window stands in its name, as in floor:colour@80px0.5."
            )
        return _named_floor(word, seed=seed, workers=workers)
    settings: dict[str, Any] = {"workers": workers, "device": device, "batch": batch}
    encoder = open_encoder(word.removeprefix("random:"), words, random=word.startswith("random:"))
    look = samplers.choose(encoder, words)
    if word.startswith("random:"):
        return randomised(encoder, seed=seed, look=look, **settings)
    return from_encoder(encoder, name=encoder.name, look=look, **settings)


def _named_floor(word: str, *, seed: int, workers: int) -> Source:
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


def from_encoder(
    encoder: Any,
    *,
    name: str,
    workers: int,
    device: str,
    batch: int,
    look: samplers.Look | None = None,
) -> Source:
    """The source of an object that keeps the Encoder contract; read its own way by default."""
    way = look or samplers.choose(encoder)
    content, name = encoder.content_hash, f"{name}{way.tag}"

    def compute(table: Table) -> np.ndarray:
        return samplers.features_of(
            encoder, way, table, batch=batch, workers=workers, device=device, name=name
        )

    size = samplers.NUCLEUS if way.valid else way.window
    params = way.facts(content)
    return Source(name, way.hash(content), size, way.mpp, compute, encoder, way, params)


def randomised(
    encoder: Any,
    *,
    seed: int,
    workers: int,
    device: str,
    batch: int,
    look: samplers.Look | None = None,
) -> Source:
    """The same architecture with fresh weights, named 'random:<name>', read the same way."""
    fresh = floors.random_encoder(encoder, seed=seed)
    name = f"random:{encoder.name.removeprefix('random:')}"
    return from_encoder(fresh, name=name, look=look, workers=workers, device=device, batch=batch)


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
        out.append(randomised(subject.network, seed=seed, look=subject.look, **settings))
    for size, mpp in windows:
        for name in floors.FLOORS[1:]:
            out.append(floor(name, size=size, mpp=mpp, seed=seed, workers=workers))
    out.append(floor("majority", size=0, mpp=0.0, seed=seed, workers=workers))
    return [source for source in out if source.name != subject.name]
