"""Projection and prediction heads."""

from torch import nn


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
