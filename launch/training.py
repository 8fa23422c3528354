"""The `train` job: the library's loop with the online probe of the eval room."""

import os
from pathlib import Path
from typing import Any

from lemon_muse.data.shards import open_index
from lemon_muse.errors import UserError
from lemon_muse.recipe import Train
from lemon_muse.train import Probe
from lemon_muse.train import run as train

__all__ = ["Train", "run"]


def run(cfg: Train) -> Path:
    """Train, and say where the encoder is."""
    folder = train(cfg, probe=online_probe(cfg))
    if os.environ.get("RANK", "0") == "0":
        print(f"encoder: {folder}\nrun: {cfg.out} (config.yaml, metrics.jsonl, tensorboard/)")
    return folder


def online_probe(cfg: Train) -> Probe | None:
    """The probe that `cfg.probe` asks for, or None."""
    if cfg.probe.benchmark is None or cfg.probe.root is None:
        return None
    from eval.online import online_probe as build

    method: Any = cfg.method
    # Whether the encoder has a map that is read at nuclei.
    dense = method.name == "muse" or getattr(method, "export", "") == "dense"
    if not dense and (cfg.probe.window or cfg.probe.mpp):
        raise UserError(
            f"probe.window and probe.mpp are for muse and joint's dense network: the probe of "
            f"{method.name} takes the window and the mpp of the crops."
        )
    return build(
        cfg.probe.benchmark,
        cfg.probe.root,
        size=cfg.probe.window or cfg.window_px,
        # The crops of joint training need not have the mpp of its ROIs.
        mpp=_mpp(cfg) if dense else getattr(method, "crop_mpp", open_index(cfg.data).mpp),
        seed=cfg.seed,
        bf16=cfg.precision == "bf16",
        dense=dense,
    )


def _mpp(cfg: Train) -> float:
    """µm per pixel of a dense probe: as asked for, or the coarsest that the global views have."""
    views: Any = cfg.view
    return cfg.probe.mpp or float(views.global_mpp[1])
