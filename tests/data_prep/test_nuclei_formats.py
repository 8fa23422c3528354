"""Detection files in the exact schema of each tool, written here by hand, with their traps."""

import gzip
import json
import uuid
from pathlib import Path
from typing import Any

import cramjam
import numpy as np
import pytest

from data_prep import nuclei_formats
from data_prep.nuclei_formats import Nuclei, SlideFacts
from lemon_muse.errors import UserError

SLIDE = SlideFacts(width=5000, height=3000, mpp=0.25, bounds=(1000.0, 200.0))
# Level-0 pixel indices relative to the bounds corner, as a tool would find them: x, y.
FOUND = [(310, 45), (1200, 1800), (77, 640)]
HALF = 0.5  # the middle of pixel 0


def square(x: float, y: float, side: float = 8) -> list[list[float]]:
    h = side / 2
    return [[x - h, y - h], [x + h, y - h], [x + h, y + h], [x - h, y + h]]


def closed(ring: list[list[float]]) -> list[list[float]]:
    return [*ring, ring[0]]


def dump(path: Path, tree: Any) -> Path:
    path.write_text(json.dumps(tree))
    return path


def load(path: Path, expected: str, slide: SlideFacts = SLIDE) -> Nuclei:
    assert nuclei_formats.detect(path) == expected
    return nuclei_formats.read(path, slide=slide)


def same_places(found: Nuclei, expected: list[tuple[float, float]]) -> None:
    np.testing.assert_allclose(np.stack([found.x, found.y], 1), expected, atol=1e-9)
    assert found.x.dtype == found.y.dtype == np.float64


def with_bounds(shift: float = HALF) -> list[tuple[float, float]]:
    return [(x + 1000 + shift, y + 200 + shift) for x, y in FOUND]


def hoverfast_feature(x: int, y: int, *, centroid: bool) -> dict[str, Any]:
    # The outline is not centred on the centroid, as after HoverFast's simplification.
    geometry: dict[str, Any] = {
        "type": "Polygon",
        "coordinates": [closed(square(x, y) if not centroid else square(x + 1, y))],
    }
    if centroid:
        geometry["centroid"] = [x, y]
    kind = {"name": "Nuclei", "colorRGB": -65536}
    properties = {"object_type": "cell", "classification": kind, "isLocked": False}
    return {"geometry": geometry, "properties": properties, "type": "Feature"}


def write_hoverfast(path: Path) -> Path:
    lines = [json.dumps(hoverfast_feature(x, y, centroid=True)) for x, y in FOUND]
    with gzip.open(path, "wt", encoding="ascii") as file:
        file.write("[\n" + ",\n".join(lines) + "\n]")
    return path


def test_hoverfast_slide(tmp_path: Path) -> None:
    found = load(write_hoverfast(tmp_path / "s.json.gz"), "hoverfast")
    same_places(found, with_bounds())
    np.testing.assert_allclose(found.area, 64 * 0.25**2)
    assert found.type.tolist() == ["Nuclei"] * 3 and np.isnan(found.score).all()


def test_hoverfast_roi_and_no_nuclei(tmp_path: Path) -> None:
    roi = tmp_path / "roi.json.gz"
    with gzip.open(roi, "wt") as file:
        json.dump([hoverfast_feature(x, y, centroid=False) for x, y in FOUND], file)
    image = SlideFacts(2000, 2000, 0.5)
    same_places(load(roi, "hoverfast", image), [(x + HALF, y + HALF) for x, y in FOUND])
    with gzip.open(tmp_path / "none.json.gz", "wt"):
        pass
    assert len(load(tmp_path / "none.json.gz", "hoverfast")) == 0


def cellvit_tree(*, contours: bool, **changes: Any) -> dict[str, Any]:
    cells = []
    for i, (x, y) in enumerate(FOUND):
        # bbox is (row, column): taken for (x, y) the points would be transposed
        cell: dict[str, Any] = {"bbox": [[y - 4, x - 4], [y + 4, x + 4]], "centroid": [x, y]}
        cell |= {"type": 1 + i % 2}
        if contours:
            cell |= {
                "contour": square(x, y),
                "type_prob": 0.5 + i / 10,
                "patch_coordinates": [0, 0],
                "cell_status": 0,
                "offset_global": [0, 0],
                "edge_position": False,
            }
        cells.append(cell)
    return {
        "wsi_metadata": {"downsampling": 1, "patch_size": 1024},
        "type_map": {"0": "Background", "1": "Neoplastic", "2": "Inflammatory"},
        "cells": cells,
    } | changes


@pytest.mark.parametrize("packed", [False, True])
def test_cellvit_cells(tmp_path: Path, packed: bool) -> None:
    text = json.dumps(cellvit_tree(contours=True), indent=2).encode()
    path = tmp_path / ("cells.json.snappy" if packed else "cells.json")
    path.write_bytes(bytes(cramjam.snappy.compress_raw(text)) if packed else text)
    found = load(path, "cellvit")
    same_places(found, with_bounds())
    assert found.type.tolist() == ["Neoplastic", "Inflammatory", "Neoplastic"]
    np.testing.assert_allclose(found.score, [0.5, 0.6, 0.7], rtol=1e-6)
    np.testing.assert_allclose(found.area, 4.0)


def test_cellvit_detection_has_no_outlines(tmp_path: Path) -> None:
    tree = cellvit_tree(contours=False, processed_patches=[f"{i}_{i}" for i in range(2000)])
    found = load(dump(tmp_path / "cell_detection.json", tree), "cellvit")
    same_places(found, with_bounds())
    assert np.isnan(found.area).all() and np.isnan(found.score).all()


def test_first_cellvit_at_another_scale_is_refused(tmp_path: Path) -> None:
    wrong = cellvit_tree(contours=True, processed_patches=["0_0"])
    wrong["wsi_metadata"]["downsampling"] = 2
    with pytest.raises(UserError, match="two scales; run the detection again"):
        nuclei_formats.read(dump(tmp_path / "cells.json", wrong), slide=SLIDE)
    del wrong["processed_patches"]  # CellViT-Inference scales them itself
    same_places(load(dump(tmp_path / "cells.json", wrong), "cellvit"), with_bounds())


@pytest.mark.parametrize("outlines", [False, True])
def test_cellvit_geojson_has_one_feature_a_class(tmp_path: Path, outlines: bool) -> None:
    groups = {"Neoplastic": FOUND[:2], "Inflammatory": FOUND[2:]}
    features: list[dict[str, Any]] = []
    for name, points in groups.items():
        where: Any = [[closed(square(x, y))] for x, y in points] if outlines else points
        kind = "MultiPolygon" if outlines else "MultiPoint"
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.UUID(int=len(features))),
                "geometry": {"type": kind, "coordinates": where},
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": name, "color": [255, 0, 0]},
                },
            }
        )
    found = load(dump(tmp_path / "cells.geojson", features), "cellvit")
    same_places(found, with_bounds())
    assert found.type.tolist() == ["Neoplastic", "Neoplastic", "Inflammatory"]


def test_real_cellvit_geojson(shared_data: Path) -> None:
    path = shared_data / "wsi" / "JP2K-33003-2_cell_detection.geojson"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = load(path, "cellvit", SlideFacts(32671, 47076, 0.25))
    assert len(found) == 37927 and len(set(found.id.tolist())) == 37927
    names, counts = np.unique(found.type, return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {
        "Connective": 34329,
        "Inflammatory": 3562,
        "Neoplastic": 36,
    }
    assert (found.x[0], found.y[0]) == (20290.5, 9161.5)
    assert (found.x.min(), found.x.max()) == (458.5, 28406.5)
    assert (found.y.min(), found.y.max()) == (938.5, 45693.5)


@pytest.mark.parametrize(
    ("mpp", "stated", "mag", "factor"),
    [(0.25, None, 40, 1), (0.25, None, 20, 2), (0.5, None, 40, 0.5), (0.25, 40.0, None, 1)],
)
def test_hovernet(
    tmp_path: Path, mpp: float, stated: float | None, mag: int | None, factor: float
) -> None:
    nuc = {
        str(3 + 7 * i): {
            "bbox": [[y - 4, x - 4], [y + 4, x + 4]],
            "centroid": [x + 0.25, y + 0.75],
            "contour": square(x, y),
            "type_prob": 0.9 if i else None,
            "type": i if i else None,
        }
        for i, (x, y) in enumerate(FOUND)
    }
    path = dump(tmp_path / "s.json", {"mag": mag, "nuc": nuc})
    slide = SlideFacts(5000, 3000, mpp, (1000.0, 200.0), stated)
    found = load(path, "hovernet", slide)
    # absolute: the bounds do not enter
    same_places(found, [((x + 0.75) * factor, (y + 1.25) * factor) for x, y in FOUND])
    np.testing.assert_allclose(found.area, 64 * (factor * mpp) ** 2, rtol=1e-6)
    assert found.id.tolist() == [3, 10, 17] and found.type.tolist() == ["", "1", "2"]
    assert np.isnan(found.score[0]) and found.score[1] == np.float32(0.9)


def test_hovernet_needs_a_magnification(tmp_path: Path) -> None:
    path = dump(tmp_path / "s.json", {"mag": 40, "nuc": {}})
    with pytest.raises(UserError, match="column 'magnification'"):
        nuclei_formats.read(path, slide=SlideFacts(5000, 3000, 0.35))


def qupath_feature(x: float, y: float, i: int) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": str(uuid.UUID(int=i)),
        "geometry": {"type": "Polygon", "coordinates": [closed(square(x + 20, y + 20, 40))]},
        "nucleusGeometry": {"type": "Polygon", "coordinates": [closed(square(x, y))]},
        "properties": {
            "objectType": "cell",
            "classification": {"name": "Tumor", "color": [200, 0, 0]},
            "measurements": {"Detection probability": 0.75, "Area": 3.0},
        },
    }


@pytest.mark.parametrize("collection", [False, True])
def test_qupath_cells_and_regions(tmp_path: Path, collection: bool) -> None:
    region = {
        "type": "Feature",
        "id": "r",
        "geometry": {"type": "Polygon", "coordinates": [closed(square(900, 900, 1800))]},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
    }
    features = [region] + [qupath_feature(x, y, i) for i, (x, y) in enumerate(FOUND)]
    tree = {"type": "FeatureCollection", "features": features} if collection else features
    found = load(dump(tmp_path / "s.geojson", tree), "qupath")
    # continuous coordinates: no half pixel; the nucleus, not the cell; no region
    same_places(found, with_bounds(0))
    assert found.id.tolist() == [str(uuid.UUID(int=i)) for i in range(3)]
    assert (found.score == 0.75).all() and (found.area == 4.0).all()


def test_qupath_points_pieces_and_version_02(tmp_path: Path) -> None:
    pieces = {"type": "MultiPolygon", "coordinates": [[square(5, 5, 2)], [square(50, 60)]]}
    features = [
        {
            "type": "Feature",
            "id": "PathDetectionObject",
            "geometry": {"type": "Polygon", "coordinates": [closed(square(10, 20))]},
            "properties": {"isLocked": False, "measurements": [{"name": "Area", "value": 1}]},
        },
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [7.5, 9.25]},
            "properties": {"object_type": "detection"},
        },
        {"type": "Feature", "geometry": pieces, "properties": {"objectType": "detection"}},
    ]
    path = dump(tmp_path / "s.geojson", {"type": "FeatureCollection", "features": features})
    found = load(path, "qupath")
    same_places(found, [(1010, 220), (1007.5, 209.25), (1050, 260)])
    assert np.isnan(found.area).tolist() == [False, True, False]
    assert len(set(found.id.tolist())) == 3


def test_histoplus_tiles(tmp_path: Path) -> None:
    # 5000 x 3000 px: DeepZoom levels 0 to 13; level 12 is half size. Tile side 224.
    finest, side = 13, 224.0
    truth = [(310.0, 45.0), (1200.0, 1800.0), (4990.0, 2990.0)]
    for level in (finest, finest - 1):
        factor = 2 ** (finest - level)
        tiles = []
        for i, (x, y) in enumerate(truth):
            column, row = x // (side * factor), y // (side * factor)
            local = [x / factor - column * side, y / factor - row * side]
            # the last tile is stated as cut by the border of the slide
            wide = 100.0 if i == 2 else side
            mask = {
                "cell_id": 0,
                "cell_type": "Lymphocytes",
                "confidence": 0.5,
                "coordinates": square(local[0], local[1]),
                "centroid": local,
            }
            tile = {"level": float(level), "x": column, "y": row, "width": wide, "height": wide}
            tiles.append(tile | {"masks": [mask]})
        tree = {"model_name": "m", "inference_mpp": 0.25, "cell_masks": tiles}
        found = load(dump(tmp_path / "cell_masks.json", tree), "histoplus")
        same_places(found, [(x + HALF * factor, y + HALF * factor) for x, y in truth])
        np.testing.assert_allclose(found.area, 64 * (0.25 * factor) ** 2, rtol=1e-5)
        assert found.id.tolist() == [0, 1, 2]
