"""The crops of the slides of a group, mixed within bounded memory.

Bucket b takes the b-th stretch of the part of every slide. Parts are in random order themselves, so
a bucket is a random draw from all slides of the group.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_prep.crops import Crops


class Part:
    """The part of a slide, read stretch by stretch."""

    def __init__(self, cfg: "Crops", slide: str) -> None:
        self.cfg, self.slide = cfg, slide
        self.path = cfg.out / "work" / "parts" / slide / "part"
        with np.load(f"{self.path}.npz", allow_pickle=False) as members:
            self.place = members["place"]
            self.about = json.loads(str(members["about"]))
            self.columns = {k: members[k] for k in ("id", "x", "y", "type", "score")}

    def stretch(self, number: int, of: int) -> np.ndarray:
        """Places of the crops of the `number`-th of `of` stretches of the part, ascending."""
        count = len(self.place)
        here: np.ndarray = self.place[count * number // of : count * (number + 1) // of]
        return here

    def pixels(self, here: np.ndarray) -> np.ndarray:
        """Crops at these places, neighbours but for those left out."""
        size = self.cfg.size
        first, each = int(here[0]), size * size * 3
        count = (int(here[-1]) + 1 - first) * each
        span = np.fromfile(f"{self.path}.pixels", np.uint8, count=count, offset=first * each)
        crops = span.reshape(-1, size, size, 3)
        return crops if len(crops) == len(here) else crops[here - first]

    def table(self, here: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of the crops at these places."""
        columns = {k: v[here] for k, v in self.columns.items()}
        if not self.cfg.types:
            columns["type"] = np.full(len(here), "")
        return {
            "slide": np.full(len(here), self.slide),
            "patient": np.full(len(here), self.about["patient"]),
            "mpp": np.full(len(here), self.cfg.mpp),
            "source_mpp": np.full(len(here), self.about["source_mpp"]),
            **columns,
        }


def mixed(
    cfg: "Crops", group: int, parts: list[Part], buckets: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Shuffled stretches of whole blocks; what is left over goes into the next bucket."""
    rest: tuple[np.ndarray, dict[str, np.ndarray]] | None = None
    for bucket in range(buckets):
        rng = np.random.default_rng([cfg.seed, group, bucket])
        stretches = [(part, part.stretch(bucket, buckets)) for part in parts]
        stretches = [(part, here) for part, here in stretches if len(here)]
        tables = ([rest[1]] if rest else []) + [part.table(here) for part, here in stretches]
        if not tables:
            continue
        order = rng.permutation(sum(len(table["id"]) for table in tables))
        columns = {k: np.concatenate([table[k] for table in tables])[order] for k in tables[0]}
        pixels = np.empty((len(order), cfg.size, cfg.size, 3), np.uint8)
        place = np.argsort(order)
        start = 0
        if rest:
            start = len(rest[0])
            pixels[place[:start]] = rest[0]
        for part, here in stretches:  # one after the other, so that the bucket is not held twice
            pixels[place[start : start + len(here)]] = part.pixels(here)
            start += len(here)
        full = len(pixels) if bucket == buckets - 1 else len(pixels) // cfg.block * cfg.block
        rest = (pixels[full:].copy(), {k: v[full:] for k, v in columns.items()})
        yield pixels[:full], {k: v[:full] for k, v in columns.items()}
        del pixels
