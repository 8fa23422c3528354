"""Views of DINOv2 on crops: two global ones, then local ones of anywhere in the window."""

from typing import Any

import torch

from lemon_muse.data.augment import ViewConfig, reach
from lemon_muse.errors import UserError
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.crop_views import CropViews
from lemon_muse.methods.dinov2_config import Dinov2Config

GLOBALS = 2


class Dinov2Views(CropViews):
    """Two global views, then the local ones."""

    local: ViewConfig | None = None  # distribution of the local views, if there are any

    def __init__(self, settings: Dinov2Config, setting: Setting) -> None:
        super().__init__(setting)
        if settings.global_scale:
            self.views = [
                (_changed(view, scale=settings.global_scale), window, number)
                for view, window, number in self.views
            ]
        if not settings.locals:
            return
        size, view = settings.local_size, setting.view
        _check_local_size(size, setting)
        # Drawn within the middle `local_size` px and zoomed out to the window.
        self.zoom = setting.window / size
        self.local = _changed(
            view,
            centred=False,
            scale=settings.local_scale,
            blur=(settings.local_blur, settings.local_blur),
            shift=view.shift / self.zoom,
        )
        # `augment.apply` asks how far a view reaches, to know what lies beyond the stored crop.
        further = (self.zoom - 1) * reach(self.local, size)
        self._zoomed = _changed(self.local, shift=self.local.shift + further)
        self.views += [(self.local, size, 2)] * settings.locals

    def draw(self, count: int, generator: torch.Generator) -> list[dict[str, torch.Tensor]]:
        """As `CropViews.draw`; local views lie anywhere in the window, as in DINO."""
        rows = super().draw(count, generator)
        for row in rows[GLOBALS:]:
            row["theta"] = row["theta"] * self.zoom
        return rows

    def one(
        self, batch: dict[str, Any], row: dict[str, torch.Tensor], view: ViewConfig, window: int
    ) -> torch.Tensor:
        """As `CropViews.one`."""
        return super().one(batch, row, self._zoomed if view is self.local else view, window)


def _changed(view: ViewConfig, **changes: Any) -> ViewConfig:
    return ViewConfig(**{**view.model_dump(), **changes})


def _check_local_size(size: int, setting: Setting) -> None:
    if not size <= setting.window or (setting.stored - size) % 2:
        raise UserError(
            f"method.local_size={size} px must be at most window={setting.window}, and even or odd "
            f"as the stored crops of {setting.stored} px are."
        )
