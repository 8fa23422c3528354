"""The table of encoders.

Every backbone is a timm model with recorded arguments, so that what is trained here is loaded by
timm unchanged. Short names are ViTs for small windows; any other name is looked up in timm. The one
exception is a ViT of two windows (`backbone.inner`), which only this package loads.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

import timm
import torch
from pydantic import Field, model_validator
from torch import nn

from lemon_muse.backbones.two_windows import ARCHITECTURE, TwoWindows, check_sides
from lemon_muse.backbones.vit import prepare_moco_vit
from lemon_muse.config import Config
from lemon_muse.errors import UserError

# MoCo v3's (and LEMON's) ViT-S has 12 heads where timm's and DeiT's has 6: the shapes are the same,
# the network is not. ViT-Ti follows the same head width of 32; ViT-B has 12 in both.
VITS: dict[str, tuple[str, int]] = {
    "vit_tiny": ("vit_tiny_patch16_224", 6),
    "vit_small": ("vit_small_patch16_224", 12),
    "vit_base": ("vit_base_patch16_224", 12),
}
PATCH = re.compile(r"patch(\d+)")  # in timm's names


class Backbone(Config):
    """The encoder network."""

    name: str = Field(
        "vit_small", description="vit_tiny, vit_small, vit_base or any timm model name"
    )
    patch: int = Field(
        8,
        gt=0,
        description="ViT patch side, px; must divide the window; a timm name with one has its own",
    )
    heads: int | None = Field(None, description="ViT attention heads; none = the method's table")
    pool: Literal["token", "avg"] = Field(
        "token", description="ViT feature: class token or mean of patches"
    )
    freeze_patch: bool = Field(
        True, description="ViT: keep the random patch projection fixed (MoCo v3's stability trick)"
    )
    sincos: bool = Field(
        True, description="ViT: fixed 2-D sin-cos positions instead of learnt ones"
    )
    args: dict[str, Any] = Field(
        {}, description="further timm arguments, e.g. {depth: 4, embed_dim: 192}"
    )
    inner: int | None = Field(
        None,
        gt=0,
        description="ViT: two windows in one network, the middle of this side (px) at full "
        "resolution and the whole window averaged down to it; none = one window",
    )

    @model_validator(mode="before")
    @classmethod
    def _own_patch(cls, given: Any) -> Any:
        """Saved settings hold every field: what was built must not hang on which were given."""
        if isinstance(given, dict) and "patch" not in given:
            found = PATCH.search(str(given.get("name", "")))
            if found is not None:
                return {**given, "patch": int(found[1])}
        return given


def arguments_of(settings: Backbone, window: int) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments from which `network_of` makes this backbone again.

    They are timm's, or of two windows: 'two_windows' with `vit` (timm's architecture), `inner`,
    `window` and timm's arguments. JSON-serialisable.
    """
    if settings.inner is None:
        return timm_arguments(settings, window)
    check_sides(settings.inner, window)
    vit, arguments = timm_arguments(settings, settings.inner)
    return ARCHITECTURE, {"vit": vit, "inner": settings.inner, "window": window, **arguments}


def network_of(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """The network that `arguments_of` describes, at random, without classifier."""
    if architecture != ARCHITECTURE:
        return timm.create_model(architecture, num_classes=0, **arguments)
    rest = {k: v for k, v in arguments.items() if k not in ("vit", "inner", "window")}
    vit = timm.create_model(arguments["vit"], num_classes=0, **rest)
    return TwoWindows(vit, inner=arguments["inner"], window=arguments["window"])


def timm_arguments(settings: Backbone, window: int) -> tuple[str, dict[str, Any]]:
    """The timm architecture and the arguments that make this backbone (JSON-serialisable)."""
    if settings.name in VITS or settings.name.startswith("vit_"):
        architecture, heads = VITS.get(settings.name, (settings.name, None))
        if window % settings.patch:
            raise UserError(
                f"backbone.patch={settings.patch} does not divide window={window}; "
                f"use one of {[p for p in range(2, window + 1) if window % p == 0]}."
            )
        chosen: dict[str, Any] = {"img_size": window, "global_pool": settings.pool}
        usual = Backbone.model_fields["patch"].default
        # Hybrids (vit_small_r26_s32_224) have no patch in their name, and no 8 px either.
        if settings.name in VITS or PATCH.search(settings.name) or settings.patch != usual:
            chosen["patch_size"] = settings.patch
        if settings.heads or heads:
            chosen["num_heads"] = settings.heads or heads
        return architecture, {**chosen, **settings.args}
    return settings.name, dict(settings.args)


def create(
    name: str, architecture: str, arguments: dict[str, Any], *, short: Iterable[str]
) -> nn.Module:
    """A timm model without classifier, at random; `name` is what the user called it.

    Raises:
        UserError: neither one of the `short` names nor one of timm's, or arguments that misfit.
    """
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture.split('_')[0]}*")[:5]
        raise UserError(
            f"backbone.name '{name}' is neither {', '.join(short)} nor a timm model"
            + (f"; near names: {', '.join(near)}." if near else ".")
        )
    try:
        return timm.create_model(architecture, num_classes=0, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"timm cannot build {architecture} with {arguments}: {error}.") from None


def build(settings: Backbone, window: int, *, seed: int) -> nn.Module:
    """A freshly initialised backbone: float [B, 3, window, window] -> [B, num_features].

    Raises:
        UserError: a name that timm does not know, arguments that do not fit.
    """
    inner = settings.inner
    if inner is not None:
        check_sides(inner, window)
    architecture, arguments = timm_arguments(settings, inner or window)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create(settings.name, architecture, arguments, short=VITS)
        if isinstance(network, timm.models.VisionTransformer):
            prepare_moco_vit(network, freeze_patch=settings.freeze_patch, sincos=settings.sincos)
        return network if inner is None else TwoWindows(network, inner=inner, window=window)
