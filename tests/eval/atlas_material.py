"""Embedded nuclei as `lemon-muse embed` writes them, made by anndata alone; pages read back."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from PIL import Image

from lemon_muse.synthetic import CLASSES, write_slide

MPP = 0.25


def write_tissue(folder: Path, *, slides: int = 2, side: int = 1024) -> list[dict[str, Any]]:
    """Generated slides with their nuclei: path, xy [n, 2] px, kinds [n], side."""
    made = []
    for number in range(slides):
        path = write_slide(
            folder / f"tissue{number}.tiff", side=side, seed=number, slide=number, scanner=number
        )
        found = json.loads(path.with_suffix(".geojson").read_text(encoding="utf-8"))["features"]
        xy = np.array([f["geometry"]["coordinates"] for f in found], float)
        kinds = np.array([CLASSES.index(f["properties"]["classification"]["name"]) for f in found])
        made.append({"path": path, "xy": xy, "kinds": kinds, "side": side})
    return made


def write_embedded(
    path: Path,
    tissue: list[dict[str, Any]],
    *,
    nuclei: int,
    dim: int = 24,
    seed: int = 0,
    window: int = 40,
    kinds_apart: float = 4.0,
) -> anndata.AnnData:
    """An .h5ad of `nuclei` nuclei, drawn with repetition from `tissue`, one blob for each kind."""
    rng = np.random.default_rng(seed)
    pool = [(s, i) for s, slide in enumerate(tissue) for i in range(len(slide["xy"]))]
    picked = [pool[i] for i in rng.choice(len(pool), nuclei, replace=nuclei > len(pool))]
    slide = np.array([s for s, _ in picked])
    xy = np.array([tissue[s]["xy"][i] for s, i in picked])
    kinds = np.array([tissue[s]["kinds"][i] for s, i in picked])
    centres = rng.normal(size=(len(CLASSES), dim)) * kinds_apart / np.sqrt(dim)
    features = centres[kinds] + rng.normal(size=(nuclei, dim)) / np.sqrt(dim)
    obs = pd.DataFrame(
        {
            "x_px": xy[:, 0],
            "y_px": xy[:, 1],
            "x_um": xy[:, 0] * MPP,
            "y_um": xy[:, 1] * MPP,
            "type": pd.Categorical([CLASSES[k] for k in kinds]),
            "score": rng.uniform(0.5, 1, nuclei).astype(np.float32),
            "patient": pd.Categorical([f"patient {s}" for s in slide]),
            "slide": pd.Categorical([f"tissue{s}" for s in slide]),
            "area": rng.gamma(9, 4, nuclei).astype(np.float32) + 10 * kinds,
        },
        index=[f"n{i:06d}" for i in range(nuclei)],
    )
    genes = pd.DataFrame(
        {"EPCAM": (kinds == 0) + rng.normal(size=nuclei) * 0.1, "CD3E": rng.normal(size=nuclei)},
        index=obs.index,
    )
    slides = {
        f"tissue{s}": {
            "path": str(t["path"]), "mpp": MPP, "width": t["side"], "height": t["side"]
        }
        for s, t in enumerate(tissue)
    }  # fmt: skip
    data = anndata.AnnData(
        X=features.astype(np.float32),
        obs=obs,
        obsm={"spatial": xy, "genes": genes},
        uns={
            "lemon_muse": {
                "slides": slides,
                "encoder": {"name": "vit_small_patch8", "window": window, "mpp": MPP},
            }
        },
    )
    data.write_h5ad(path)
    return data


def opened(path: Path) -> dict[str, Any]:
    """What a page holds, read back from its text and the scripts that it links."""
    text = path.read_text(encoding="utf-8")
    found: dict[str, Any] = {
        "text": text,
        "meta": json.loads(re.search(r"ATLAS\.meta = (.*);\n", text).group(1)),  # type: ignore[union-attr]
        "folder": path.parent,
    }
    for linked in re.findall(r'<script src="([^"]+)">', text):
        text += (path.parent / linked).read_text(encoding="utf-8")
    for name, value in re.findall(r'ATLAS\.put\("(\w+)",(.*)\);', text):
        found[name] = json.loads(value)
    kinds = {"xy": "<f4", "near": "<i4", "cosine": "<u2", "there": "u1"}
    for number, described in enumerate(found["meta"]["columns"]):
        kinds[f"column{number}"] = "<i4" if "labels" in described else "<f4"
    for name, kind in kinds.items():
        found[name] = np.frombuffer(base64.b64decode(found[name]), kind)
    found["xy"] = found["xy"].reshape(-1, 2)
    found["near"] = found["near"].reshape(found["meta"]["n"], -1)
    return found


def values(page: dict[str, Any], name: str) -> np.ndarray:
    """A column of the page as the words or numbers that it stands for."""
    at = [c["name"] for c in page["meta"]["columns"]].index(name)
    described, found = page["meta"]["columns"][at], page[f"column{at}"]
    return np.array(described["labels"])[found] if "labels" in described else found


def cell(page: dict[str, Any], row: int) -> np.ndarray:
    """The thumbnail of a row, uint8 [cell, cell, 3]."""
    across, size = page["meta"]["across"], page["meta"]["cell"]
    number = row // across**2
    if f"sheet{number}" not in page:
        address = page["meta"]["sheets"][number]
        if address.startswith("data:"):
            raw = base64.b64decode(address.split(",")[1])
        else:
            raw = (page["folder"] / address).read_bytes()
        page[f"sheet{number}"] = np.asarray(Image.open(io.BytesIO(raw)))
    sheet = page[f"sheet{number}"]
    y, x = divmod(row % across**2, across)
    return sheet[y * size : (y + 1) * size, x * size : (x + 1) * size]
