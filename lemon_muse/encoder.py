"""The Encoder contract: a frozen network with all that is needed to use it rightly; save and load.

An encoder is one folder: `config.json` (timm's layout, with our facts under `lemon_muse`),
`model.safetensors`, `check.safetensors` (one input/output pair) and `README.md` (the model card).
timm opens it unchanged: `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lemon_muse import __version__
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import RunError, UserError


class Encoder(nn.Module):
    """Normalised crops, float [B, 3, image_size, image_size], to features, float [B, dim].

    Attributes:
        dim: width of the features.
        image_size: side of the window, px.
        mpp: µm per pixel of the window.
        patch_size, num_heads: of a ViT; None for other networks.
        mean, std: normalisation of pixels in [0, 1].
        feature: what the feature is ('token', 'avg', …: timm's pooling).
        name: for tables.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        architecture: str,
        arguments: dict[str, Any],
        image_size: int,
        mpp: float,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        name: str = "encoder",
    ) -> None:
        super().__init__()
        self.network = network
        self.architecture, self.arguments = architecture, dict(arguments)
        self.image_size, self.mpp, self.name = image_size, mpp, name
        self.mean, self.std = tuple(mean), tuple(std)
        self.dim = int(cast(int, network.num_features))
        patch = getattr(network, "patch_embed", None)
        blocks = getattr(network, "blocks", None)
        self.patch_size = int(patch.patch_size[0]) if patch is not None else None
        heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
        self.num_heads = int(heads) if heads is not None else None
        self.feature = str(getattr(network, "global_pool", "") or "avg")
        if not isinstance(getattr(network, "global_pool", ""), str):
            self.feature = "avg"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    @property
    def content_hash(self) -> str:
        """16 hex digits over the weights and the facts that change features."""
        digest = hashlib.sha256()
        digest.update(json.dumps(self._facts(), sort_keys=True).encode())
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(value.detach().float().cpu().numpy()).tobytes())
        return digest.hexdigest()[:16]

    def _facts(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "arguments": self.arguments,
            "image_size": self.image_size,
            "mpp": self.mpp,
            "mean": list(self.mean),
            "std": list(self.std),
            "patch_size": self.patch_size,
            "num_heads": self.num_heads,
            "feature": self.feature,
        }


def save_encoder(encoder: Encoder, folder: Path, *, card: dict[str, Any] | None = None) -> Path:
    """Write the encoder's folder; each file appears whole, `config.json` last.

    Args:
        encoder: in any mode and on any device; its weights are stored as float32.
        folder: made if missing.
        card: what the model card says beside the facts: data, recipe, scores (str -> str or dict).

    Raises:
        RunError: a weight is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        k: v.detach().float().cpu().contiguous()
        if v.is_floating_point()
        else v.detach().cpu().clone()
        for k, v in encoder.network.state_dict().items()
    }
    bad = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise RunError(f"the encoder has non-finite weights in {bad[0]}; it is not written.")
    network_config = getattr(encoder.network, "pretrained_cfg", None) or {}
    config = {
        "architecture": encoder.architecture,
        "num_classes": 0,
        "num_features": encoder.dim,
        "global_pool": encoder.feature,
        "model_args": encoder.arguments,
        "pretrained_cfg": {
            "tag": "lemon_muse",
            "custom_load": False,
            "input_size": [3, encoder.image_size, encoder.image_size],
            "fixed_input_size": encoder.patch_size is not None,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": network_config.get("first_conv"),
            "classifier": network_config.get("classifier"),
        },
        "lemon_muse": {
            **encoder._facts(),
            "name": encoder.name,
            "dim": encoder.dim,
            "content_hash": encoder.content_hash,
            "version": __version__,
        },
    }
    write_atomic(folder / "model.safetensors", save(state, metadata={"format": "pt"}))
    write_atomic(folder / "check.safetensors", save(_check_pair(encoder)))
    write_atomic(folder / "README.md", _card(encoder, card or {}).encode())
    write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
    return folder


def load(path: Path | str, *, check: bool = True) -> Encoder:
    """Open an encoder folder, in evaluation mode, on the CPU.

    Args:
        path: the folder, or a run folder that holds `encoder/`.
        check: compare the stored input/output pair (relative difference < 1e-3).

    Raises:
        UserError: not an encoder folder, weights that do not fit, or another function than saved.
    """
    import timm

    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / "encoder" / "config.json").is_file():
        folder = folder / "encoder"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{path} is not an encoder folder (no config.json); give the folder that 'lemon-muse "
            f"train' wrote as encoder/, or the run folder."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = config["lemon_muse"]
        state = load_file(folder / "model.safetensors")
        network = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
        network.load_state_dict(state)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).split("\n")[0]
        raise UserError(f"the encoder in {folder} cannot be loaded: {first}.") from None
    encoder = Encoder(
        network,
        architecture=config["architecture"],
        arguments=config["model_args"],
        image_size=facts["image_size"],
        mpp=facts["mpp"],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        name=facts["name"],
    )
    encoder.eval().requires_grad_(False)
    if check and (folder / "check.safetensors").is_file():
        pair = load_file(folder / "check.safetensors")
        with torch.inference_mode():
            got = encoder(pair["input"])
        apart = float((got - pair["output"]).norm() / pair["output"].norm().clamp_min(1e-12))
        if not apart < 1e-3:
            raise UserError(
                f"the encoder in {folder} does not give the output that was saved with it "
                f"(relative difference {apart:.2g}): the weights or the timm version differ from "
                f"the writer's."
            )
    return encoder


@torch.inference_mode()
def _check_pair(encoder: Encoder) -> dict[str, torch.Tensor]:
    """One input and its output, float32 on the CPU, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=generator)
    parameter = next(encoder.parameters())
    was_training = encoder.training
    encoder.eval()
    try:
        output = encoder(images.to(parameter.device, parameter.dtype)).float().cpu()
    finally:
        encoder.train(was_training)
    return {"input": images, "output": output.contiguous()}


def _card(encoder: Encoder, card: dict[str, Any]) -> str:
    """The model card."""
    lines = [
        "---",
        "library_name: timm",
        "tags: [pathology, histology, nucleus, self-supervised]",
        "---",
        f"# {encoder.name}",
        "",
        "A nucleus encoder for H&E, pretrained without labels by lemon_muse.",
        "",
        f"- input: RGB window of {encoder.image_size} × {encoder.image_size} px at {encoder.mpp} "
        f"µm/px around a nucleus; values in [0, 1], then mean {list(encoder.mean)}, "
        f"std {list(encoder.std)}",
        f"- output: {encoder.dim} features ({encoder.feature})",
        f"- network: timm `{encoder.architecture}` with {json.dumps(encoder.arguments)}",
        f"- content hash: {encoder.content_hash}; written by lemon_muse {__version__}",
        "",
        "```python",
        "import timm",
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()',
        "```",
        "",
        "Do not resize crops to the window: cut the window at the mpp above.",
        "",
    ]
    for title, body in card.items():
        text = body if isinstance(body, str) else f"```json\n{json.dumps(body, indent=1)}\n```"
        lines += [f"## {title}", "", text, ""]
    return "\n".join(lines)
