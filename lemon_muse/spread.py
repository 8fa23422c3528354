"""Terms that keep the features of a batch apart: KoLeo and a kernel density.

Both take one view's features at a time: two views of one nucleus must stay near each other. They
are computed in fp32 whatever the autocast around, over the rows of all ranks: the mean over ranks
of value and gradient is that of one process with all rows.
"""

import math

import torch
from torch.distributed.nn.functional import all_reduce as all_reduce_with_gradient
from torch.nn import functional as F

from lemon_muse import distributed


def koleo(features: torch.Tensor, *, eps: float = 1e-4) -> torch.Tensor:
    """Kozachenko-Leonenko estimate: - mean log(distance to the nearest other row + eps).

    Sablayrolles et al., "Spreading vectors for similarity search" (2019), as in DINOv2
    (facebookresearch/dinov2, loss/koleo_loss.py), which looks at the rows of one GPU alone.

    Args:
        features: float [n, d], of one view; any length, they are normalised here. n is the same on
            all ranks.
        eps: added to a distance. DINOv2's 1e-8 gave infinite losses on cells; DinoBloom
            (marrlab/DinoBloom, loss/koleo_loss.py) took 1e-4. Rows that are equal pull at nothing.

    Returns:
        fp32 scalar; -log(eps) when all rows are equal, 0 when there is but one row.
    """
    with torch.autocast(features.device.type, enabled=False):
        own, rows, mine = _all_rows(features)
        if len(rows) < 2:
            return own.sum() * 0
        with torch.no_grad():
            cosine = own @ rows.T
            cosine[mine] = -math.inf
            nearest = cosine.argmax(1)
        distance = torch.linalg.vector_norm(own - rows[nearest], dim=1)
        return -(distance + eps).log().mean()


def kde(features: torch.Tensor, *, kappa: float = 5.0) -> torch.Tensor:
    """Mean log density of the rows under a von Mises-Fisher kernel of the other rows.

    + mean over i of log(mean over j != i of exp(kappa cos(i, j))): the sign of the LEMON paper's
    formula, of which a mean is taken where it has a sum. Making it small drives rows apart; the
    opposite sign, seen in public code, draws them together. A row is no neighbour of its own: in
    small batches exp(kappa) would hide the others.

    Args:
        features: float [n, d], as for `koleo`.
        kappa: concentration of the kernel.

    Returns:
        fp32 scalar; kappa when all rows are equal, near kappa^2 / 2d for a uniform sphere, 0 when
        there is but one row.
    """
    with torch.autocast(features.device.type, enabled=False):
        own, rows, mine = _all_rows(features)
        if len(rows) < 2:
            return own.sum() * 0
        logits = kappa * (own @ rows.T)
        logits = logits.masked_fill(mine, -math.inf)
        return logits.logsumexp(1).mean() - math.log(len(rows) - 1)


def _all_rows(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows of this rank [n, d]; of all ranks [n * world, d]; where both are the same row.

    The gradient of another rank's loss comes back to the rows here: what is near them is there.
    """
    wide = features if features.dtype == torch.float64 else features.float()
    own = F.normalize(wide, dim=1)
    first, world = len(own) * distributed.rank(), distributed.world()
    rows = own
    if world > 1:
        after = len(own) * (world - 1) - first
        rows = all_reduce_with_gradient(F.pad(own, (0, 0, first, after)))
    mine = torch.eye(len(own), dtype=torch.bool, device=own.device)
    return own, rows, F.pad(mine, (first, len(rows) - first - len(own)))
