"""Masked image modelling for small ViTs: masks of patches, the masked pass, the loss of iBOT.

Zhou et al., "iBOT" (2022), with what DINOv2 made of it (facebookresearch/dinov2: data/masking.py,
data/collate.py, loss/ibot_patch_loss.py, models/vision_transformer.py).
"""

import math
from typing import Any, Literal

import torch
from timm.layers import DropPath, PatchEmbed
from timm.models import VisionTransformer
from torch import nn

from lemon_muse import distributed
from lemon_muse.backbones.muse import resize_positions
from lemon_muse.errors import UserError
from lemon_muse.matching import MatchedCrossEntropy, Matches, Part, Teacher

Kind = Literal["block", "random"]
TRIES = 5  # rectangles that are tried for a mask; what is missing then is drawn patch by patch
LEAST = 4  # patches of the smallest rectangle, and its most extreme ratio of sides: DINOv2's
RATIO = 0.3


def masked_images(count: int, share: float) -> int:
    """How many of `count` images have a mask."""
    return int(count * share)


def draw_masks(
    count: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    *,
    share: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    kind: Kind = "block",
) -> torch.Tensor:
    """Which patches of `count` images are masked; draw them for the *global* batch.

    As in DINOv2 a share of the images has a mask; its ratios lie evenly in `ratio`, one in each of
    as many equal steps. Unlike there, a mask has exactly the number of patches that its ratio says.

    Args:
        count: images of all ranks.
        grid: rows and columns of patches.
        generator: a CPU generator, the only source of randomness; what is taken of it does not
            depend on the settings, but for `share`.
        share: of the images, with a mask.
        ratio: least and largest share of an image's patches; at least one patch is masked.
        kind: block draws rectangles first, random single patches.

    Returns:
        bool [count, rows * columns], on the CPU; True is masked.
    """
    rows, columns = grid
    masked = masked_images(count, share)
    order = torch.rand(count, generator=generator).argsort()[:masked]
    step = (torch.arange(masked) + torch.rand(masked, generator=generator)) / max(masked, 1)
    wanted = (rows * columns * (ratio[0] + (ratio[1] - ratio[0]) * step)).int().clamp_min(1)
    u = torch.rand(TRIES, 4, masked, 1, 1, generator=generator)
    found = torch.zeros(masked, rows, columns, dtype=torch.bool)
    if kind == "block":
        for numbers in u:
            found = _with_rectangle(found, wanted, numbers)
    flat = found.flatten(1)
    # The missing patches are those with the smallest numbers of the patches that are free.
    scores = torch.rand(masked, rows * columns, generator=generator).masked_fill(flat, 2.0)
    missing = wanted - flat.sum(1)
    out = torch.zeros(count, rows * columns, dtype=torch.bool)
    out[order] = flat | (scores.argsort(1).argsort(1) < missing[:, None])
    return out


def _with_rectangle(found: torch.Tensor, wanted: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Masks [m, rows, columns] with one more rectangle, where it fits and is not too many."""
    rows, columns = found.shape[1:]
    left = (wanted - found.sum((1, 2)))[:, None, None]
    least = left.clamp_max(LEAST)
    area = least + u[0] * (left - least)
    aspect = torch.exp((2 * u[1] - 1) * math.log(1 / RATIO))
    height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    top = (u[2] * (rows - height + 1)).floor()
    start = (u[3] * (columns - width + 1)).floor()
    at_row, at_column = torch.arange(rows)[:, None], torch.arange(columns)
    inside = (at_row >= top) & (at_row < top + height)
    inside = inside & (at_column >= start) & (at_column < start + width)
    new = (inside & ~found).sum((1, 2))[:, None, None]
    good = (height <= rows) & (width <= columns) & (new <= left)
    return found | (inside & good)


class TokenViT(nn.Module):
    """A plain timm ViT that gives class token and patch tokens, of masked and of smaller images.

    The network stays as timm built it: its weights load into the same arguments. The mask token is
    the caller's, who does not export it.

    Raises:
        UserError: another network, or one whose feature is not the class token.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        patch = getattr(network, "patch_embed", None)
        if type(network) is not VisionTransformer or not isinstance(patch, PatchEmbed):
            raise UserError(
                f"backbone.name: masked patches need a plain ViT of timm, not a "
                f"{type(network).__name__}; use vit_tiny, vit_small or vit_base (and no "
                f"backbone.inner)."
            )
        if network.global_pool != "token" or network.pos_embed is None:
            raise UserError(
                "the losses take the class token and positions of a ViT, and this one exports "
                "another feature or has none; set backbone.pool=token."
            )
        extra = {"patch_drop_rate": network.patch_drop, "fc_norm": network.fc_norm}
        for name, module in extra.items():
            if not isinstance(module, nn.Identity):
                raise UserError(f"backbone.args must not hold {name}: patches or features change.")
        self.vit: Any = network
        self.dim = int(network.embed_dim)
        self.patch = int(patch.patch_size[0])
        self.grid: tuple[int, int] = (int(patch.grid_size[0]), int(patch.grid_size[1]))

    def forward(
        self,
        images: torch.Tensor,
        mask: torch.Tensor | None = None,
        token: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Class tokens [B, D] and patch tokens [B, N, D] after the final norm.

        Args:
            images: float [B, 3, H, W], sides multiples of the patch. The position table is
                resampled (bicubic, cells keep their places) where H and W are not the network's:
                a smaller view is taken for the whole window, as in DINO.
            mask: bool [B, N]; True patches are replaced by `token`, their positions stay.
            token: float [D], with gradient.
        """
        vit = self.vit
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        patches = vit.patch_embed.norm(vit.patch_embed.proj(images).flatten(2).transpose(1, 2))
        if mask is not None and token is not None:
            patches = torch.where(mask[..., None], token.to(patches.dtype), patches)
        tokens = vit.norm_pre(vit.pos_drop(self._with_positions(patches, grid)))
        tokens = vit.norm(vit.blocks(tokens))
        return tokens[:, 0], tokens[:, vit.num_prefix_tokens :]

    def _with_positions(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        vit = self.vit
        leading = torch.cat([t for t in (vit.cls_token, vit.reg_token) if t is not None], 1)
        leading = leading.expand(len(patches), -1, -1).to(patches.dtype)
        table, prefix = vit.pos_embed, 0 if vit.no_embed_class else vit.num_prefix_tokens
        if grid != self.grid:
            moved = resize_positions(table[:, prefix:], self.grid, grid)
            table = torch.cat([table[:, :prefix], moved], 1)
        if vit.no_embed_class:
            return torch.cat([leading, patches + table], 1)
        return torch.cat([leading, patches], 1) + table

    def without_drops(self) -> None:
        """Switch off stochastic depth and dropout for good: a teacher drops nothing."""
        for module in self.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0


def patch_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    prototypes: torch.Tensor,
    target: Teacher,
    *,
    temperature: float = 0.1,
    chunk: int = 1024,
) -> dict[str, torch.Tensor]:
    """Cross-entropy at masked patches: mean over an image's, then over all images of the views.

    As DINOv2's: an image without a mask counts as 0, so half of the images masked gives half the
    cross-entropy. A collective: every rank calls it. Without a masked patch the loss is 0 and its
    gradients are zeros, not missing.

    Args:
        student: bottleneck of the masked patches, float [m, d], in the order of `mask`.
        teacher: the same of the teacher, which saw the whole image.
        mask: bool [images, N], on the CPU (elsewhere this waits for it); m are True.
        prototypes: the student's, float [K, d], with gradient.
        target: prototypes, centre and temperature of the teacher.
        temperature: of the student.
        chunk: rows whose logits exist at one time.

    Returns:
        `loss`; and detached, means over the masked images of all ranks: `entropy` of the targets,
        `kl` of the student from them, to be averaged over ranks.
    """
    mask = mask.cpu()
    counts = mask.sum(1)
    weights = (1 / counts.clamp_min(1).double())[:, None].expand_as(mask)[mask]
    rows = len(weights)
    if len(student) != rows or len(teacher) != rows:
        raise ValueError(
            f"{rows} patches are masked, but there are {len(student)} rows of the student and "
            f"{len(teacher)} of the teacher"
        )
    at = torch.arange(rows)
    cuts = [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
    images = int((counts > 0).sum())
    matches = Matches(
        at, at, torch.stack([at, at]), weights, [Part(cut, cut, cut) for cut in cuts],
        groups=images, mass=float(images), norm=float(len(mask)),
    )  # fmt: skip
    device = prototypes.device
    masked = torch.tensor(images, dtype=torch.float64).to(device, non_blocking=True)
    masked = distributed.sum_over_ranks(masked)
    with torch.autocast(device.type, enabled=False):
        x, y = (v if v.dtype == torch.float64 else v.float() for v in (student, teacher))
        wide = Teacher(target.prototypes.to(y), target.centre.to(y), target.temperature)
        loss, entropy = MatchedCrossEntropy.apply(
            x, prototypes.to(x), y, wide, matches.to(device), temperature
        )
    mean = (distributed.world() / masked.clamp_min(1)).to(loss.dtype)
    return {
        "loss": loss / len(mask),
        "entropy": entropy * mean,
        "kl": (loss.detach() - entropy) * mean,
    }
