"""What MoCo v3 does to a ViT: initial weights, fixed sin-cos positions, frozen patch projection."""

import math
from typing import Any

import torch
from torch import nn


def sincos_positions(
    dim: int, rows: int, cols: int, *, temperature: float = 10000.0
) -> torch.Tensor:
    """Fixed 2-D sin-cos position table, float32 [rows * cols, dim].

    Quarter of the channels each: sin and cos of the column, sin and cos of the row are laid out as
    in the released LEMON weights, whose first half encodes the row index (meshgrid 'ij').
    """
    if dim % 4:
        raise ValueError(f"the width must be divisible by 4, not {dim}")
    quarter = dim // 4
    omega = 1.0 / temperature ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    row, col = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(cols, dtype=torch.float64),
        indexing="ij",
    )
    by_row = row.reshape(-1, 1) * omega
    by_col = col.reshape(-1, 1) * omega
    return torch.cat([by_row.sin(), by_row.cos(), by_col.sin(), by_col.cos()], dim=1).float()


def prepare_moco_vit(vit: Any, *, freeze_patch: bool, sincos: bool) -> None:
    """Initialise a timm ViT as the MoCo v3 reference does (facebookresearch/moco-v3, vits.py).

    Linear layers Xavier-uniform (q, k and v as three matrices), biases zero, class token
    N(0, 1e-6), patch projection uniform by its fan; positions sin-cos with a zero row for the
    class token.
    """
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith("qkv"):
                fan = module.weight.shape[0] // 3 + module.weight.shape[1]
                nn.init.uniform_(module.weight, -math.sqrt(6.0 / fan), math.sqrt(6.0 / fan))
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patch = vit.patch_embed
    projection = getattr(patch, "proj", None)
    if isinstance(projection, nn.Conv2d):
        fan = 3 * math.prod(projection.kernel_size) + projection.out_channels
        nn.init.uniform_(projection.weight, -math.sqrt(6.0 / fan), math.sqrt(6.0 / fan))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=1e-6)
    if sincos and vit.pos_embed is not None:
        rows, cols = patch.grid_size
        table = sincos_positions(vit.embed_dim, rows, cols)
        prefix = vit.pos_embed.shape[1] - len(table)
        with torch.no_grad():
            vit.pos_embed.copy_(torch.cat([torch.zeros(prefix, vit.embed_dim), table])[None])
        vit.pos_embed.requires_grad_(False)
    if freeze_patch:
        patch.requires_grad_(False)


def use_plain_attention(network: nn.Module) -> None:
    """Compute attention by two products and a softmax instead of torch's fused kernel.

    On CPUs the fused kernel is 2.6 times slower in bf16 at 26 tokens (ViT-S/8, forward and
    backward, AVX-512 bf16, measured); in fp32 and on GPUs it is the better one.
    """
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
