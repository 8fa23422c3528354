"""The `views` job: a picture of what a step of a training run sees, and the numbers behind it.

Samples and views are those of the run with the same words: a function of seed and step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.views.settings import DinoViews, OfCrops, OfRois, Views
from lemon_muse import distributed, steps
from lemon_muse.data import roi_nuclei, roi_views
from lemon_muse.data.files import write_atomic
from lemon_muse.draw import ShownCrop, crop_picture
from lemon_muse.draw_rois import ShownView, roi_picture, shared_nuclei
from lemon_muse.errors import UserError
from lemon_muse.methods import METHODS
from lemon_muse.methods.context import ContextConfig, ContextViews
from lemon_muse.methods.contract import Setting
from lemon_muse.methods.crop_views import CropViews
from lemon_muse.methods.dinov2 import Dinov2Views
from lemon_muse.recipe import Train

__all__ = ["Views", "run"]

# Of `Windows.turn`: exchange x and y (4), then mirror x (1) and y (2).
TURNS = (
    "upright",
    "mirrored",
    "upside down",
    "180°",
    "transposed",
    "90° right",
    "90° left",
    "transposed, 180°",
)


def run(cfg: OfRois | OfCrops) -> Path:
    """Write the pictures and `views.json`; returns the folder.

    Raises:
        UserError: data or settings do not fit, or the run has no such step.
    """
    if cfg.step >= cfg.steps:
        raise UserError(
            f"step={cfg.step} is never made: the run has the steps 0 to {cfg.steps - 1}."
        )
    index = cfg.open_data()
    cfg.check(index)
    setting = cfg.setting(index)
    count = min(cfg.count, cfg.batch)
    rows = np.arange(count) * cfg.batch // count
    batches = steps.open_batches(
        cfg,
        index,
        METHODS[cfg.method.name][1].reads,
        slides=not isinstance(cfg, OfRois) and _views_of(cfg, setting).wants_slides,
        rows=rows,
    )
    batch = batches.batch_at(cfg.step)
    names = batches.reader.describe(batch["samples"])
    cfg.out.mkdir(parents=True, exist_ok=True)
    if isinstance(cfg, OfRois):
        facts, line = _draw_rois(cfg, setting, batch, rows, names)
    else:
        facts, line = _draw_crops(cfg, setting, batch, rows, names)
    head = {"step": cfg.step, "seed": cfg.seed, "batch": cfg.batch, "method": cfg.method.name}
    text = json.dumps({**head, **facts}, indent=1, ensure_ascii=False)
    write_atomic(cfg.out / "views.json", (text + "\n").encode())
    print(f"step {cfg.step}: {line}; {cfg.out} (views.json, step{cfg.step}-*.png)")
    return cfg.out


def _draw_rois(
    cfg: OfRois, setting: Setting, batch: dict[str, Any], rows: np.ndarray, names: list[str]
) -> tuple[dict[str, Any], str]:
    """A picture of each ROI; what `views.json` and the line say."""
    found = _with_views(cfg, batch, rows, lambda n, g: roi_views.draw(cfg.view, n, g))
    with _autocast(cfg, found["pixels"].device):
        views, places = roi_views.make(
            found, cfg.view, mpp=setting.mpp, mean=setting.mean, std=setting.std
        )
    images = [_colours(view.images, setting) for view in views]
    rois = []
    for i, row in enumerate(rows.tolist()):
        count, teachers = int(batch["counts"][i]), cfg.view.globals
        shown = [
            _shown(v, views[v], places[v], images[v], i, count, cfg) for v in range(len(views))
        ]
        shared = shared_nuclei(shown, teachers)
        anchor = int(places[0].anchor[i])
        pairs = [
            {"teacher": shown[t].name, "student": shown[s].name, "matched": int(both[i].sum())}
            for t, s, both in roi_nuclei.matched(views, teachers)
        ]
        empty = sum(not pair["matched"] for pair in pairs)
        each = [
            _numbers(view, params, i, both)
            for view, params, both in zip(shown, found["views"], shared, strict=True)
        ]
        picture = f"step{cfg.step}-roi{row:05d}.png"
        side = setting.stored
        roi_picture(
            batch["pixels"][i], batch["points"][i, :count], shown, teachers, cfg.out / picture,
            title=f"step {cfg.step}, row {row} of {cfg.batch}: {names[i]}, {side} px at "
            f"{setting.mpp:g} µm/px, {count} nuclei; {empty} of {len(pairs)} pairs of views share "
            "no nucleus",
            first=anchor,
        )  # fmt: skip
        rois.append(
            {
                "row": row, "roi": int(batch["samples"][i]), "place": names[i], "picture": picture,
                "nuclei": count, "anchor": anchor, "views": each, "pairs": pairs,
                "empty_pairs": empty / len(pairs) if pairs else None,
            }
        )  # fmt: skip
    all_pairs = [pair["matched"] for roi in rois for pair in roi["pairs"]]
    share = float(np.mean([m == 0 for m in all_pairs])) if all_pairs else None
    kinds = f"{cfg.view.globals} global and {cfg.view.locals} local views"
    line = f"{len(rois)} ROIs with {kinds}"
    if share is not None:
        mean = np.mean(all_pairs)
        line += f", {mean:.1f} nuclei shared by a pair of them, {share:.0%} of the pairs empty"
    facts = {"roi_px": setting.stored, "roi_mpp": setting.mpp, "empty_pairs": share, "rois": rois}
    return facts, line


def _shown(
    v: int,
    view: roi_views.View,
    place: roi_views.Geometry,
    images: np.ndarray,
    i: int,
    count: int,
    cfg: OfRois,
) -> ShownView:
    """View number v of ROI i."""
    globals_ = cfg.view.globals
    name = f"G{v + 1}" if v < globals_ else f"L{v - globals_ + 1}"
    x, y = place.corner[i].tolist()
    return ShownView(
        name=name,
        pixels=images[i],
        points=view.points[i, :count].numpy(),
        inside=view.inside[i, :count].numpy(),
        corner=(x, y),
        extent=float(place.extent[i]),
        mpp=float(place.mpp[i]),
    )


def _numbers(
    view: ShownView, params: dict[str, torch.Tensor], i: int, shared: np.ndarray
) -> dict[str, Any]:
    """What `views.json` says of a view."""
    size, turn = len(view.pixels), int(params["turn"][i])
    within = ((view.points >= 0) & (view.points < size)).all(1)
    return {
        "name": view.name,
        "size": size,
        "mpp": view.mpp,
        "corner": list(view.corner),
        "extent": view.extent,
        "turn": turn,
        "turned": TURNS[turn],
        "gray": bool(params["gray"][i]),
        "blur_sigma": float(params["sigma"][i]),
        "nuclei": int(within.sum()),
        "inside": int(view.inside.sum()),
        "matched": int(shared.sum()),
    }


def _draw_crops(
    cfg: OfCrops, setting: Setting, batch: dict[str, Any], rows: np.ndarray, names: list[str]
) -> tuple[dict[str, Any], str]:
    """One picture of all crops; what `views.json` and the line say."""
    views_of = _views_of(cfg, setting)
    found = _with_views(cfg, batch, rows, views_of.draw)
    with _autocast(cfg, found["pixels"].device):
        views = [_colours(made, setting) for made in views_of.make(found)]
    corners = [_corners(row["theta"], setting.stored) for row in found["views"]]
    crops, facts = [], []
    for i, row in enumerate(rows.tolist()):
        here = [c[i] for c in corners]
        crops.append(
            ShownCrop(f"{row}: {names[i]}", batch["pixels"][i], [v[i] for v in views], here)
        )
        facts.append(
            {
                "row": row,
                "nucleus": int(batch["samples"][i]),
                "place": names[i],
                "views": [
                    {
                        "corners": c.tolist(),
                        "gray": bool(params["gray"][i]),
                        "blur_sigma": float(params["sigma"][i]),
                        "erased": params["erase"][i].tolist(),
                    }
                    for c, params in zip(here, found["views"], strict=True)
                ],
            }
        )
    picture = f"step{cfg.step}-crops.png"
    window, side = setting.window, setting.stored
    crop_picture(
        crops, cfg.out / picture,
        title=f"step {cfg.step}: crops of {side} px at {setting.mpp:g} µm/px with the outlines of "
        f"their views of {window} px",
    )  # fmt: skip
    line = f"{len(crops)} crops of {side} px and their views of {window} px"
    head = {"stored_px": side, "window_px": window, "mpp": setting.mpp, "picture": picture}
    return {**head, "crops": facts}, line


def _views_of(cfg: OfCrops, setting: Setting) -> CropViews:
    """The views of the method, local ones and those of the surroundings among them."""
    if isinstance(cfg, DinoViews):
        return Dinov2Views(cfg.method, setting)
    return ContextViews(getattr(cfg.method, "context", ContextConfig()), setting)


def _with_views(
    cfg: OfRois | OfCrops, batch: dict[str, Any], rows: np.ndarray, draw: steps.Draw
) -> dict[str, Any]:
    """The rows of the batch as tensors, pixels on the device, with their rows of the views."""
    found: dict[str, Any] = {k: torch.from_numpy(v) for k, v in batch.items() if k != "samples"}
    found["pixels"] = found["pixels"].to(distributed.pick_device(cfg.device))
    at = torch.from_numpy(rows)
    views = steps.views_of(cfg, cfg.step, draw)
    found["views"] = [{k: v[at] for k, v in view.items()} for view in views]
    return found


def _autocast(cfg: Train, device: torch.device) -> torch.autocast:
    dtype = steps.precision(cfg)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _colours(images: torch.Tensor, setting: Setting) -> np.ndarray:
    """Normalised images float32 [b, 3, s, s] as colours again: uint8 [b, s, s, 3]."""
    images = images.cpu().float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (setting.mean, setting.std))
    levels = ((images * std + mean) * 255).round().clamp(0, 255)
    return levels.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()


def _corners(theta: torch.Tensor, stored: int) -> np.ndarray:
    """Where the corners of views lie in their crops, float32 [b, 4, 2] in px, outline order.

    The first is the view's top left, the second its top right.
    """
    square = torch.tensor([(-1.0, -1, 1), (1, -1, 1), (1, 1, 1), (-1, 1, 1)])
    return ((square @ theta.transpose(1, 2) + 1) * (stored / 2)).numpy()
