"""The `export` job: from a run, an encoder folder or a checkpoint to a target format."""

import io
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lemon_muse.config import Config
from lemon_muse.errors import RunError, UserError


class Export(Config):
    """Export an encoder; its features are compared with the source's before it counts as done."""

    run: Path | None = Field(
        None, description="run folder, encoder folder or released MUSE file (.pth)"
    )
    checkpoint: Path | None = Field(None, description="a checkpoint file of a run, instead of run=")
    network: Literal["recipe", "query", "momentum"] = Field(
        "recipe", description="with checkpoint=: which of the two encoders; recipe = as configured"
    )
    format: Literal["timm", "muse"] = Field(
        "timm",
        description="timm: a folder for timm (of a MUSE network, its encoder); muse: the released "
        "MUSE files, with the decoder",
    )
    out: Path = Field(description="folder to write")

    @model_validator(mode="after")
    def _one_source(self) -> "Export":
        if (self.run is None) == (self.checkpoint is None):
            raise ValueError("give exactly one of run=FOLDER and checkpoint=FILE.")
        if self.network != "recipe" and self.checkpoint is None:
            raise ValueError("network= goes with checkpoint=FILE: run= holds one encoder only.")
        return self


def run(cfg: Export) -> Path:
    """Write `cfg.out` and print the largest difference to the source."""
    from lemon_muse import encoder
    from lemon_muse.export import FORMATS

    if cfg.checkpoint is not None:
        source, card = _of_checkpoint(cfg.checkpoint, cfg.network)
    else:
        assert cfg.run is not None
        source, card = encoder.load(cfg.run), {}
    apart = FORMATS[cfg.format](source, cfg.out, card)
    if not apart < 1e-4:
        raise RunError(f"the exported {cfg.format} encoder differs from its source by {apart:.2g}.")
    print(
        f"{cfg.out}: {cfg.format}, {source.content_hash}, largest difference to "
        f"the source {apart:.1g}"
    )
    return cfg.out


def _of_checkpoint(path: Path, network: str) -> tuple[Any, dict[str, Any]]:
    """The encoder in a training checkpoint; needs neither the run folder nor the shards."""
    import torch

    from lemon_muse.config import validate
    from lemon_muse.methods import METHODS
    from lemon_muse.recipe import Train

    try:
        state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        config, facts = json.loads(state["config"]), json.loads(state["shards"])
    except FileNotFoundError:
        raise UserError(
            f"there is no checkpoint {path}; a run keeps them in checkpoints/."
        ) from None
    except Exception as error:
        first = str(error).split("\n")[0]
        raise UserError(f"{path} is not a lemon_muse checkpoint ({first}).") from None
    if network != "recipe":
        config["method"]["export"] = network
    cfg = validate(Train, config)
    method = METHODS[cfg.method.name][1](cfg.method, cfg.setting_again(facts))
    method.load_state_dict(state["method"])
    encoder = method.encoder()
    encoder.name = cfg.name
    return encoder.eval(), {"Recipe": config}
