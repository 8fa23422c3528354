"""The encoder of a ViT of two windows: used like any encoder of windows, opened by this package.

Its network is `lemon_muse.backbones.two_windows`; timm cannot build it, so its folder has no timm
layout and some export formats refuse it.
"""

import copy
import json
from typing import Any, cast

import torch
from torch import nn

from lemon_muse.backbones import network_of
from lemon_muse.backbones.two_windows import ARCHITECTURE
from lemon_muse.backbones.vit import prepare_moco_vit, sincos_positions
from lemon_muse.encoder import Encoder


class TwoWindowEncoder(Encoder):
    """An `Encoder` of `image_size` px whose network looks at the middle and at the whole."""

    kind = ARCHITECTURE

    def __init__(self, network: nn.Module, **facts: Any) -> None:
        super().__init__(network, **facts)
        vit = cast(Any, network).vit
        self.patch_size = int(vit.patch_embed.patch_size[0])
        self.num_heads = int(vit.blocks[0].attn.num_heads)

    def layout(self) -> dict[str, Any]:
        return {"architecture": self.architecture, "model_args": self.arguments}

    def describe(self) -> list[str]:
        made = super().describe()
        inner = self.arguments["inner"]
        return [
            *made[:2],
            f"- network: one timm ViT, {json.dumps(self.arguments)}, that sees the middle {inner} "
            f"px at full resolution and the whole window averaged down to {inner} px",
            made[3],
            "",
            "```python",
            "from lemon_muse.encoder import load",
            'encoder = load("THIS_FOLDER")',
            "```",
            "",
            made[-2],
            "",
        ]

    def fresh(self, *, seed: int) -> "TwoWindowEncoder":
        """The same network at random, as training begins with it: the floor of evaluations."""
        twin = copy.deepcopy(self)
        positions = cast(Any, self.network).vit.pos_embed.detach()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: Any = network_of(self.architecture, self.arguments)
            table = sincos_positions(positions.shape[-1], *network.vit.patch_embed.grid_size)
            fixed = torch.allclose(positions[0, -len(table) :].cpu(), table, atol=1e-4)
            prepare_moco_vit(network.vit, freeze_patch=False, sincos=fixed)
        twin.network = network
        return twin.eval().requires_grad_(False)
