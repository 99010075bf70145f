"""Images side by side on one canvas, pixel for pixel."""

import numpy as np
from numpy.typing import ArrayLike

from dec_diffusion.types import InputError

PAD = 2
"""White pixels between neighbouring tiles of a row."""
ROW_PAD = 6
"""White pixels between rows."""
GAP = 22
"""White pixels between the two blocks of a grid."""

_TILE = 64  # side that small images are enlarged to, in pixels
_LARGEST_TILE = 96
_LARGEST_SIDE = 4800  # of a whole grid, in pixels


def tile_origin(
    row: int, column: int, h: int, w: int, *, gap_after: int | None = None
) -> tuple[int, int]:
    """Top and left pixel of a tile of `compose_grid`; ``h``, ``w`` are the tile's size there."""
    shift = GAP if gap_after is not None and column >= gap_after else 0
    return row * (h + ROW_PAD), column * (w + PAD) + shift


def compose_grid(
    images: ArrayLike,
    present: ArrayLike | None = None,
    *,
    scale: int = 1,
    gap_after: int | None = None,
) -> np.ndarray:
    """Place images on a white canvas.

    Args:
        images: [r, m, h, w, c], values in [0, 1] or uint8.
        present: bool [r, m]; tiles marked False stay white. All are drawn by default.
        scale: each pixel becomes a square of this side (nearest neighbour).
        gap_after: a wider gap precedes this column.

    Returns:
        uint8 [H, W, 3]. The tile of row i and column j lies at
        ``tile_origin(i, j, scale * h, scale * w, gap_after=gap_after)``.

    Raises:
        InputError: not five axes, or an axis is empty.
    """
    tiles = np.asarray(images)
    if tiles.ndim != 5 or 0 in tiles.shape:
        raise InputError(f"images have shape {tiles.shape}: expected [rows, columns, h, w, c]")
    r, m, h, w, _ = tiles.shape
    shown = np.ones((r, m), bool) if present is None else np.asarray(present, bool)
    h, w = h * scale, w * scale
    top, left = tile_origin(r - 1, m - 1, h, w, gap_after=gap_after)
    canvas = np.full((top + h, left + w, 3), 255, np.uint8)
    for i, j in np.argwhere(shown):
        top, left = tile_origin(i, j, h, w, gap_after=gap_after)
        tile = _rgb(tiles[i, j]).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + h, left : left + w] = tile
    return canvas


def fit_tiles(images: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Shrink large images by averaging; for small ones return the factor to enlarge by."""
    side = max(images.shape[2:4])
    limit = int(np.clip(_LARGEST_SIDE // max(rows, columns) - ROW_PAD, 12, _LARGEST_TILE))
    if side <= limit:
        return images, max(1, min(_TILE, limit) // side)
    factor = -(-side // limit)
    r, m, h, w, c = images.shape
    small = np.zeros((r, m, -(-h // factor), -(-w // factor), c), np.float32)
    # Row by row: the whole grid as floats could be gigabytes.
    for i in range(r):
        padding = ((0, 0), (0, -h % factor), (0, -w % factor), (0, 0))
        padded = np.pad(_unit(images[i]), padding, mode="edge")
        blocks = padded.reshape(m, small.shape[2], factor, small.shape[3], factor, c)
        small[i] = blocks.mean(axis=(2, 4))
    return small, 1


def _unit(images: np.ndarray) -> np.ndarray:
    """Float images; uint8 means 0..255."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    return images.astype(np.float32)


def _rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] of one image [h, w, c]."""
    values = _unit(image)
    if values.shape[-1] < 3:
        values = values.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    values = values[..., :3]
    broken = ~np.isfinite(values).all(axis=-1)
    pixels = np.round(np.clip(np.where(np.isfinite(values), values, 0), 0, 1) * 255)
    pixels[broken] = (255, 0, 255)
    return pixels.astype(np.uint8)
