"""Read embedded nuclei from AnnData files: all of few, a share of every slide of many."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lemon_muse.errors import UserError

NEEDED = ("x_px", "y_px", "slide")
FEWEST = 20
# Rows of X that are read at once: picking single rows out of HDF5 is far slower.
_CHUNK = 65536


@dataclass(frozen=True)
class Embedded:
    """The nuclei of a page.

    Attributes:
        features: float32 [n, d], finite.
        ids: n unique names.
        obs: pandas DataFrame [n], columns as in the files; those of obsm and X that were asked for.
        slides: name -> {path, mpp, width, height}; empty where the file does not say.
        encoder: what the file says about its encoder; {} where nothing.
        total: nuclei in the files.
        folder: where the files lie.
    """

    features: np.ndarray
    ids: list[str]
    obs: Any
    slides: dict[str, dict[str, Any]]
    encoder: dict[str, Any]
    total: int
    folder: Path


def read(data: Path, *, nuclei: int, wanted: Sequence[str], seed: int) -> Embedded:
    """Read at most `nuclei` nuclei of a file or folder.

    Args:
        wanted: names of columns that obs, a table in obsm, or X must have; 'cluster' may be absent.

    Raises:
        UserError: see `eval.atlas.run`.
    """
    import pandas as pd

    files = [_open(path) for path in _paths(data)]
    total = sum(file.n_obs for file in files)
    if total < FEWEST:
        raise UserError(f"{data} holds {total} nuclei; an atlas needs {FEWEST} or more.")
    encoder = _same_encoder(files)
    slide = np.concatenate([file.obs["slide"].astype(str).to_numpy() for file in files])
    chosen = draw(slide, nuclei, seed=seed)
    features, frames, slides, start = [], [], {}, 0
    for file in files:
        here = chosen[(chosen >= start) & (chosen < start + file.n_obs)] - start
        start += file.n_obs
        features.append(_rows(file, here))
        frames.append(_columns(file, here, wanted))
        slides.update(_said(file).get("slides", {}))
        file.file.close()
    obs = pd.concat(frames)
    ids = obs.index.astype(str).tolist()
    if len(set(ids)) < len(ids):
        # Two files may number their nuclei alike; slide and id together name one.
        ids = [f"{s}/{i}" for s, i in zip(obs["slide"].astype(str), ids, strict=True)]
    if len(set(ids)) < len(ids):
        raise UserError(f"{data} holds nuclei twice (the same slide and id); leave one file out.")
    folder = data if data.is_dir() else data.parent
    return Embedded(np.concatenate(features), ids, obs, slides, encoder, total, folder)


def draw(slide: np.ndarray, most: int, *, seed: int) -> np.ndarray:
    """Sorted rows int64 [min(n, most)]: the same share of every slide, one of each at the least.

    Args:
        slide: str [n]. Where there are more slides than `most`, the largest are kept.
    """
    n = len(slide)
    if n <= most:
        return np.arange(n)
    rng = np.random.default_rng(seed)
    names, code, counts = np.unique(slide, return_inverse=True, return_counts=True)
    exact = counts * (most / n)
    quota = np.maximum(1, np.floor(exact)).astype(np.int64)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    quota[order[: max(0, most - int(quota.sum()))]] += 1
    while quota.sum() > most:  # the slides that got one although their share was less
        quota[np.argmax(quota) if quota.max() > 1 else int(np.flatnonzero(quota)[-1])] -= 1
    parts = [
        rng.choice(np.flatnonzero(code == i), quota[i], replace=False) for i in range(len(names))
    ]
    return np.sort(np.concatenate(parts))


def _paths(data: Path) -> list[Path]:
    if data.is_dir():
        found = sorted(data.glob("*.h5ad"))
        if not found:
            raise UserError(
                f"the folder {data} holds no .h5ad file; write one by lemon-muse embed."
            )
        return found
    if not data.is_file():
        raise UserError(f"there is no file {data}; write one by lemon-muse embed.")
    return [data]


def _open(path: Path) -> Any:
    try:
        import anndata
    except ImportError:
        raise UserError(
            "the atlas needs the extra 'embed': pip install lemon-muse[embed]"
        ) from None
    try:
        file = anndata.read_h5ad(path, backed="r")
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no readable .h5ad file ({why}); embed it again.") from None
    lacking = [name for name in NEEDED if name not in file.obs]
    if lacking or file.X is None:
        what = f"its obs lacks {', '.join(lacking)}" if lacking else "it has no X"
        raise UserError(f"{path} holds no embedded nuclei: {what}; write it by lemon-muse embed.")
    return file


def _said(file: Any) -> dict[str, Any]:
    said = file.uns.get("lemon_muse", {})
    return said if isinstance(said, dict) else {}


def _same_encoder(files: list[Any]) -> dict[str, Any]:
    """The encoder of the files; features of different ones cannot lie on one map."""
    first = dict(_said(files[0]).get("encoder", {}))
    for file in files[1:]:
        other = _said(file).get("encoder", {})
        keys = [k for k in ("content_hash", "name", "window", "mpp") if k in first and k in other]
        differs = [k for k in keys if str(first[k]) != str(other[k])]
        if file.n_vars != files[0].n_vars or differs:
            what = f"its {differs[0]} differs" if differs else f"{file.n_vars} columns"
            raise UserError(
                f"{file.filename} is of another encoder than {files[0].filename} ({what}); "
                f"give files of one encoder."
            )
    return first


def _rows(file: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of X as float32 [m, d], a bounded part of the file in memory at a time."""
    out = np.empty((len(rows), file.n_vars), np.float32)
    for start in range(0, file.n_obs, _CHUNK):
        low, high = np.searchsorted(rows, [start, start + _CHUNK])
        if low == high:
            continue
        part = file.X[start : min(start + _CHUNK, file.n_obs)]
        part = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
        out[low:high] = part[rows[low:high] - start]
    if not np.isfinite(out).all():
        raise UserError(f"{file.filename} holds features that are not finite; embed it again.")
    return out


def _columns(file: Any, rows: np.ndarray, wanted: Sequence[str]) -> Any:
    """obs of these rows, with what was asked for from obsm and X."""
    obs = file.obs.iloc[rows].copy()
    for name in wanted:
        if name in obs or name == "cluster":
            continue
        tables = {k: t for k, t in file.obsm.items() if hasattr(t, "columns") and name in t.columns}
        if tables:
            obs[name] = next(iter(tables.values()))[name].to_numpy()[rows]
        elif name in file.var_names:
            column = file.var_names.get_loc(name)
            values = file.X[:, column]
            values = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
            obs[name] = values.reshape(-1)[rows]
        else:
            known = [*map(str, file.obs.columns), "cluster"]
            known += [str(c) for t in file.obsm.values() for c in getattr(t, "columns", [])]
            raise UserError(_unknown(name, known, file.filename))
    return obs


def _unknown(name: str, known: list[str], path: Any) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known[:20])}."
    return f"colour={name}: {path} has no such column; {hint}"
