"""The `train` job: the library's loop with the online probe of the eval room."""

import os
from pathlib import Path

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
    from lemon_muse.data.shards import open_index

    mpp = open_index(cfg.data).mpp
    bf16 = cfg.precision == "bf16"
    return build(
        cfg.probe.benchmark, cfg.probe.root, size=cfg.window, mpp=mpp, seed=cfg.seed, bf16=bf16
    )
