"""Which encoders CellViT's ViT can hold, and the reason where it cannot.

CellViT's encoder is DINO's ViT: patch 16, a class token, pre-norm blocks, LayerNorm with eps 1e-6,
exact GELU, q, k and v in one layer with bias. Its loader is `strict=False`: a part that it does not
know is dropped without a word, so whatever is not exactly that ViT is refused here.
Source: models/encoders/VIT/vits_histo.py, models/segmentation/cell_segmentation/cellvit.py of
TIO-IKIM/CellViT.
"""

from collections.abc import Iterator
from typing import Any, cast

from timm.layers import LayerNorm, Mlp
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from lemon_muse.dense import DenseEncoder
from lemon_muse.errors import UserError
from lemon_muse.frozen import FrozenEncoder

# (width, heads) -> the backbone word of CellViT's configuration.
ROUTES = {(384, 6): "ViT256", (384, 12): "default", (768, 12): "default"}
PATCH, DEPTH, EPS = 16, 12, 1e-6
CROPS = (
    "use it beside a detector instead: features of crops go to CellViT++ as tokens "
    "(docs/use/cellvit.md)"
)
OTHER = "use format=timm instead"


def vit_of(encoder: FrozenEncoder) -> VisionTransformer:
    """The ViT of an encoder, of a MUSE network without its decoder; weights are shared.

    Raises:
        UserError: CellViT cannot hold it, or would compute another function with its weights.
    """
    found = encoder.image_encoder if isinstance(encoder, DenseEncoder) else encoder.network
    if type(found) is not VisionTransformer:
        raise UserError(
            f"CellViT cannot hold {encoder.name}: it is a {type(found).__name__}, and CellViT's "
            f"encoder is a plain ViT; {OTHER}."
        )
    vit = found
    patch = tuple(vit.patch_embed.patch_size)
    if patch != (PATCH, PATCH):
        raise UserError(
            f"CellViT cannot hold {encoder.name}: its patches are {patch[0]} px, and CellViT's "
            f"decoder is built for {PATCH} px; {CROPS}."
        )
    wrong = list(_misfits(vit))
    if wrong:
        raise UserError(f"CellViT cannot hold {encoder.name}: {'; '.join(wrong)}; {OTHER}.")
    return vit


def expected(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the encoder's tensors in CellViT, without the tissue head: 150."""
    out: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 197, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(DEPTH):
        for norm in ("norm1", "norm2"):
            out |= {f"blocks.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
        for name, shape in layers.items():
            out[f"blocks.{i}.{name}.weight"] = shape
            out[f"blocks.{i}.{name}.bias"] = shape[:1]
    return out


def _misfits(vit: VisionTransformer) -> Iterator[str]:
    """Everything that CellViT's ViT is not; what `strict=False` would drop comes by name."""
    heads = cast(Any, vit.blocks[0]).attn.num_heads
    if len(vit.blocks) != DEPTH:
        yield f"it has {len(vit.blocks)} blocks instead of {DEPTH}"
    if (vit.embed_dim, heads) not in ROUTES:
        known = ", ".join(f"{width}/{count}" for width, count in ROUTES)
        yield f"its width/heads are {vit.embed_dim}/{heads}, and those that fit are {known}"
    if vit.cls_token is None or vit.no_embed_class or vit.pos_embed is None:
        yield "it has no class token, or none with a position, which CellViT's tissue head reads"
    if not isinstance(vit.head, nn.Identity):
        yield "it has a classifier, where CellViT has its own for tissues"
    if isinstance(vit.norm, nn.Identity):
        yield "it averages patches before its last norm, where CellViT norms the class token"
    yield from odd_parts(vit)


def odd_parts(vit: VisionTransformer) -> Iterator[str]:
    """What a ViT computes otherwise than DINO's and MoCo v3's ViTs of the same size do."""
    if vit.reg_token is not None:
        yield "it has register tokens, which DINO's ViT has not"
    if not isinstance(vit.norm_pre, nn.Identity) or not isinstance(
        vit.patch_embed.norm, nn.Identity
    ):
        yield "it norms before the first block, which DINO's ViT does not"
    blocks = list(vit.blocks)
    if any(hasattr(block, "ls1") and not isinstance(block.ls1, nn.Identity) for block in blocks):
        yield "it has LayerScale, which the loader drops"
    if not all(type(block) is Block and _plain(block) for block in blocks):
        yield "its blocks are not DINO's (pre-norm, q, k and v with bias, GELU, four times as wide)"
    norms = [m for m in vit.modules() if isinstance(m, nn.LayerNorm)]
    if any(norm.eps != EPS for norm in norms) or not all(type(n) in _NORMS for n in norms):
        yield f"its norms are not LayerNorms with eps {EPS:g}"


_NORMS = (nn.LayerNorm, LayerNorm)


def _plain(block: Any) -> bool:
    """Whether a block's parts compute what CellViT's do, LayerScale left aside."""
    attention: Any = block.attn
    mlp: Any = block.mlp
    wide: Any = mlp.fc1.out_features if type(mlp) is Mlp else 0
    return (
        type(attention) is Attention
        and type(mlp) is Mlp
        and isinstance(block.norm1, nn.LayerNorm)
        and isinstance(block.norm2, nn.LayerNorm)
        and all(isinstance(m, nn.Identity) for m in (attention.q_norm, attention.k_norm))
        and isinstance(attention.norm, nn.Identity)
        and attention.qkv.bias is not None
        and attention.proj.bias is not None
        and isinstance(mlp.norm, nn.Identity)
        and isinstance(mlp.act, nn.GELU)
        and mlp.act.approximate == "none"
        and wide == 4 * int(attention.qkv.in_features)
    )
