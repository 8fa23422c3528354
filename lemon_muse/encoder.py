"""The Encoder contract: a frozen network with all that is needed to use it rightly; save and load.

An encoder is one folder: `config.json`, `model.safetensors`, `check.safetensors` (one input/output
pair) and `README.md` (the model card). Our facts stand in `config.json` under `lemon_muse`. Two
kinds: `crop`, one feature a window (here), whose folder has timm's layout so that timm opens it
unchanged (`timm.create_model("local-dir:FOLDER", pretrained=True)`), and `muse`, a dense map that
is read at nuclei (`lemon_muse.dense`). A third, `two_windows`, is used like `crop`, but timm does
not know its network (`lemon_muse.backbones.two_windows`): only `load` opens its folder.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lemon_muse import __version__
from lemon_muse.backbones.two_windows import ARCHITECTURE
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import RunError, UserError
from lemon_muse.frozen import FrozenEncoder, card_text

if TYPE_CHECKING:
    from lemon_muse.dense import DenseEncoder

# Largest relative difference to the stored output that counts as the same function.
SAME = 1e-3


class Encoder(FrozenEncoder):
    """Normalised crops, float [B, 3, image_size, image_size], to features, float [B, dim].

    Args:
        network: a timm model without classifier.
        architecture, arguments: what timm builds the same network from.
        image_size, mpp, mean, std, name: see `FrozenEncoder`.
    """

    kind = "crop"

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

    def facts(self) -> dict[str, Any]:
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

    def layout(self) -> dict[str, Any]:
        timm_facts = getattr(self.network, "pretrained_cfg", None) or {}
        return {
            "architecture": self.architecture,
            "num_classes": 0,
            "num_features": self.dim,
            "global_pool": self.feature,
            "model_args": self.arguments,
            "pretrained_cfg": {
                "tag": "lemon_muse",
                "custom_load": False,
                "input_size": [3, self.image_size, self.image_size],
                "fixed_input_size": self.patch_size is not None,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": list(self.mean),
                "std": list(self.std),
                "num_classes": 0,
                "pool_size": None,
                "first_conv": timm_facts.get("first_conv"),
                "classifier": timm_facts.get("classifier"),
            },
        }

    def describe(self) -> list[str]:
        return [
            f"- input: RGB window of {self.image_size} × {self.image_size} px at {self.mpp} "
            f"µm/px around a nucleus; values in [0, 1], then mean {list(self.mean)}, "
            f"std {list(self.std)}",
            f"- output: {self.dim} features ({self.feature})",
            f"- network: timm `{self.architecture}` with {json.dumps(self.arguments)}",
            f"- content hash: {self.content_hash}; written by lemon_muse {__version__}",
            "",
            "```python",
            "import timm",
            'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()',
            "```",
            "",
            "Do not resize crops to the window: cut the window at the mpp above.",
            "",
        ]


def encoder_of(network: nn.Module, *, architecture: str, **facts: Any) -> Encoder:
    """The encoder around a network of `backbones.arguments_of`; `facts` as for `Encoder`."""
    if architecture == ARCHITECTURE:
        from lemon_muse.two_windows import TwoWindowEncoder

        return TwoWindowEncoder(network, architecture=architecture, **facts)
    return Encoder(network, architecture=architecture, **facts)


def save_encoder(
    encoder: FrozenEncoder, folder: Path, *, card: dict[str, Any] | None = None
) -> Path:
    """Write the encoder's folder; each file appears whole, `config.json` last.

    Args:
        encoder: of either kind, in any mode and on any device; its weights are stored as float32.
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
    config = {
        **encoder.layout(),
        "lemon_muse": {
            "kind": encoder.kind,
            **encoder.facts(),
            "name": encoder.name,
            "dim": encoder.dim,
            "content_hash": encoder.content_hash,
            "version": __version__,
        },
    }
    write_atomic(folder / "model.safetensors", save(state, metadata={"format": "pt"}))
    write_atomic(folder / "check.safetensors", save(encoder.check_pair()))
    write_atomic(folder / "README.md", card_text(encoder, card or {}).encode())
    write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
    return folder


def load(
    path: Path | str, *, check: bool = True, pos_resample: bool = False
) -> Union[Encoder, "DenseEncoder"]:
    """Open an encoder, in evaluation mode, on the CPU.

    Args:
        path: the folder, a run folder that holds `encoder/`, or a released MUSE or LEMON file.
        check: compare the stored input/output pair (relative difference < 1e-3).
        pos_resample: of a released MUSE ViT: its positions as the published evaluation has them.

    Raises:
        UserError: not an encoder folder, weights that do not fit, or another function than saved.
    """
    folder = Path(path)
    if folder.is_file() or folder.suffix in (".pth", ".tar"):
        from lemon_muse.released import open_released

        return open_released(folder, pos_resample=pos_resample)
    if not (folder / "config.json").is_file() and (folder / "encoder" / "config.json").is_file():
        folder = folder / "encoder"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{path} is not an encoder folder (no config.json); give the folder that 'lemon-muse "
            f"train' wrote as encoder/, or the run folder."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        encoder = _build(config, load_file(folder / "model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).split("\n")[0]
        raise UserError(f"the encoder in {folder} cannot be loaded: {first}.") from None
    encoder.eval().requires_grad_(False)
    if check and (folder / "check.safetensors").is_file():
        pair = load_file(folder / "check.safetensors")
        apart = _apart(encoder, pair)
        if not apart < SAME:
            raise UserError(
                f"the encoder in {folder} does not give the output that was saved with it "
                f"(relative difference {apart:.2g}): the weights or the timm version differ from "
                f"the writer's."
            )
    return encoder


def _build(
    config: dict[str, Any], state: dict[str, torch.Tensor]
) -> Union[Encoder, "DenseEncoder"]:
    """The encoder that a config.json describes; folders without a kind are older crop encoders."""
    facts = config["lemon_muse"]
    kind = facts.get("kind", "crop")
    if kind == "muse":
        from lemon_muse.dense import from_facts

        return from_facts(facts, state)
    if kind not in (Encoder.kind, ARCHITECTURE):
        raise ValueError(f"kind '{kind}' is not known to lemon_muse {__version__}")
    from lemon_muse.backbones import network_of

    network = network_of(config["architecture"], config["model_args"])
    network.load_state_dict(state)
    return encoder_of(
        network,
        architecture=config["architecture"],
        arguments=config["model_args"],
        image_size=facts["image_size"],
        mpp=facts["mpp"],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        name=facts["name"],
    )


@torch.inference_mode()
def _apart(encoder: FrozenEncoder, pair: dict[str, torch.Tensor]) -> float:
    """Largest relative difference between the stored outputs and those of now."""
    found = encoder.check_output(pair)
    parts = [(v - pair[k]).norm() / pair[k].norm().clamp_min(1e-12) for k, v in found.items()]
    # Unlike max(), this keeps a NaN.
    return float(torch.stack(parts).max())
