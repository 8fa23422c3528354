"""Views of crops as the methods on crops use them: which distributions, drawn and made."""

from typing import Any

import torch

from lemon_muse.data import augment
from lemon_muse.data import augment_ops as ops
from lemon_muse.data.augment import ViewConfig
from lemon_muse.data.stain_views import Mixture, Stains
from lemon_muse.errors import UserError
from lemon_muse.methods.contract import Setting


class CropViews:
    """The views of a step.

    Attributes:
        views: distribution, side in px, and number (0 first, 1 others: probability of blur) of
            each view. A method may append further ones.

    Raises:
        UserError: the window has no place in the middle of the stored crops, or the view needs
            stains that the slides do not have.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        _check_window(setting)
        view: ViewConfig = setting.view
        self.views: list[tuple[ViewConfig, int, int]] = [
            (view, setting.window, number) for number in (0, 1)
        ]
        slides = setting.slides
        self.stains = None if slides is None else Stains(slides, seed=setting.seed)
        self._mixture(view)  # a mistake is said now, not at the first step

    @property
    def wants_slides(self) -> bool:
        """Whether `make` needs `batch["slide"]`."""
        return any(_stained_anew(view) for view, _, _ in self.views)

    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """Parameters of the views of `count` crops; see `augment.draw`."""
        stored = self.setting.stored
        return [
            augment.draw(
                view,
                count,
                stored=stored,
                window=window,
                generator=generator,
                view=number,
                stains=self._mixture(view),
            )
            for view, window, number in self.views
        ]

    @torch.no_grad()
    def make(self, batch: dict[str, Any]) -> list[torch.Tensor]:
        """The views of a batch's crops, float32 [b, 3, w, w] each, blurred in autocast's dtype."""
        rows = zip(self.views, batch["views"], strict=False)  # a method may have drawn more
        return [self.one(batch, row, view, window) for (view, window, _), row in rows]

    def one(
        self, batch: dict[str, Any], row: dict[str, torch.Tensor], view: ViewConfig, window: int
    ) -> torch.Tensor:
        """One view of `batch["pixels"]` with the parameters `row`: float32 [b, 3, w, w]."""
        s, pixels = self.setting, batch["pixels"]
        return augment.apply(
            pixels,
            row,
            view,
            window=window,
            mean=s.mean,
            std=s.std,
            dtype=ops.autocast_dtype(pixels.device),
            stain=self._change(view, row, batch),
        )

    def _mixture(self, view: ViewConfig) -> Mixture | None:
        if self.stains is None or not view.restain:
            return None
        return self.stains.mixture(view.gaussians)

    def _change(
        self, view: ViewConfig, row: dict[str, torch.Tensor], batch: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not _stained_anew(view):
            return None
        assert self.stains is not None, "views of other stains need the slides of the set"
        return self.stains.change(row, batch["slide"])


def _check_window(setting: Setting) -> None:
    if (setting.stored - setting.window) % 2:
        parity = "odd" if setting.stored % 2 else "even"
        raise UserError(
            f"window={setting.window} px has no place in the middle of stored crops of "
            f"{setting.stored} px; use an {parity} window=, as {setting.window - 1} or "
            f"{setting.window + 1}."
        )


def _stained_anew(view: ViewConfig) -> bool:
    return view.restain > 0 or view.hed > 0
