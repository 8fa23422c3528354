"""Generated tissue: a pure function, true to Beer-Lambert, with every nucleus where it says."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from skimage.color import separate_stains
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lemon_muse.errors import UserError
from lemon_muse.synthetic import CLASSES, Tissue, tissue
from lemon_muse.synthetic.cells import Cells
from lemon_muse.synthetic.draw import patch, plan
from lemon_muse.synthetic.noise import Noise, Window
from lemon_muse.synthetic.nuclei import Canvas, paint
from lemon_muse.synthetic.optics import beer_lambert, scanner, stain

SLIDES = range(6)


@pytest.fixture(scope="module")
def fields() -> list[Tissue]:
    """One field each of six slides on three scanners, with many mitoses."""
    return [
        tissue(k, side=640, slide=k, scanner=k % 3, mitotic_rate=0.08, jpeg=False) for k in SLIDES
    ]


def optical_density(image: np.ndarray) -> np.ndarray:
    return -np.log10((image.astype(np.float64) + 1) / 256)


def hematoxylin(field: Tissue, slide: int) -> np.ndarray:
    """Deconvolution by scikit-image with the slide's own stain vectors."""
    vectors = stain(slide).vectors
    third = np.cross(vectors[0], vectors[1])
    matrix = np.linalg.inv(np.stack([*vectors, third / np.linalg.norm(third)]))
    return separate_stains(field.image, matrix)[..., 0]


def test_a_pure_function_of_its_arguments() -> None:
    first = tissue(5, side=256, slide=2, scanner=1)
    tissue(6, side=128)  # what is drawn in between must not matter
    again = tissue(5, side=256, slide=2, scanner=1)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.xy, again.xy)
    assert np.array_equal(first.kinds, again.kinds)
    for other in ({"seed": 6}, {"slide": 3}, {"scanner": 2}):
        value = {"seed": 5, "slide": 2, "scanner": 1} | other
        drawn = tissue(value["seed"], side=256, slide=value["slide"], scanner=value["scanner"])
        assert not np.array_equal(first.image, drawn.image), other


def test_another_process_with_more_threads_draws_the_same() -> None:
    code = (
        "import hashlib; from lemon_muse.synthetic import tissue;"
        "print(hashlib.sha256(tissue(5, side=256).image.tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"OMP_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n},
            cwd=Path(__file__).resolve().parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in ("1", "2")
    }
    assert len(digests) == 1


def test_shapes_dtypes_and_ranges(fields: list[Tissue]) -> None:
    for field in fields:
        assert field.image.shape == (640, 640, 3) and field.image.dtype == np.uint8
        assert field.xy.dtype == np.float32 and field.xy.shape == (len(field.kinds), 2)
        assert field.kinds.dtype == np.int64
        assert field.xy.min() >= 0.5 and field.xy.max() <= 639.5
        per_mm2 = len(field.xy) / (640 * 0.25 / 1000) ** 2
        assert 2_000 < per_mm2 < 10_000
    present = np.unique(np.concatenate([f.kinds for f in fields]))
    assert present.tolist() == list(range(len(CLASSES)))


def test_patches_of_a_slide_meet_without_a_seam() -> None:
    world = plan(3, side=512, mpp=0.25, slide=3, scanner=0, mitotic_rate=0.02, glass=True)
    whole = patch(world, x=0, y=0, width=512, height=512).astype(int)
    parts = np.zeros_like(whole)
    for y, height in ((0, 200), (200, 312)):
        for x, width in ((0, 311), (311, 201)):
            drawn = patch(world, x=x, y=y, width=width, height=height)
            parts[y : y + height, x : x + width] = drawn
    difference = np.abs(whole - parts)
    # A pixel may fall to the other side of a rounding; along a seam it would be many grey levels.
    assert difference.max() <= 12 and (difference > 1).mean() < 1e-3


def test_the_same_tissue_at_another_resolution() -> None:
    fine = tissue(4, side=512, mpp=0.25, jpeg=False)
    coarse = tissue(4, side=256, mpp=0.5, jpeg=False)
    assert len(fine.xy) == pytest.approx(len(coarse.xy), abs=3)
    small = fine.image.reshape(256, 2, 256, 2, 3).mean((1, 3))
    correlation = np.corrcoef(small.ravel(), coarse.image.astype(float).ravel())[0, 1]
    assert correlation > 0.9


def test_noise_has_unit_variance_and_reads_the_same_in_both_ways() -> None:
    noise = Noise(1)
    window = Window(-20.0, 35.0, 0.5, 400, 300)
    grid = noise.grid("a", window, 1.7, octaves=2)
    assert grid.std() == pytest.approx(1, abs=0.1)
    y, x = np.mgrid[:300, :400]
    points = noise.points("a", -20 + (x + 0.5) * 0.5, 35 + (y + 0.5) * 0.5, 1.7, octaves=2)
    assert np.allclose(grid, points, atol=1e-4)
    assert abs(np.corrcoef(grid.ravel(), noise.grid("b", window, 1.7).ravel())[0, 1]) < 0.1


def test_beer_lambert_inverts() -> None:
    rng = np.random.default_rng(0)
    h, e = rng.uniform(0, 1, (2, 16, 16)).astype(np.float32)
    staining = stain(7)
    light = beer_lambert(h, e, staining)
    strength = np.array([staining.hematoxylin, staining.eosin])
    back = -np.log10(light.reshape(3, -1)).T @ np.linalg.pinv(staining.vectors) / strength
    assert np.allclose(back, np.stack([h.ravel(), e.ravel()], 1), atol=1e-4)


def test_stains_and_scanners_differ_and_stay_plausible() -> None:
    stains = [stain(k) for k in range(30)]
    assert all(np.allclose(np.linalg.norm(s.vectors, axis=1), 1) for s in stains)
    # Hematoxylin takes more red light than eosin does, on every slide.
    assert all(s.vectors[0, 0] > s.vectors[1, 0] + 0.15 for s in stains)
    assert np.std([s.hematoxylin for s in stains]) > 0.1
    assert len({scanner(k).quality for k in range(12)}) > 3


def test_hematoxylin_sits_at_the_nuclei(fields: list[Tissue]) -> None:
    for slide, field in zip(SLIDES, fields, strict=True):
        plane = ndimage.uniform_filter(hematoxylin(field, slide), 5)
        x, y = np.floor(field.xy).astype(int).T
        assert np.median(plane[y, x]) > 1.8 * np.median(plane)


def test_nuclei_sit_on_dark_pixels(fields: list[Tissue]) -> None:
    dark = total = 0
    for field in fields:
        density = ndimage.uniform_filter(optical_density(field.image).sum(2), 7)
        # The median of a 20 µm window around each nucleus, in a plain loop.
        for x, y in np.floor(field.xy).astype(int):
            window = density[max(0, y - 40) : y + 40, max(0, x - 40) : x + 40]
            dark += density[y, x] > np.median(window)
            total += 1
    assert dark / total > 0.9


def measured(kind: int) -> tuple[float, float]:
    """Median equivalent diameter (µm) and median eccentricity of nuclei drawn one by one.

    The nuclei are those of a real plan, each on its own empty canvas, so that neighbours do not
    touch; the outline is found again by Otsu's threshold on the hematoxylin plane.
    """
    rows: list[tuple[float, float]] = []
    for slide in range(4):
        world = plan(
            slide, side=640, mpp=0.25, slide=slide, scanner=0, mitotic_rate=0.1, glass=False
        )
        for i in np.flatnonzero(world.cells.kind == kind)[:25]:
            alone: Cells = replace(
                world.cells.take(np.array([i])), xy=np.full((1, 2), 16, np.float32)
            )
            planes = np.zeros((2, 128, 128), np.float32)
            paint(Canvas(Window(0, 0, 0.25, 128, 128), planes[0], planes[1]), alone)
            mask = ndimage.binary_fill_holes(planes[0] > threshold_otsu(planes[0]))
            region = max(regionprops(label(mask)), key=lambda r: r.area)
            rows.append((region.equivalent_diameter_area * 0.25, region.eccentricity))
    diameter, eccentricity = np.median(rows, axis=0)
    return float(diameter), float(eccentricity)


def test_sizes_and_shapes_of_the_kinds() -> None:
    size, eccentricity = zip(*[measured(k) for k in range(len(CLASSES))], strict=True)
    lymphocyte, plasma, tumour, fibroblast, mitosis = range(5)
    assert size[tumour] == max(size) and 8.5 < size[tumour] < 16
    assert 5.5 < size[lymphocyte] < 8 and size[lymphocyte] < size[plasma] + 0.5
    assert eccentricity[fibroblast] == max(eccentricity) and eccentricity[fibroblast] > 0.9
    assert eccentricity[lymphocyte] < 0.7 < eccentricity[mitosis]


def test_mitoses_follow_their_rate() -> None:
    def share(rate: float) -> float:
        kinds = tissue(2, side=1024, mitotic_rate=rate, jpeg=False).kinds
        dividing = (kinds == CLASSES.index("mitotic_figure")).sum()
        return float(dividing / (dividing + (kinds == CLASSES.index("tumour")).sum()))

    assert share(0.0) == 0
    assert 0.2 < share(0.3) < 0.45


def window_features(field: Tissue) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour (mean, std) and radial profile of normalised density per nucleus; and the kinds."""
    keep = ((field.xy > 20) & (field.xy < field.image.shape[0] - 20)).all(axis=1)
    row, col = np.indices((40, 40)) - 19.5
    ring = (np.hypot(row, col) // 2).astype(int)
    colours, shapes = [], []
    for x, y in np.floor(field.xy[keep]).astype(int):
        crop = field.image[y - 20 : y + 20, x - 20 : x + 20] / 255
        colours.append([*crop.mean((0, 1)), *crop.std((0, 1))])
        density = optical_density(crop * 255).sum(2)
        density = (density - density.mean()) / density.std()
        rings = [density[ring == k] for k in range(10)]
        shapes.append([f(r) for r in rings for f in (np.mean, np.std)])
    return np.array(colours), np.array(shapes), field.kinds[keep]


def test_colour_alone_does_not_give_the_kind_away(fields: list[Tissue]) -> None:
    colours, shapes, kinds = zip(*map(window_features, fields), strict=True)
    scores = []
    for features in (colours, shapes):
        probe = make_pipeline(
            StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=300)
        )
        probe.fit(np.concatenate(features[:4]), np.concatenate(kinds[:4]))
        guess = probe.predict(np.concatenate(features[4:]))
        scores.append(balanced_accuracy_score(np.concatenate(kinds[4:]), guess))
    assert scores[0] < 0.62
    assert scores[1] > scores[0] + 0.12


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"side": 8}, {"mpp": 0.0}, {"mpp": 9.0}, {"mitotic_rate": 2.0}]
)
def test_wrong_arguments_are_one_sentence(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"give|drawn within"):
        tissue(**({"seed": 0} | wrong))  # type: ignore[arg-type]
