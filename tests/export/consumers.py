"""What CellViT's code does with an encoder file, written from the tables of its rules."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

State = dict[str, torch.Tensor]
SKIPS = (3, 6, 9, 12)


class Part(nn.Module):
    """A holder of tensors and other holders: only its names matter."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            if isinstance(value, tuple):
                value = nn.Parameter(torch.zeros(value))
            setattr(self, name, value)


def layer(out: int, inner: int) -> Part:
    return Part(weight=(out, inner), bias=(out,))


def norm_of(width: int) -> Part:
    part = Part(weight=(width,), bias=(width,))
    part.weight.data.fill_(1)
    return part


class CellViTEncoder(nn.Module):
    """A ViT with 197 positions and a tissue head; skips are read before the final norm."""

    def __init__(self, *, width: int = 384, heads: int = 6, tissues: int = 19) -> None:
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.patch_embed = Part(proj=Part(weight=(width, 3, 16, 16), bias=(width,)))
        self.blocks = nn.ModuleList(
            Part(
                norm1=norm_of(width),
                attn=Part(qkv=layer(3 * width, width), proj=layer(width, width)),
                norm2=norm_of(width),
                mlp=Part(fc1=layer(4 * width, width), fc2=layer(width, 4 * width)),
            )
            for _ in range(12)
        )
        self.norm = norm_of(width)
        self.head = layer(tissues, width)

    def positions(self, rows: int, cols: int) -> torch.Tensor:
        """The table, resampled with DINO's 0.1 unless the image is 224 px."""
        if (rows, cols) == (14, 14):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / 14, (cols + 0.1) / 14)
        moved = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], moved.flatten(2).transpose(1, 2)], 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tokens after the final norm [B, 1 + n, D]; those after blocks 3, 6, 9, 12 before it."""

        def norm(x: torch.Tensor, part: Any) -> torch.Tensor:
            return F.layer_norm(x, x.shape[-1:], part.weight, part.bias, eps=1e-6)

        def linear(x: torch.Tensor, part: Any) -> torch.Tensor:
            return x @ part.weight.T + part.bias

        proj: Any = self.patch_embed.proj
        maps = F.conv2d(images, proj.weight, proj.bias, stride=16)
        x = torch.cat([self.cls_token.expand(len(maps), -1, -1), maps.flatten(2).mT], 1)
        x = x + self.positions(*maps.shape[-2:])
        skips = []
        for i, block in enumerate(self.blocks, 1):
            b: Any = block
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in linear(norm(x, b.norm1), b.attn.qkv).chunk(3, -1)
            )
            weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + linear((weights @ v).transpose(1, 2).flatten(2), b.attn.proj)
            hidden = linear(norm(x, b.norm2), b.mlp.fc1)
            x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), b.mlp.fc2)
            if i in SKIPS:
                skips.append(x)
        return norm(x, self.norm), skips


class GenericCellViT(nn.Module):
    """The class behind `backbone: default`: an encoder with settings, and a decoder."""

    def __init__(
        self, embed_dim: int, depth: int, num_heads: int, extract_layers: list[int]
    ) -> None:
        super().__init__()
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.extract_layers = extract_layers
        self.encoder = CellViTEncoder(width=embed_dim, heads=num_heads)
        self.decoder0 = nn.Conv2d(3, 32, 3)


def cellvit256(path: Path) -> tuple[CellViTEncoder, Any]:
    """CellViT256's loader: `teacher`, two substrings cut out of every name, strict=False."""
    state = torch.load(str(path), map_location="cpu")["teacher"]
    for cut in ("module.", "backbone."):
        state = {key.replace(cut, ""): value for key, value in state.items()}
    encoder = CellViTEncoder()
    return encoder, encoder.load_state_dict(state, strict=False)


def loaded(message: Any, encoder: CellViTEncoder) -> int:
    """How many tensors a load with strict=False has set."""
    return len(encoder.state_dict()) - len(message.missing_keys)
