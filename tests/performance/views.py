"""Views per second and core: one image at a time with PIL or torchvision, and whole batches here.

Every candidate makes views of policy a1+gray (40 px from stored crops of 64 px) on one CPU thread,
and random numbers are drawn inside the time. Candidates take turns; the figure is the median over
the turns of process CPU time, and its ratio is to the loader of the MoCo v3 reference (PIL).
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as v1
from torchvision.transforms import v2

from lemon_muse.data import augment, geometry

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "brca-m2c"
MEAN, STD = (0.6, 0.4, 0.6), (0.2, 0.2, 0.2)
STORED, WINDOW, PATCH = 64, 40, 60  # pixels; the usual way rotates a patch of 60 px
BATCH = 1024
TURNS = 7


def real_crops(count: int) -> np.ndarray:
    """Crops uint8 [count, 64, 64, 3] at 0.25 µm per pixel around nuclei of BRCA-M2C (0.5)."""
    found, have = [], 0
    for path in sorted((DATA / "images").glob("*.png")):
        image = np.array(Image.open(path).convert("RGB"))
        image, scale = geometry.resample(image, source_mpp=0.5, mpp=0.25)
        lines = (DATA / "labels" / f"{path.stem}_gt_class_coords.txt").read_text().split("\n")
        points = np.array([line.split()[:2] for line in lines if line.strip()], np.float64)
        pixels, _ = geometry.crop(image, (points[:, ::-1] + 0.5) * scale, size=STORED, edge="drop")
        found.append(pixels[:64])
        have += len(found[-1])
        if have >= count:
            return np.concatenate(found)[:count]
    raise ValueError(f"{DATA} holds only {have} nuclei")


def noise_crops(count: int) -> np.ndarray:
    """Crops of smooth coloured noise, where the real ones are not there."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 16, 16, generator=rng) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=STORED, mode="bicubic").clamp(0, 255)
    return smooth.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()


class PilBlur:
    """Gaussian blur as the MoCo v3 reference does it: PIL, sigma drawn per image."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def pil_chain(config: augment.ViewConfig) -> Callable[[Image.Image], torch.Tensor]:
    """The usual loader: PIL images and torchvision v1 transforms, one after the other."""
    return v1.Compose(
        [
            v1.RandomRotation(180, v1.InterpolationMode.BILINEAR),
            v1.CenterCrop(WINDOW),
            v1.RandomResizedCrop(WINDOW, config.scale, config.ratio),
            v1.RandomHorizontalFlip(config.hflip),
            v1.RandomApply([v1.ColorJitter(*_strengths(config))], config.jitter),
            v1.RandomGrayscale(config.gray),
            PilBlur(*config.blur_sigma),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
            v1.RandomErasing(config.erase, config.erase_scale, config.erase_ratio),
        ]
    )


def v2_chain(config: augment.ViewConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """torchvision v2 on one uint8 tensor image at a time."""
    return v2.Compose(
        [
            v2.RandomRotation(180, v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(WINDOW),
            v2.RandomResizedCrop(WINDOW, config.scale, config.ratio, antialias=True),
            v2.RandomHorizontalFlip(config.hflip),
            v2.RandomApply([v2.ColorJitter(*_strengths(config))], config.jitter),
            v2.RandomGrayscale(config.gray),
            v2.GaussianBlur(2 * config.blur_radius + 1, config.blur_sigma),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(config.erase, config.erase_scale, config.erase_ratio),
        ]
    )


def batched(
    config: augment.ViewConfig, pixels: torch.Tensor, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """This package: parameters and views of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"window": WINDOW, "mean": MEAN, "std": STD, "dtype": dtype}

    def call() -> torch.Tensor:
        params = augment.draw(
            config, len(pixels), stored=STORED, window=WINDOW, generator=generator
        )
        return augment.apply(pixels, params, config, **settings)

    return call


def one_by_one(transform: Callable[[Any], torch.Tensor], images: list[Any]) -> Callable[[], Any]:
    """A call that makes a batch of views from images, one after the other."""
    return lambda: torch.stack([transform(image) for image in images])


def candidates(
    config: augment.ViewConfig, crops: np.ndarray
) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, views per call and the call; the first is what the others are compared with."""
    pixels = torch.from_numpy(crops)
    few = len(crops) // 4
    patches = geometry.centre_window(crops[:few], PATCH)
    images = [Image.fromarray(np.ascontiguousarray(patch)) for patch in patches]
    planes = [torch.from_numpy(np.array(image)).permute(2, 0, 1).clone() for image in images]
    yield "PIL + torchvision v1, per image", few, one_by_one(pil_chain(config), images)
    yield "torchvision v2, per image", few, one_by_one(v2_chain(config), planes)
    yield "batched, float32", len(crops), batched(config, pixels, torch.float32)
    yield "batched, bfloat16 blur", len(crops), batched(config, pixels, torch.bfloat16)


def measure(calls: list[tuple[str, int, Callable[[], Any]]]) -> dict[str, float]:
    """Views per second of process CPU time: medians over turns, the candidates taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in calls}
    for _, _, call in calls:
        call()
    for _ in range(TURNS):
        for name, views, call in calls:
            start = time.process_time()
            call()
            seconds[name].append((time.process_time() - start) / views)
    return {name: 1 / statistics.median(taken) for name, taken in seconds.items()}


def run() -> list[dict[str, Any]]:
    """One row per policy and candidate: name, what, peer, ours, unit, ratio, cores, device."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    real = (DATA / "images").is_dir()
    crops = real_crops(BATCH) if real else noise_crops(BATCH)
    rows = []
    for policy in ("a1+gray", "mild"):
        config = augment.ViewConfig.model_validate({"policy": policy})
        rates = measure(list(candidates(config, crops)))
        peer = next(iter(rates))
        what = f"{policy}, first view, {WINDOW} px from {'real' if real else 'noise'} crops"
        rows += [
            {
                "name": "views",
                "what": f"{what}: {name}",
                "peer": round(rates[peer]),
                "ours": round(rate),
                "unit": "views/s per core",
                "ratio": round(rate / rates[peer], 2),
                "cores": 1,
                "device": "cpu",
            }
            for name, rate in rates.items()
        ]
    return rows


def _strengths(config: augment.ViewConfig) -> tuple[float, float, float, float]:
    return config.brightness, config.contrast, config.saturation, config.hue


if __name__ == "__main__":
    for row in run():
        print(row)
