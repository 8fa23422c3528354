"""Put the atlas together: read, map, cut, write; the page comes last."""

import base64
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval.atlas import Atlas, project
from eval.atlas.columns import Column, columns
from eval.atlas.page import Page, html, script
from eval.atlas.source import Embedded, read
from eval.atlas.thumbs import sheets
from lemon_muse.data.files import write_atomic
from lemon_muse.errors import UserError

log = logging.getLogger(__name__)

INLINE = 10_000  # nuclei up to which the page is one file
PAGE, DATA, SPRITES = "index.html", "data", "sprites"
NAMES = {"umap": "UMAP", "tsne": "t-SNE", "pca": "principal components"}


def build(cfg: Atlas) -> Path:
    """Write the atlas; see `eval.atlas.run`."""
    out = _folder(cfg.out)
    found = read(cfg.data, nuclei=cfg.nuclei, wanted=cfg.colour, seed=cfg.seed)
    n = len(found.ids)
    k = min(cfg.neighbours, n - 1)
    parts = project.components(found.features)
    graph = project.neighbours(found.features, min(max(k, project.UMAP_NEIGHBOURS), n - 1))
    xy = project.place(parts, graph, method=cfg.projection, seed=cfg.seed)
    notes = [_drawn(found, cfg.projection)]
    clusters = None
    if "cluster" not in found.obs:
        clusters, how = project.cluster(parts, graph, seed=cfg.seed)
        notes.append(f"{clusters.max() + 1} clusters by {how}.")
    order = project.along_curve(xy)
    pictures, there, cut, missing = sheets(found, order, side=cfg.side, moved=cfg.slides)
    place = np.empty(n, np.int32)
    place[order] = np.arange(n, dtype=np.int32)
    page = Page(
        title=cfg.title or f"Atlas of {n:,} nuclei",
        facts=_facts(found, cut.size * cut.mpp, int(n - there.sum())),
        notes=notes,
        missing=missing,
        ids=[found.ids[i] for i in order],
        xy=xy[order],
        columns=[
            Column(c.name, c.values[order], c.labels, c.shown, c.menu)
            for c in columns(found.obs, clusters, cfg.colour)
        ],
        near=place[graph[0][order][:, :k]],
        cosine=graph[1][order][:, :k],
        there=there,
        cell=cut.size,
        side_um=cut.size * cut.mpp,
    )
    for note in missing:
        log.warning(note)
    return _write(out, page, pictures)


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"out={out} is a file; give the name of a folder.") from None
    return out


def _drawn(found: Embedded, method: str) -> str:
    n = len(found.ids)
    what = f"Map by {NAMES[method]} of the unit-length features ({found.features.shape[1]} numbers)"
    if n == found.total:
        return f"{what}; all {n:,} nuclei of the data."
    return (
        f"{what}; {n:,} of {found.total:,} nuclei, drawn by chance, the same share of each slide."
    )


def _facts(found: Embedded, side: float, without: int) -> list[tuple[str, str]]:
    """Name and value of what stands below the title."""
    slides = found.obs["slide"].nunique()
    facts = [("nuclei", f"{len(found.ids):,}"), ("slides", f"{slides:,}")]
    patients = set(found.obs["patient"].dropna()) - {""} if "patient" in found.obs else set()
    if patients:
        facts.append(("patients", f"{len(patients):,}"))
    name = found.encoder.get("name") or found.encoder.get("path")
    if isinstance(name, str) and name:
        facts.append(("encoder", Path(name).name))
    lacking = f", {without:,} without" if without else ""
    return [*facts, ("thumbnails", f"{side:.3g} µm{lacking}")]


def _write(out: Path, page: Page, pictures: Iterator[bytes]) -> Path:
    """One file for few nuclei, else a page with data/ and sprites/; older files are removed."""
    n = len(page.ids)
    kept: set[Path] = set()
    blobs = page.blobs()
    if n <= INLINE:
        urls = [_uri(jpeg) for jpeg in pictures]
        scripts = [script(name, text) for name, text in blobs.items()]
        body = html(page, urls, inline=scripts, linked=[])
    else:
        (out / DATA).mkdir(exist_ok=True)
        (out / SPRITES).mkdir(exist_ok=True)
        urls, linked = [], []
        for number, jpeg in enumerate(pictures):
            urls.append(f"{SPRITES}/{number:03d}.jpg" if jpeg else "")
            if jpeg:
                write_atomic(out / urls[-1], jpeg)
                kept.add(out / urls[-1])
        for name, text in blobs.items():
            linked.append(f"{DATA}/{name}.js")
            write_atomic(out / linked[-1], script(name, text).encode())
            kept.add(out / linked[-1])
        body = html(page, urls, inline=[], linked=linked)
    write_atomic(out / PAGE, body.encode())
    _tidy(out, kept)
    return out / PAGE


def _uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else ""


def _tidy(out: Path, kept: set[Path]) -> None:
    """Remove what an older atlas had in this folder and this one has not."""
    for folder, pattern in ((DATA, "*.js"), (SPRITES, "[0-9][0-9][0-9].jpg")):
        for old in (out / folder).glob(pattern):
            if old not in kept:
                old.unlink()
        if (out / folder).is_dir() and not any((out / folder).iterdir()):
            (out / folder).rmdir()
