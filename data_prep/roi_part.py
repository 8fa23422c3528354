"""The part that `prep rois` cuts from a slide, read ROI by ROI."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.data.shards import ROI_COLUMNS


class RoiPart:
    """The part of a slide, read ROI by ROI."""

    def __init__(self, out: Path, pixels: int, slide: str) -> None:
        self.side, self.slide = pixels, slide
        self.path = out / "work" / "parts" / slide / "part"
        with np.load(f"{self.path}.npz", allow_pickle=False) as members:
            self.about: dict[str, Any] = json.loads(str(members["about"]))
            self.lengths, self.facts = members["lengths"], members["facts"]
            self.counts = members["counts"]
            self.columns = {name: members[name] for name in ROI_COLUMNS}
        self.ends = np.cumsum(self.lengths)
        self.last = np.cumsum(self.counts[:, 0])

    def roi(self, number: int) -> tuple[bytes, dict[str, np.ndarray], dict[str, Any]]:
        """Payload, columns of the nuclei, facts."""
        length, count = int(self.lengths[number]), int(self.counts[number, 0])
        with Path(f"{self.path}.rois").open("rb") as file:
            file.seek(int(self.ends[number]) - length)
            payload = file.read(length)
        here = slice(int(self.last[number]) - count, int(self.last[number]))
        left, top, tissue = self.facts[number].tolist()
        facts = {
            "slide": self.slide,
            "patient": self.about["patient"],
            "left": left,
            "top": top,
            "side": self.about["side"],
            "mpp": self.about["side"] * self.about["source_mpp"] / self.side,
            "source_mpp": self.about["source_mpp"],
            "tissue": tissue,
        }
        return payload, {k: v[here] for k, v in self.columns.items()}, facts
