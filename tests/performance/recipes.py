"""What every recipe of the studies costs to train: CPU time of a step, against its reference.

The recipes are those of `configs/study/brca.yaml` (a small ResNet) and `brca_vit.yaml` (a small
ViT). All of a study are open at once and take their steps in turns, so that whatever else the
machine does falls on all alike; what is counted is the CPU time of the process (on a GPU: the time
that passes). Shards hold crops of 144 px, as the widest recipe needs, and the same nuclei as ROIs
for joint training.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data_prep import crops, rois
from launch.study import Study
from launch.study.settings import merge, trial
from lemon_muse.config import load
from lemon_muse.errors import UserError
from lemon_muse.stop import Stop
from lemon_muse.train import Loop
from tests.performance.crops import REAL

SIZE, ROUNDS, WARM = 144, 8, 1
STUDIES = ("study/brca.yaml", "study/brca_vit.yaml")


def run(rounds: int = ROUNDS, batch: int = 128, only: str = "") -> list[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _prepare(folder)
        rows: list[dict] = []
        for words in STUDIES:
            study = load(Study, [words, f"out={folder}", f"data={folder / 'crops'}"])
            names = [n for n in study.chosen if not only or n in only.split(",")]
            turns = {name: _Turns(study, name, folder, batch, device) for name in names}
            for number in range(WARM + rounds):
                for one in turns.values():
                    one.step(count=number >= WARM)
            rows += _rows(study, turns, source, device)
        return rows


def _rows(
    study: Study, turns: dict[str, "_Turns"], source: str, device: torch.device
) -> list[dict]:
    peer = turns.get(study.base) or next(iter(turns.values()), None)
    about = {"name": "recipes", "cores": torch.get_num_threads(), "data": source}
    about |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    second = "s" if device.type == "cuda" else "s of CPU"
    rows = []
    for name, one in turns.items():
        assert peer is not None
        ratio = one.nuclei_rate / peer.nuclei_rate
        told = {"what": f"{name}: {one.told}", "unit": f"{one.unit}/{second}"}
        rows.append({**about, **told, "ours": one.rate, "ratio": ratio, "peer": study.base})
    return rows


class _Turns:
    """A recipe whose steps are taken one at a time."""

    def __init__(
        self, study: Study, name: str, folder: Path, batch: int, device: torch.device
    ) -> None:
        recipe = dict(study.recipes[name])
        joint = name == "joint"
        if joint:
            recipe["data"] = str(folder / "rois")
        # Of ROIs so many that their crops are about as many as the others'.
        merge(recipe, {"batch": batch // 16 if joint else batch, "device": device.type})
        cfg = trial(study.model_copy(update={"recipes": {name: recipe}}), name, 0).train
        try:
            self.loop = Loop(cfg, cfg.open_data(), device, None)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        self.runner = self.loop._runner()
        self.batches = self.loop.batches.iterate(0, 100_000)
        self.seconds, self.steps = 0.0, 0
        each = getattr(cfg.method, "crops_per_roi", 1)
        self.nuclei, self.unit = cfg.batch * each, self.loop.method.reads
        self.batch = cfg.batch
        parameters = sum(p.numel() for p in self.loop.method.encoder().network.parameters())
        self.told = f"step of {cfg.batch} {self.unit}, encoder of {parameters / 1e6:.1f} M"

    def step(self, *, count: bool) -> None:
        """One optimiser step, its reading and its views included."""
        began = self._clock()
        batch: Any = next(self.batches)
        self.loop._one_step(self.runner, batch, Stop())
        self.loop.step += 1
        if count:
            self.seconds += self._clock() - began
            self.steps += 1

    def _clock(self) -> float:
        if self.loop.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.batch * self.steps / self.seconds

    @property
    def nuclei_rate(self) -> float:
        """Nuclei a second; of ROIs the most that are cropped."""
        return self.nuclei * self.steps / self.seconds


def _prepare(folder: Path) -> str:
    """Crops and ROIs of the same images, real ones where there are any."""
    data = REAL
    if not REAL.is_dir():
        from lemon_muse.synthetic import write_images

        data = folder / "tissue"
        write_images(data, slides=30, side=768)
    common: dict[str, Any] = {"data": data, "split": "train", "types": False}
    crops.run(crops.Crops(**common, out=folder / "crops", size=SIZE, per_slide=50))
    wide = {"side": 228 if data == REAL else 180, "mpp": 0.5, "min_nuclei": 8}
    rois.run(rois.Rois(**common, out=folder / "rois", **wide))
    return "brcam2c" if data == REAL else "generated"


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=ROUNDS)
    words.add_argument("--batch", type=int, default=128)
    words.add_argument("--only", default="")
    given = words.parse_args()
    from tests.performance.__main__ import line

    for row in run(given.rounds, given.batch, given.only):
        print(line(row), flush=True)
