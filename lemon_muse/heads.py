"""Projection and prediction heads."""

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def mlp(
    layers: int, *, in_dim: int, hidden: int, out_dim: int, last_norm: bool = True
) -> nn.Sequential:
    """The MLP of MoCo v3 (facebookresearch/moco-v3, moco/builder.py): [B, in_dim] -> [B, out_dim].

    Linear layers without bias; BN and ReLU after all but the last; after the last a BN without
    affine parameters, if `last_norm`.
    """
    parts: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        width_in = in_dim if i == 0 else hidden
        width_out = out_dim if last else hidden
        parts.append(nn.Linear(width_in, width_out, bias=False))
        if not last:
            parts += [nn.BatchNorm1d(width_out), nn.ReLU(inplace=True)]
        elif last_norm:
            parts.append(nn.BatchNorm1d(width_out, affine=False))
    return nn.Sequential(*parts)


class Prototypes(nn.Module):
    """The weight-normalised last layer of DINO: K directions, each with a length of its own.

    The parameters carry the names of torch's old `weight_norm` (`weight_v` [K, d], `weight_g`
    [K, 1]), hence DINO's checkpoints fit; its machinery, which breaks `deepcopy` after a forward
    pass, is not used.
    """

    def __init__(self, dim: int, count: int, *, norm_last: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dim)  # nn.Linear's own initialisation, as in the reference
        self.weight_v = nn.Parameter(torch.empty(count, dim).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not norm_last)

    def forward(self) -> torch.Tensor:
        """The matrix of prototypes, fp32 [K, d], whatever the autocast around it."""
        with torch.autocast(self.weight_v.device.type, enabled=False):
            return self.weight_g * F.normalize(self.weight_v, dim=1)


class DINOHead(nn.Module):
    """The projection head of DINO (facebookresearch/dino, vision_transformer.py), without BN.

    An MLP with GELU to an L2-normalised bottleneck, then K prototypes. The two halves are apart:
    losses take bottleneck and prototypes, and never need all K logits of all rows at once.

    Args:
        in_dim: width of the encoder's feature.
        out_dim: K, the number of prototypes.
        hidden: width of the MLP.
        bottleneck: d, width of the normalised bottleneck.
        layers: linear layers of the MLP, at least 1.
        norm_last: keep the length of every prototype at 1 (steadier; DINO's choice for ViT-B).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        norm_last: bool,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            linear = nn.Linear(width_in, width_out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.last_layer = Prototypes(bottleneck, out_dim, norm_last=norm_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [n, in_dim] -> bottleneck of length 1, fp32 [n, d]; n may be 0."""
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

    def prototypes(self) -> torch.Tensor:
        """fp32 [K, d], with gradient."""
        return self.last_layer()

    def logits(self, bottleneck: torch.Tensor) -> torch.Tensor:
        """Bottleneck [n, d] -> fp32 [n, K]: what the reference's head returns."""
        with torch.autocast(bottleneck.device.type, enabled=False):
            return bottleneck @ self.prototypes().T
