"""The nuclei of views: those inside, those within the cap, those that views share."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch


class HasNuclei(Protocol):
    """What this file needs of a `roi_views.View`."""

    @property
    def points(self) -> torch.Tensor: ...

    @property
    def inside(self) -> torch.Tensor: ...


def within(points: torch.Tensor, *, size: int, margin: float) -> torch.Tensor:
    """Nuclei at least `margin` px from the border of their view, bool [b, n]; NaN never is.

    Args:
        points: float32 [b, n, 2], continuous px of the view.
        size: side of the view, pixels.
        margin: pixels.
    """
    return ((points >= margin) & (points <= size - margin)).all(2)


def cap(
    inside: torch.Tensor, seed: torch.Tensor, first: torch.Tensor, *, most: int
) -> torch.Tensor:
    """Keep at most `most` nuclei of a ROI, the same ones in every view as far as possible.

    A nucleus has one random priority for all views of its ROI, a hash of the seed and its index.
    A nucleus that two views hold is kept by both if it is among the first `most` of either.

    Args:
        inside: bool [b, n].
        seed: int64 [b], 0 <= seed < 2^31, one per ROI.
        first: int64 [b], the nucleus that comes before all others; -1 for none.
        most: nuclei to keep, at least 1.

    Returns:
        bool [b, n], on the device of `inside`.
    """
    count = inside.shape[1]
    if count <= most:
        return inside
    rank = priority(seed, first, count)
    rank = torch.where(inside, rank, torch.iinfo(torch.int64).max)
    last = rank.topk(most, dim=1, largest=False).values.amax(1, keepdim=True)
    return inside & (rank <= last)


def priority(seed: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """Random order of the nuclei of each ROI, int64 [b, count]: the smallest comes first.

    Args:
        seed: int64 [b], 0 <= seed < 2^31, one per ROI.
        first: int64 [b], the nucleus that gets -1; -1 for none.
        count: room for nuclei, n; values are below n * 2^32, and all of a ROI's are different.
    """
    index = torch.arange(count, device=seed.device)
    # The index makes all ranks different, whatever the hash.
    rank = _hash(_hash(seed)[:, None] + index) * count + index
    return torch.where(index == first[:, None], -1, rank)


def _hash(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of MurmurHash3 (public domain): int64 in 0..2^32 - 1 from the low 32 bits."""
    low = 0xFFFFFFFF
    value = value & low
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = ((value ^ (value >> shift)) * factor) & low  # wraps around, which keeps these bits
    return value ^ (value >> 16)


def keys(
    view: HasNuclei, *, row_offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nuclei of a view that are to be matched, as lists.

    Args:
        view: of b ROIs with room for n nuclei.
        row_offset: what to add to the rows, so that keys of several ranks differ (if n is equal).

    Returns:
        The keys int64 [m], (row + row_offset) * n + index of the nucleus, sorted: equal keys are
        the same nucleus in all views of a batch. Their points float32 [m, 2], continuous px of the
        view. Their rows int64 [m], of `images`, without the offset.
    """
    row, index = view.inside.nonzero(as_tuple=True)
    return (row + row_offset) * view.inside.shape[1] + index, view.points[row, index], row


def matched(views: Sequence[HasNuclei], teachers: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Every pair of a teacher's view and another one, with the nuclei that both hold.

    Args:
        views: of the same ROIs.
        teachers: how many of them, from the first, are global views.

    Yields:
        Teacher's view t, student's view s != t, and bool [b, n].
    """
    for t in range(teachers):
        for s in range(len(views)):
            if s != t:
                yield t, s, views[t].inside & views[s].inside


def empty_share(views: Sequence[HasNuclei], teachers: int) -> torch.Tensor:
    """Share of (ROI, t, s), as in `matched`, without a shared nucleus: float32 scalar, 0..1.

    It stays on the device of the views. NaN where there are no pairs or no ROIs.
    """
    pairs = [~both.any(1) for _, _, both in matched(views, teachers)]
    if not pairs:
        return torch.tensor(torch.nan, device=views[0].inside.device)
    return torch.stack(pairs).float().mean()
