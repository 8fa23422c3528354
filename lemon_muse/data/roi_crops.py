"""Crops of nuclei out of ROIs that already are on the device, for a whole batch at once.

`choose` picks nuclei, `cut` takes their windows as `geometry.crop` does: whole pixels, mirrored
beyond the ROI's border. Every ROI gives the same number of crops, so that batch norm sees batches
of one size on every rank, whatever the ROIs hold.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lemon_muse.data.geometry import MPP_TOLERANCE
from lemon_muse.data.roi_nuclei import priority


@dataclass(frozen=True)
class Chosen:
    """Nuclei of each ROI, on the device of what they were chosen from.

    Attributes:
        index: int64 [b, k], rows of the ROI's nuclei: ascending, then repeated from the first
            where the ROI holds fewer than k; 0 where it holds none.
        real: bool [b, k], False for repetitions and for ROIs without nuclei.
    """

    index: torch.Tensor
    real: torch.Tensor

    def keys(self, slots: int) -> torch.Tensor:
        """Of the real ones, int64 [m], ascending: row of the ROI * slots + nucleus."""
        row = torch.arange(len(self.index), device=self.index.device)[:, None]
        return (row * slots + self.index)[self.real]


def choose(
    seen: torch.Tensor, counts: torch.Tensor, seed: torch.Tensor, first: torch.Tensor, *, most: int
) -> Chosen:
    """Choose `most` nuclei of each ROI: those that are seen, at random, then others of the ROI.

    Args:
        seen: bool [b, n], nuclei that come first.
        counts: int64 [b], nuclei of each ROI, at most n.
        seed: int64 [b], as for `roi_nuclei.priority`: a ROI's choice depends on its seed alone.
        first: int64 [b], the nucleus before the others that are seen (or not) as it is; -1: none.
        most: k, at least 1.
    """
    room = seen.shape[1]
    index = torch.arange(room, device=seen.device)
    rank = priority(seed, first, room)
    rank = torch.where(seen, rank, rank + 2**60)
    rank = torch.where(index < counts[:, None], rank, torch.iinfo(torch.int64).max)
    taken = rank.argsort(1)[:, :most]
    held = counts.clamp(max=most)[:, None]
    slot = torch.arange(most, device=seen.device)
    # What is past the count comes last, so that sorting leaves it there.
    past = torch.where(slot[: taken.shape[1]] < held, taken, room)
    ordered = past.sort(1).values
    if not room:
        ordered = counts.new_zeros(len(counts), 1)
    return Chosen(
        torch.where(held > 0, ordered.gather(1, slot % held.clamp(min=1)), 0), slot < held
    )


def cut(
    pixels: torch.Tensor,
    points: torch.Tensor,
    chosen: Chosen,
    *,
    size: int,
    mpp: float,
    wanted: float,
) -> torch.Tensor:
    """The windows of the chosen nuclei; where there is no nucleus, the middle of the ROI.

    At the ROIs' own mpp the pixels are those of `geometry.crop` with edge='reflect'; at another one
    a window of whole pixels is resampled with the filter of `geometry.resample`.

    Args:
        pixels: uint8 [b, S, S, 3], RGB.
        points: float32 [b, n, 2], continuous px of the ROI; on the CPU they cost no waiting.
        chosen: of these ROIs, on the device of the points.
        size: side s of the crops, px at `wanted`.
        mpp: µm per pixel of the ROIs.
        wanted: µm per pixel of the crops.

    Returns:
        uint8 [b * k, s, s, 3] on the device of the pixels, the crops of a ROI together.
    """
    side, many = pixels.shape[1], chosen.index.shape[1]
    span = window_px(size, mpp=mpp, wanted=wanted)
    if points.shape[1]:
        centre = points.gather(1, chosen.index[..., None].expand(-1, -1, 2)).double()
    else:
        centre = points.new_zeros(len(points), many, 2).double()
    centre = torch.where(chosen.real.any(1)[:, None, None], centre, side / 2)
    corner = (centre - span / 2 + 0.5).floor().long().flatten(0, 1).to(pixels.device)
    line = corner[..., None] + torch.arange(span, device=pixels.device)  # [b * k, 2, span]
    # Mirrored with the border's pixel repeated, as often as the window needs.
    line = line.remainder(2 * side)
    line = torch.minimum(line, 2 * side - 1 - line)
    owner = torch.arange(len(pixels), device=pixels.device).repeat_interleave(many)
    crops = pixels[owner[:, None, None], line[:, 1, :, None], line[:, 0, None, :]]
    if span == size:
        return crops
    planes = crops.permute(0, 3, 1, 2).float()
    planes = F.interpolate(
        planes, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def window_px(size: int, *, mpp: float, wanted: float) -> int:
    """Side in px of a ROI at `mpp` of a crop of `size` px at `wanted` µm per pixel."""
    if abs(mpp / wanted - 1) <= MPP_TOLERANCE:
        return size
    return max(1, round(size * wanted / mpp))
