"""Released checkpoint files, told apart by what is in them: LEMON's (.pth.tar) and MUSE's (.pth).

LEMON is a MoCo v3 checkpoint: the query encoder lies under `module.base_encoder.` of `state_dict`,
a ViT-S/8 of 40 px windows with MoCo v3's 12 heads. The same shapes with timm's 6 heads load without
a complaint and compute another function, so heads are set here and never worked out.
Source: the model card and vits.py of aliceblondel/LEMON on the Hugging Face hub.
"""

import argparse
import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch

from lemon_muse.encoder import Encoder
from lemon_muse.errors import UserError

if TYPE_CHECKING:
    from lemon_muse.dense import DenseEncoder

LEMON_PREFIX = "module.base_encoder."
LEMON_SIZE, LEMON_MPP = 40, 0.25
# The mean_std.json that is published with the weights.
LEMON_MEAN = (0.5626309, 0.3856308, 0.5453570)
LEMON_STD = (0.1810322, 0.1668266, 0.1369456)
STATISTICS = "mean_std.json"
# MoCo v3's ViTs (vits.py of facebookresearch/moco-v3): width -> our name; all have 12 heads.
LEMON_VITS = {384: "vit_small", 768: "vit_base"}
LEMON_HEADS = 12


def open_released(path: Path, *, pos_resample: bool = False) -> Union[Encoder, "DenseEncoder"]:
    """The encoder of a released file, in evaluation mode, on the CPU, named after the file.

    Args:
        path: of any name; a `mean_std.json` beside a LEMON file is read.
        pos_resample: of a MUSE ViT, see `muse_weights.from_released`; nothing to a LEMON file.

    Raises:
        UserError: no such file, a file of another kind, or weights that do not fit.
    """
    stored = _read(path)
    if isinstance(stored, dict):
        state = stored.get("state_dict")
        if isinstance(state, dict) and any(str(key).startswith(LEMON_PREFIX) for key in state):
            return _lemon(state, path)
        if "teacher" in stored:
            from lemon_muse.dense import from_released_file

            return from_released_file(path, stored, pos_resample=pos_resample)
    held = f"has {', '.join(map(str, list(stored)[:4]))}" if isinstance(stored, dict) else "is none"
    raise UserError(
        f"{path} is neither a released LEMON file ('state_dict' with {LEMON_PREFIX}*) nor a "
        f"released MUSE file ('teacher'): it should be a dict with one of these, and it {held}; "
        f"weights of a timm model are opened as timm:NAME,checkpoint_path={path}."
    )


def statistics(given: Mapping[str, Any], where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of R, G, B for pixels in 0..1, from a mapping with both.

    Raises:
        UserError: one is missing, is not three numbers, or is not for pixels in 0..1.
    """
    out = []
    for key in ("mean", "std"):
        value = given.get(key)
        try:
            numbers = tuple(float(v) for v in value)  # type: ignore[union-attr]
        except (TypeError, ValueError):
            numbers = ()
        low = 0.0 if key == "mean" else 1e-6
        if len(numbers) != 3 or not all(low <= v <= 1 for v in numbers):
            raise UserError(
                f"{where}: '{key}' must be three numbers for R, G, B of pixels in 0..1, "
                f"not {value!r}."
            )
        out.append(numbers)
    return out[0], out[1]


def _read(path: Path) -> Any:
    """What the file holds: tensors and plain values; code is never run."""
    if not path.is_file():
        raise UserError(f"there is no file {path}.")
    try:
        # DINO stores its arguments as a Namespace: a bag of attributes, harmless.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked:
            raise UserError(
                f"{path} holds a Python object ({blocked[1]}) beside its tensors and is not read: "
                f"that could run code; save its tensors alone with torch.save first."
            ) from None
        raise UserError(f"{path} is not a file that torch.save wrote.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(
            f"{path} is cut short or not a file that torch.save wrote; fetch it again."
        ) from None


def _lemon(stored: dict[str, Any], path: Path) -> Encoder:
    """The encoder of a LEMON checkpoint; projection head, predictor and momentum are left out."""
    from lemon_muse.backbones import create

    state = {
        key.removeprefix(LEMON_PREFIX): value
        for key, value in stored.items()
        if isinstance(value, torch.Tensor)
        and key.startswith(LEMON_PREFIX)
        and not key.startswith(f"{LEMON_PREFIX}head.")
    }
    architecture, arguments = _architecture(state, path)
    network = create("LEMON", architecture, arguments, short=())
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        what = " ".join(line.strip() for line in str(error).split("\n")[1:])
        raise UserError(f"{path} does not fit LEMON's network: {what[:300]}") from None
    bad = [key for key, value in state.items() if not value.isfinite().all()]
    if bad:
        raise UserError(f"{path} holds weights that are not finite ({bad[0]}); fetch it again.")
    mean, std = _statistics_beside(path)
    encoder = Encoder(
        network,
        architecture=architecture,
        arguments=arguments,
        image_size=LEMON_SIZE,
        mpp=LEMON_MPP,
        mean=mean,  # type: ignore[arg-type]
        std=std,  # type: ignore[arg-type]
        name=Path(path.name.removesuffix(".tar")).stem,
    )
    return encoder.eval().requires_grad_(False)


def _architecture(state: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """What timm builds the network from: width, depth, patch and window from the shapes."""
    from lemon_muse.backbones import Backbone, timm_arguments

    table, patch = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if table is None or patch is None or table.dim() != 3 or patch.dim() != 4:
        raise UserError(
            f"{path} holds no ViT: {LEMON_PREFIX}pos_embed or patch_embed.proj.weight is missing."
        )
    width, side = table.shape[2], patch.shape[-1]
    if width not in LEMON_VITS:
        raise UserError(
            f"{path} holds a ViT of width {width}; LEMON's are {' and '.join(map(str, LEMON_VITS))}"
            f" wide, and the heads of another are not known."
        )
    window = math.isqrt(max(0, table.shape[1] - 1)) * side
    if window != LEMON_SIZE:
        raise UserError(
            f"{path} holds a MoCo v3 ViT of {window} px images where LEMON has {LEMON_SIZE}: its "
            f"mpp and normalisation are not known; open it with a python: function "
            f"(docs/encoders.md)."
        )
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    settings = Backbone(
        name=LEMON_VITS[width],
        patch=side,
        heads=LEMON_HEADS,
        args={} if depth == 12 else {"depth": depth},
    )
    return timm_arguments(settings, LEMON_SIZE)


def _statistics_beside(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those of mean_std.json in the file's folder, or the published ones."""
    file = path.with_name(STATISTICS)
    if not file.is_file():
        return LEMON_MEAN, LEMON_STD
    try:
        given = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no JSON ({error}); mend it, or remove it.") from None
    if not isinstance(given, dict):
        raise UserError(f'{file} must hold {{"mean": [...], "std": [...]}}; mend or remove it.')
    return statistics(given, str(file))
