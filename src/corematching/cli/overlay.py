"""Draws the kept patches beside the sorted scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corematching.errors import InputError
from corematching.extras import require_plots

DIM = 0.3
SHOWN_SIDE = 896
KEPT_COLOUR, DROPPED_COLOUR, CHORD_COLOUR = "#1b7f5c", "#b8b8b8", "#d1495b"


@dataclass(frozen=True)
class Choice:
    """The choice for one sample.

    Attributes
    ----------
    keep : sequence of bool
        One per image token, in the order of the prompt.
    scores : sequence of float
        As long as ``keep``; NaN where a token was gone before it was scored.
    cut : float
        The lowest kept score.
    title : str
        The axis label of the scores.
    """

    keep: Sequence[bool]
    scores: Sequence[float]
    cut: float
    title: str = "score"


def draw_overlay(
    path: Path | str, images: Sequence[Image.Image], choice: Choice, square: bool = True
) -> bool:
    """Write a PNG: the images with dropped patches dimmed, and the sorted scores with the cut.

    Parameters
    ----------
    path : path
        Overwritten when it exists.
    images : sequence of Image
        The model's images, cropped to the area of the patches.
    choice : Choice
    square : bool
        Whether each image's tokens form one square grid, row by row. If not, or if their number
        says otherwise, only the curve is drawn.

    Returns
    -------
    bool
        Whether the images are in the picture.

    Raises
    ------
    InputError
        There is no image token, or the file cannot be written.
    """
    require_plots("--overlay")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not choice.keep:
        raise InputError("--overlay has nothing to draw: no image token was scored; give --image")
    side = grid_side(len(choice.keep), len(images)) if square else None
    shown = images if side else ()
    widths = [*(image.width / image.height for image in shown), 1.25]
    figure = Figure(figsize=(4.2 * sum(widths) + 0.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    if side:
        masks = np.asarray(choice.keep, dtype=bool).reshape(len(images), side, side)
        for axis, image, mask in zip(axes, images, masks, strict=False):
            draw_patches(axis, image, mask)
    draw_curve(axes[-1], choice)
    try:
        figure.savefig(path, format="png", dpi=140)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}): give --overlay another path"
        ) from error
    return bool(side)


def grid_side(tokens: int, images: int) -> int | None:
    """Patches per side when ``tokens`` are ``images`` square grids, else None."""
    if not images or tokens % images:
        return None
    side = isqrt(tokens // images)
    return side if side * side * images == tokens else None


def shown_area(image: Image.Image, image_processor: Any) -> Image.Image:
    """The area of the patches in an image: its middle square after a centre crop."""
    if not getattr(image_processor, "do_center_crop", False):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def dim_dropped(image: Image.Image, mask: np.ndarray) -> np.ndarray:
    """The image with the patches outside ``mask`` faded and greyed.

    Parameters
    ----------
    image : Image
    mask : ndarray
        (rows, columns) bool, True where the patch is kept.

    Returns
    -------
    ndarray
        (height, width, 3) uint8.
    """
    scale = max(1.0, SHOWN_SIDE / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    rows = np.arange(size[1]) * mask.shape[0] // size[1]
    columns = np.arange(size[0]) * mask.shape[1] // size[0]
    kept = mask[rows[:, None], columns[None, :], None]  # (height, width, 1)
    grey = pixels.mean(axis=2, keepdims=True)
    faded = 255 * (1 - DIM) + DIM * (0.5 * grey + 0.5 * pixels)
    return np.where(kept, pixels, faded).round().clip(0, 255).astype(np.uint8)


def draw_patches(axis: Any, image: Image.Image, mask: np.ndarray) -> None:
    """Show an image with its dropped patches dimmed and its kept ones outlined."""
    height, width = mask.shape
    axis.imshow(dim_dropped(image, mask), extent=(0, width, height, 0), aspect="auto")
    for (x0, y0), (x1, y1) in outline(mask):
        axis.plot((x0, x1), (y0, y1), color=KEPT_COLOUR, linewidth=1.1, solid_capstyle="round")
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axis.set_title(f"{int(mask.sum())} of {mask.size} patches kept", fontsize=10)


def outline(mask: np.ndarray) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The edges between kept and dropped patches, as pairs of (x, y) corners."""
    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    horizontal = [((int(x), int(y)), (int(x) + 1, int(y))) for y, x in across]
    vertical = [((int(x), int(y)), (int(x), int(y) + 1)) for y, x in down]
    return horizontal + vertical


def draw_curve(axis: Any, choice: Choice) -> None:
    """Show the sorted scores, their chord, and the cut."""
    scores = np.asarray(choice.scores, dtype=float)
    keep = np.asarray(choice.keep, dtype=bool)
    present = np.isfinite(scores)
    order = np.argsort(-scores[present], kind="stable")
    curve, kept = scores[present][order], keep[present][order]
    ranks = np.arange(1, len(curve) + 1)
    axis.bar(ranks[kept], curve[kept], width=1.0, color=KEPT_COLOUR, label="kept")
    axis.bar(ranks[~kept], curve[~kept], width=1.0, color=DROPPED_COLOUR, label="dropped")
    if len(curve) > 1:
        ends = (ranks[0], ranks[-1]), (curve[0], curve[-1])
        axis.plot(*ends, color=CHORD_COLOUR, linewidth=1.2, label="chord")
    if np.isfinite(choice.cut):
        axis.axhline(choice.cut, color="black", linewidth=0.8, linestyle=":", label="cut")
    axis.axvline(kept.sum() + 0.5, color="black", linewidth=0.8, linestyle="--")
    if len(curve):
        low, high = float(curve.min()), float(curve.max())
        margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        axis.set_ylim(0.0 if low >= 0 and low < 0.5 * high else low - margin, high + margin)
        axis.set_xlim(0.5, len(curve) + 0.5)
    axis.set_xlabel("image tokens, highest score first")
    axis.set_ylabel(choice.title)
    axis.set_title(f"{int(kept.sum())} of {len(curve)} tokens kept", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
