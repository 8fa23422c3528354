"""Stains of slides as points, Gaussians over them, and what turns a crop's stain into another.

The index holds Macenko's two vectors and strengths of each slide (`stain.describe`). Strength times
vector is a row of W [2, 3]: the optical densities of a pixel with much hematoxylin, or eosin. With
d the density of a pixel (a row of three) and pinv(W) [3, 2], a = d pinv(W) are its two amounts as
fractions of the slide's strengths, and d - a W is what the stains do not explain. Another stain W'
gives d - a W + a W' = d (I + pinv(W) (W' - W)): one 3x3 matrix for a view, which is I for W' = W.

A slide is a point of six numbers: two angles of either vector, and the logarithms of the strengths.
One or more Gaussians are fitted over the points, and each view draws a point from them.

RandStainNA (Shen et al., MICCAI 2022; yiqings/RandStainNA) does this in CIELAB: it gives an image
the mean and standard deviation that it draws for each channel. LEMON (table 2) names its rows gmm1
and gmm10. Here the source is the slide and not the image: the mean of a crop of 40 px is that of
its nucleus, so moments of its own would make dark nuclei pale and pale ones dark, which is what a
class is told by. And the stain is changed in densities, so glass stays glass.

The jitter is that of Tellez et al. (IEEE TMI 2018; `light` in Medical Image Analysis 2019): each
stain's amount c becomes α c + β with α in 1 ± 0.05 and β in ± 0.05. c are densities (natural
logarithm) along the unit vectors: the slide's own instead of Ruifrok's, which stand in where a
slide has none. The third channel of Tellez, which is no stain, is left as it is.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lemon_muse.errors import UserError

NUMBERS = 8  # uniform numbers that a target takes: whether, which Gaussian, six coordinates
CUT = 3.0  # standard deviations: beyond them a Gaussian is not drawn from
FULL = 12  # slides for each Gaussian, on average, from which correlations are fitted: twice six
SHRINK = 0.05  # added to the variances, those of all slides being 1: one slide alone has a width
NARROW = 0.01  # radian or logarithm: least standard deviation of all slides that is believed
# Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 2001, as scikit-image's rgb_from_hed.
RUIFROK = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))


def point_of(stain: np.ndarray) -> np.ndarray:
    """Float64 [..., 6] of rows [..., 2, 3] (strength times unit vector): angles, log strengths.

    The angles are atan2(red, green) and asin(blue), of hematoxylin, then of eosin.
    """
    strength = np.linalg.norm(stain, axis=-1)
    unit = stain / strength[..., None]
    turn, lift = np.arctan2(unit[..., 0], unit[..., 1]), np.arcsin(unit[..., 2])
    angles = np.stack([turn, lift], -1).reshape(*strength.shape[:-1], 4)
    return np.concatenate([angles, np.log(strength)], -1)


def stain_of(point: torch.Tensor) -> torch.Tensor:
    """The inverse of `point_of`: [n, 6] -> rows [n, 2, 3]."""
    turn, lift = point[:, 0:4:2], point[:, 1:4:2]
    unit = torch.stack([turn.sin() * lift.cos(), turn.cos() * lift.cos(), lift.sin()], -1)
    return unit * point[:, 4:].exp()[..., None]


@dataclass(frozen=True)
class Mixture:
    """Gaussians over points: weights [k], means [k, 6], factors [k, 6, 6] with L L' = covariance.

    All are float64 on the CPU.
    """

    weights: torch.Tensor
    means: torch.Tensor
    factors: torch.Tensor

    def draw(self, u: torch.Tensor) -> torch.Tensor:
        """Stains, float32 [n, 2, 3], of uniform numbers [7, n]: which Gaussian, and where in it."""
        which = torch.searchsorted(self.weights.cumsum(0), u[0].double())
        which = which.clamp(max=len(self.weights) - 1)
        low = torch.special.ndtr(torch.tensor(-CUT, dtype=torch.float64))
        normal = torch.special.ndtri(low + u[1:].T.double() * (1 - 2 * low))
        moved = (self.factors[which] * normal[:, None]).sum(2)
        return stain_of(self.means[which] + moved).float()


def fit(points: np.ndarray, components: int, *, seed: int) -> Mixture:
    """Fit Gaussians over slides, by scikit-learn's EM on points of unit variance.

    With fewer than 12 slides for a Gaussian the covariances are diagonal, as RandStainNA's are.

    Args:
        points: float [n, 6] of `point_of`, n >= components; each slide counts the same.
        components: how many Gaussians.
        seed: of the starts of EM.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    centre, scale = points.mean(0), np.maximum(points.std(0), NARROW)
    kind = "full" if len(points) >= FULL * components else "diag"
    model = GaussianMixture(
        components, covariance_type=kind, reg_covar=SHRINK, n_init=3, random_state=seed % 2**32
    )
    with warnings.catch_warnings():  # equal slides make fewer clusters; EM that stops early is good
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((points - centre) / scale)
    spread = model.covariances_
    spread = spread if kind == "full" else np.stack([np.diag(row) for row in spread])
    return Mixture(
        weights=torch.from_numpy(model.weights_ / model.weights_.sum()),
        means=torch.from_numpy(model.means_ * scale + centre),
        factors=torch.from_numpy(np.linalg.cholesky(spread) * scale[:, None]),
    )


class Stains:
    """The stains of a set's slides, for views that are stained otherwise.

    Args:
        slides: what the index says of each slide, in the order of the numbers in a batch. Slides
            of which a run sees no nucleus (`count` 0) have no part in the fits.
        seed: of the fits.
    """

    def __init__(self, slides: dict[str, dict[str, Any]], *, seed: int) -> None:
        self.seed, self._fitted = seed, {}  # type: tuple[int, dict[int, Mixture]]
        told = [slide.get("stain") if slide["count"] else None for slide in slides.values()]
        self.read = sum(bool(slide["count"]) for slide in slides.values())
        self.measured = any("stain" in slide for slide in slides.values())
        ruifrok = np.array(RUIFROK) / np.linalg.norm(RUIFROK, axis=1, keepdims=True)
        own = np.repeat(ruifrok[None], len(told), 0)
        known = np.array([bool(stain and stain["vectors"]) for stain in told], bool)
        for i, stain in enumerate(told):
            if stain and stain["vectors"]:
                vectors = np.array(stain["vectors"])  # rounded in the index: not quite unit length
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                own[i] = vectors * np.array(stain["strength"])[:, None]
        self.points = point_of(own[known])
        self.own = torch.from_numpy(own).float()
        self.amounts = torch.from_numpy(np.linalg.pinv(own)).float()  # [slides, 3, 2]
        self.known = torch.from_numpy(known)

    def mixture(self, components: int) -> Mixture:
        """Gaussians over the slides; fitted once, the same for the same slides and seed.

        Raises:
            UserError: fewer slides with two stains than Gaussians, or than two.
        """
        if components not in self._fitted:
            self._check(components)
            self._fitted[components] = fit(self.points, components, seed=self.seed)
        return self._fitted[components]

    def change(
        self, params: dict[str, torch.Tensor], slide: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `augment.apply` takes as `stain`; None where the views keep their stain.

        Args:
            params: rows of `augment.draw` [n, ...]: `stain` and `restain`, `hed`, or none of them.
            slide: int64 [n], whose crop each is.

        Returns:
            Matrix [n, 3, 3] and summand [n, 3], float32: a density d (a row) becomes
            d matrix + summand. A slide without two stains keeps its own, but for the jitter.
        """
        if "stain" not in params and "hed" not in params:
            return None
        slide = slide.cpu()  # where the parameters are
        own, new = self.own[slide], self.own[slide]
        if "stain" in params:
            swap = (params["restain"] > 0) & self.known[slide]
            new = torch.where(swap[:, None, None], params["stain"], own)
        hed = params.get("hed", torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
        change = hed[:, :2, None] * new - own
        # Sums of products instead of `matmul`, which rounds otherwise in batches of another size.
        turned = (self.amounts[slide][..., None] * change[:, None]).sum(2)
        summand = hed[:, 2:, None] * new / new.square().sum(2, keepdim=True).sqrt()
        return torch.eye(3) + turned, summand.sum(1)

    def _check(self, components: int) -> None:
        have, need = len(self.points), max(2, components)
        if have >= need:
            return
        if not self.measured:
            raise UserError(
                "the shards hold no stains of their slides, which view.restain draws from; make "
                "them anew with 'lemon-muse prep', or use view.policy=a1+hed or a1."
            )
        fewer = f"view.gaussians={have} or fewer, " if have >= 2 else ""
        raise UserError(
            f"view.gaussians={components} needs {need} slides with two stains, but the run's "
            f"nuclei have {have} (of {self.read} slides); use {fewer}view.policy=a1+hed, a1, or "
            f"more slides."
        )
