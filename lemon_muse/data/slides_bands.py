"""Crops of many nuclei of a slide, every native tile decoded once, and resampling by parts.

A part of a resampled image is made from the pixels that it needs alone, at the sampling positions
that it has in the whole: it equals the same part of `geometry.resample` of the whole level, up to
one grey level of rounding. So bands need no seams and large slides no large memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from lemon_muse.data.slides_tiles import Tiles

CUBIC = -0.5  # of the bicubic kernel with antialiasing, as in torch and Pillow
PIECE = 4096  # resampled crops handed out at once, at most
COPIED = 256  # the same of copied crops: few enough for the allocator to use their memory again
CHUNK = 512  # side of a part that is resampled as a whole where windows crowd, px of the grid
CROWD = 2  # such a part has less than this many times the pixels of its windows (measured)
BATCH = 128  # windows that are resampled at once: their patches fit into a core's cache


@dataclass(frozen=True)
class Grid:
    """The raster of a resampled level: `width` x `height` px, `step` (x, y) level px per px."""

    width: int
    height: int
    step: tuple[float, float]

    @property
    def is_native(self) -> bool:
        return self.step == (1.0, 1.0)


def level_grid(size: tuple[int, int], *, level_mpp: float, mpp: float) -> Grid:
    """The raster that `geometry.resample` gives a level of `size` (width, height) px."""
    from lemon_muse.data import geometry

    scale = level_mpp / mpp
    if abs(scale - 1) <= geometry.MPP_TOLERANCE:
        return Grid(size[0], size[1], (1.0, 1.0))
    width, height = (max(1, round(side * scale)) for side in size)
    return Grid(width, height, (size[0] / width, size[1] / height))


def taps(positions: np.ndarray, step: float, length: int) -> tuple[int, int, sparse.csr_matrix]:
    """Weights of the antialiased bicubic filter along one axis.

    Args:
        positions: float64 [n], where the samples lie, px of the source, each in [0, length].
        step: source px per sample; above 1 the kernel widens with it.
        length: of the source; the kernel is cut at its ends and normalised, as in torch.

    Returns:
        The source range [low, high) that is needed and the weights [n, high - low].
    """
    low, weights = _kernel(positions, step, length)
    first, last = int(low.min()), min(int(low.max()) + weights.shape[-1], length)
    return first, last, _matrix(low - first, weights, last - first)


def _kernel(positions: np.ndarray, step: float, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First source pixel int64 [...] and weights float32 [..., K] of samples at `positions`."""
    wide = max(step, 1.0)
    low = np.maximum((positions - 2 * wide + 0.5).astype(np.int64), 0)
    high = np.minimum((positions + 2 * wide + 0.5).astype(np.int64), length)
    columns = low[..., None] + np.arange((high - low).max())
    t = np.abs((columns + 0.5 - positions[..., None]) / wide)
    near = ((CUBIC + 2) * t - (CUBIC + 3)) * t * t + 1
    far = ((t - 5) * t + 8) * CUBIC * t - 4 * CUBIC
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0)) * (columns < high[..., None])
    weights /= weights.sum(-1, keepdims=True)
    return low, weights.astype(np.float32)


def _matrix(low: np.ndarray, weights: np.ndarray, width: int) -> sparse.csr_matrix:
    """Rows of weights [n, K] that begin at columns `low` [n], as a matrix [n, width]."""
    columns = np.minimum(low[:, None] + np.arange(weights.shape[1]), width - 1)
    ends = np.arange(len(low) + 1) * weights.shape[1]
    return sparse.csr_matrix((weights.ravel(), columns.ravel(), ends), shape=(len(low), width))


def weigh(pixels: np.ndarray, across: sparse.csr_matrix, down: sparse.csr_matrix) -> np.ndarray:
    """Apply `taps` of both axes: uint8 [H, W, 3] -> uint8 [h, w, 3]."""
    import torch

    height, width = pixels.shape[:2]
    # Both products run along contiguous rows; torch turns the axes several times faster than numpy.
    turned = torch.from_numpy(np.ascontiguousarray(pixels)).permute(1, 0, 2).contiguous().float()
    wide = across @ turned.reshape(width, height * 3).numpy()
    rows = torch.from_numpy(wide).reshape(-1, height, 3).permute(1, 0, 2).contiguous()
    out = torch.from_numpy(down @ rows.reshape(height, -1).numpy())
    return out.round_().clamp_(0, 255).to(torch.uint8).reshape(len(out), -1, 3).numpy()


def cut_bands(
    tiles: Tiles, level: int, grid: Grid, points: np.ndarray, *, size: int, band: int, edge: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows, crops) band by band; every tile that a window touches is decoded once.

    Args:
        tiles, level: where the pixels come from.
        grid: raster of the crops.
        points: float64 [n, 2], px of the grid, inside it.
        size: side of a crop, px of the grid.
        band: rows of the level that are held at once, about.
        edge: as in `geometry.crop`.
    """
    windows = _Windows(tiles, level, grid, points, size=size, edge=edge)
    if not len(windows.rows):
        return
    canvas = _Canvas(tiles, level, windows)
    deep = max(1, band // tiles.shape(level)[1])
    group = windows.tile_low[:, 1] // deep
    order = np.lexsort((windows.corner[:, 0], group))
    for here in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        canvas.load(here)
        origin = np.array([0, canvas.top * canvas.tile_height])
        # The last tile row may end beyond the level: its rows are no pixels of the image.
        pixels = canvas.pixels[: int(windows.level_size[1]) - int(origin[1])]
        chunks = [(here, True)] if grid.is_native else windows.chunks(here)
        for chunk, is_dense in chunks:
            each = COPIED if grid.is_native else PIECE
            for start in range(0, len(chunk), each):
                piece = chunk[start : start + each]
                if grid.is_native:
                    crops = windows.cut(piece, pixels, origin)
                elif is_dense:
                    crops = windows.cut(piece, *windows.area(piece, pixels, origin))
                else:
                    crops = windows.sample(piece, pixels, origin)
                yield windows.rows[piece], crops


class _Windows:
    """Where the windows of the nuclei lie: in the grid, in the level, on which tiles."""

    def __init__(
        self, tiles: Tiles, level: int, grid: Grid, points: np.ndarray, *, size: int, edge: str
    ) -> None:
        self.grid, self.size = grid, size
        self.full = np.array([grid.width, grid.height])
        self.level_size = np.array(tiles.facts.sizes[level])
        corner: np.ndarray = np.floor(points - size / 2 + 0.5).astype(np.int64)
        inside = ((corner >= 0) & (corner + size <= self.full)).all(1)
        self.rows = np.flatnonzero(inside) if edge == "drop" else np.arange(len(points))
        self.points, self.corner = points[self.rows], corner[self.rows]
        self.inside = np.asarray(inside)[self.rows]
        self.low = np.maximum(self.corner, 0)
        self.high = np.minimum(self.corner + size, self.full)
        low, high = self.low, self.high
        if not grid.is_native:
            step = np.array(grid.step)
            reach = 2 * np.maximum(step, 1)
            low = ((low + 0.5) * step - reach - 0.5).astype(np.int64).clip(0)
            high = np.ceil((high - 0.5) * step + reach + 0.5).astype(np.int64)
            high = np.minimum(high, self.level_size)
        shape = np.array(tiles.shape(level))
        self.tile_low, self.tile_high = low // shape, (high - 1) // shape

    def chunks(self, here: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """Parts of the grid where windows crowd, each with True, and all other windows."""
        place = self.low[here] // CHUNK
        order = np.lexsort((place[:, 0], place[:, 1]))
        changes = np.flatnonzero(np.diff(place[order], axis=0).any(1)) + 1
        dense: list[np.ndarray] = []
        lonely: list[np.ndarray] = []
        for chunk in np.split(here[order], changes):
            area = np.prod(self.high[chunk].max(0) - self.low[chunk].min(0))
            crowded = area < CROWD * len(chunk) * self.size**2
            (dense if crowded else lonely).append(chunk)
        found = [(chunk, True) for chunk in dense]
        return [*found, (np.concatenate(lonely), False)] if lonely else found

    def area(
        self, piece: np.ndarray, pixels: np.ndarray, origin: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Resampled pixels that hold all windows of `piece`, and the corner where they begin."""
        low, high = self.low[piece].min(0), self.high[piece].max(0)
        weights = []
        for axis in (0, 1):
            step, length = self.grid.step[axis], int(self.level_size[axis])
            positions = (np.arange(low[axis], high[axis]) + 0.5) * step
            weights.append(taps(positions, step, length))
        (x0, x1, across), (y0, y1, down) = weights
        above = int(origin[1])
        return weigh(pixels[y0 - above : y1 - above, x0:x1], across, down), low

    def cut(self, piece: np.ndarray, pixels: np.ndarray, origin: np.ndarray) -> np.ndarray:
        """Copied crops from `pixels`, the part of the grid that begins at `origin`."""
        from lemon_muse.data import geometry

        points, size = self.points[piece] - origin, self.size
        whole = self.inside[piece]
        if whole.all():
            return geometry.crop(pixels, points, size=size, edge="drop")[0]
        out = np.empty((len(piece), size, size, 3), np.uint8)
        out[whole] = geometry.crop(pixels, points[whole], size=size, edge="drop")[0]
        for i in np.flatnonzero(~whole):
            # What mirrors at the slide's border lies in the window itself: pad that, not the band.
            (x0, y0), (x1, y1) = self.low[piece[i]] - origin, self.high[piece[i]] - origin
            near = points[i] - (x0, y0)
            out[i] = geometry.crop(pixels[y0:y1, x0:x1], near[None], size=size)[0][0]
        return out

    def sample(self, piece: np.ndarray, pixels: np.ndarray, origin: np.ndarray) -> np.ndarray:
        """Resampled crops; only what they show is computed, at its place in the whole raster."""
        out = np.empty((len(piece), self.size, self.size, 3), np.uint8)
        for start in range(0, len(piece), BATCH):
            here = piece[start : start + BATCH]
            axes = []
            for axis in (0, 1):
                full, step = int(self.full[axis]), self.grid.step[axis]
                places = (self.corner[here, axis, None] + np.arange(self.size)) % (2 * full)
                mirrored = np.minimum(places, 2 * full - 1 - places)  # as `geometry.crop` does it
                low, weights = _kernel((mirrored + 0.5) * step, step, int(self.level_size[axis]))
                first = low.min(1)
                axes.append((first, low - first[:, None], weights))
            out[start : start + BATCH] = _resampled(pixels, origin, axes)
        return out


def _resampled(pixels: np.ndarray, origin: np.ndarray, axes: list[Any]) -> np.ndarray:
    """Windows [m, size, size, 3]; `axes`: first [m], low [m, size], weights [m, size, K], x and y.

    The weights of all windows make one block-diagonal matrix an axis.
    """
    import torch

    count, size = axes[0][1].shape
    sides = [int(low.max()) + weights.shape[-1] for _, low, weights in axes]
    patches = np.zeros((count, sides[1], sides[0], 3), np.uint8)
    corners = np.stack([axes[0][0], axes[1][0]], 1) - origin
    for patch, (x, y) in zip(patches, corners.tolist(), strict=True):
        part = pixels[y : y + sides[1], x : x + sides[0]]  # shorter at the end of the level
        patch[: part.shape[0], : part.shape[1]] = part
    block = np.arange(count)[:, None]
    across, down = (
        _matrix((low + block * side).ravel(), weights.reshape(count * size, -1), count * side)
        for (_, low, weights), side in zip(axes, sides, strict=True)
    )
    turned = torch.from_numpy(patches).permute(0, 2, 1, 3).contiguous().float()
    wide = across @ turned.reshape(count * sides[0], -1).numpy()
    rows = torch.from_numpy(wide).reshape(count, size, sides[1], 3).permute(0, 2, 1, 3).contiguous()
    out = torch.from_numpy(down @ rows.reshape(count * sides[1], -1).numpy())
    return out.round_().clamp_(0, 255).to(torch.uint8).reshape(count, size, size, 3).numpy()


class _Canvas:
    """Decoded rows of a level; those that the next band shares are moved, not decoded again."""

    def __init__(self, tiles: Tiles, level: int, windows: _Windows) -> None:
        self.tiles, self.level, self.windows = tiles, level, windows
        self.tile_width, self.tile_height = tiles.shape(level)
        self.columns = -(-int(windows.level_size[0]) // self.tile_width)
        self.top = self.bottom = 0  # tile rows that are held
        self.pixels = np.empty((0, int(windows.level_size[0]), 3), np.uint8)
        self.known = np.zeros((0, self.columns), bool)

    def load(self, here: np.ndarray) -> None:
        """Decode what the windows `here` touch and was not decoded before."""
        low, high = self.windows.tile_low[here], self.windows.tile_high[here]
        top, bottom = int(low[:, 1].min()), int(high[:, 1].max()) + 1
        self._move(top, bottom)
        wanted = np.zeros_like(self.known)
        span = (high - low).max(0)
        for down in range(int(span[1]) + 1):
            rows = np.minimum(low[:, 1] + down, high[:, 1]) - top
            for right in range(int(span[0]) + 1):
                wanted[rows, np.minimum(low[:, 0] + right, high[:, 0])] = True
        for row, column in np.argwhere(wanted & ~self.known).tolist():
            tile = self.tiles.decode(self.level, top + row, column)
            y, x = row * self.tile_height, column * self.tile_width
            self.pixels[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
        self.known |= wanted

    def _move(self, top: int, bottom: int) -> None:
        height = self.tile_height
        first, last = max(top, self.top), min(bottom, self.bottom)
        rows = (bottom - top) * height
        # Pages of an empty array that no tile touches cost nothing; sparse slides stay cheap.
        grown = self.pixels
        if len(self.pixels) < rows:
            grown = np.empty((rows, *self.pixels.shape[1:]), np.uint8)
        known = np.zeros((bottom - top, self.columns), bool)
        if first < last:
            known[first - top : last - top] = self.known[first - self.top : last - self.top]
            kept = self.pixels[(first - self.top) * height : (last - self.top) * height]
            if known.any():
                grown[(first - top) * height : (last - top) * height] = kept.copy()
        self.pixels, self.known, self.top, self.bottom = grown, known, top, bottom
