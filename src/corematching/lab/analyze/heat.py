"""Scores over the picture: a patch-wise heat map, and the outline of what is kept."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LONGEST_SIDE = 640
COLOURS = "viridis"

Grid = tuple[int, int]
"""(rows, columns) of patches."""


def encode_picture(picture: Image.Image) -> str:
    """A picture, made smaller where it is large, as a data URI."""
    shown = picture.convert("RGB")
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    shown.save(data, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def encode_heat(scores: NDArray[np.float64], grid: Grid) -> str:
    """Scores as one coloured pixel per patch, lowest to highest of this picture, as a data URI.

    Parameters
    ----------
    scores : ndarray
        (N,), row by row; what the grid has beyond them stays transparent.
    """
    from matplotlib import colormaps

    rows, columns = grid
    low, high = float(scores.min()), float(scores.max())
    ratios = (scores - low) / (high - low) if high > low else np.full_like(scores, 0.5)
    pixels = np.zeros((rows * columns, 4), dtype=np.uint8)
    pixels[: len(scores)] = colormaps[COLOURS](ratios, bytes=True)
    data = io.BytesIO()
    Image.fromarray(pixels.reshape(rows, columns, 4)).save(data, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def encode_bar() -> str:
    """The colour scale, lowest at the left, as a data URI."""
    return encode_heat(np.linspace(0, 1, 64), (1, 64))


def trace_outline(kept: NDArray[np.bool_], grid: Grid) -> str:
    """The border between kept and dropped patches, as an SVG path in units of patches."""
    padded = np.pad(_as_mask(kept, grid), 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # (y, x) of upper edges
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    return "".join(
        [f"M{x} {y}h1" for y, x in across.tolist()] + [f"M{x} {y}v1" for y, x in down.tolist()]
    )


def trace_dropped(kept: NDArray[np.bool_], grid: Grid) -> str:
    """The area of the dropped patches, as an SVG path in units of patches."""
    tokens = np.arange(grid[0] * grid[1]).reshape(grid) < len(kept)
    dropped = np.argwhere(tokens & ~_as_mask(kept, grid))
    return "".join(f"M{x} {y}h1v1h-1z" for y, x in dropped.tolist())


def _as_mask(kept: NDArray[np.bool_], grid: Grid) -> NDArray[np.bool_]:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[: len(kept)] = kept
    return mask.reshape(grid)


def lay_out(tokens: int, picture: Grid | None) -> Grid:
    """The picture's own grid, or rows of 32 tokens where it has none."""
    if picture is not None:
        return picture
    columns = min(32, tokens)
    return -(-tokens // columns), columns
