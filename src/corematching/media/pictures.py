"""Pictures as upright RGB with 8 bits, from any stored form."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from corematching.errors import InputError
from corematching.media.download import download, shorten
from corematching.media.files import read_file
from corematching.media.limits import Limits

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""The formats that are decoded; others may run programs (EPS) or fit any file (TGA)."""
FULL_RANGE = ("PNG", "PPM", "JPEG2000")
"""Formats whose integers of more than 8 bits reach Pillow as 0 to 65535."""
ROWS = 256
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def read_picture(
    source: str | Path, limits: Limits | None = None, public_only: bool = True
) -> Image.Image:
    """Read one picture from a path or an http(s) address.

    Parameters
    ----------
    source : str or Path
    limits : Limits, optional
        On bytes, pixels, and the time of a download.
    public_only : bool
        See `download`.

    Returns
    -------
    Image
        RGB, upright.

    Raises
    ------
    InputError
        It is missing, no picture, cannot be fetched or read, or a limit is reached.
    """
    scheme = SCHEME.match(source) if isinstance(source, str) else None
    if scheme is None:
        return open_picture(source, limits)
    if scheme[1].lower() not in ("http", "https"):
        raise InputError(f"{shorten(str(source))}: only http and https are fetched, or give a path")
    return fetch_picture(str(source), limits, public_only)


def open_picture(path: str | Path, limits: Limits | None = None) -> Image.Image:
    """Read one picture from a regular file; see `read_picture`."""
    return decode_picture(read_file(path, limits), shorten(str(path)), limits)


def fetch_picture(url: str, limits: Limits | None = None, public_only: bool = True) -> Image.Image:
    """Read one picture from an http(s) address; see `read_picture`."""
    return decode_picture(download(url, limits, public_only), shorten(url), limits)


def decode_picture(data: bytes, name: str, limits: Limits | None = None) -> Image.Image:
    """Decode a picture; of an animation, the first frame.

    Parameters
    ----------
    data : bytes
        A file's content.
    name : str
        Its name in messages.
    limits : Limits, optional
        On pixels.

    Returns
    -------
    Image
        RGB, upright as its metadata says.

    Raises
    ------
    InputError
        It is no picture, damaged, or has too many pixels.
    """
    limits = limits or Limits()
    Image.init()
    known = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        with Image.open(io.BytesIO(data), formats=known) as picture:
            _check_pixels(name, picture.width * picture.height, limits)
            return _to_rgb(ImageOps.exif_transpose(picture), picture.format)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\d+", str(error))
        _check_pixels(name, max(int(count[0]) if count else 0, limits.pixels + 1), limits)
        raise
    except MemoryError as error:
        raise InputError(f"no memory left to decode {name}: give a smaller picture") from error
    except Exception as error:  # decoders raise anything at all on damaged files
        raise InputError(
            f"{name} is no picture that can be read: give a whole PNG, JPEG, WebP, GIF, BMP or "
            "TIFF file"
        ) from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture as RGB; grey values of more than 8 bits are scaled, where Pillow would clip them.

    16-bit values are taken from 0 to 65535. Other integers and floats do not say what white is:
    those from 0 to 1 (floats) or 0 to 255 are taken as such, integers up to 65535 as 16-bit ones,
    and any others from their smallest to their largest.

    Raises
    ------
    InputError
        It has no finite value.
    """
    return _to_rgb(picture, picture.format)


def _to_rgb(picture: Image.Image, stored_as: str | None) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        full = ";16" in picture.mode or stored_as in FULL_RANGE
        low, high = (0.0, 65535.0) if full else _find_range(values)
        picture = Image.fromarray(_scale(values, low, high))
    return picture.convert("RGB")


def _find_range(values: NDArray[np.generic]) -> tuple[float, float]:
    """The values of black and of white."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise InputError("the picture holds no finite value: give another one")
    low, high = float(finite.min()), float(finite.max())
    whole = np.issubdtype(values.dtype, np.integer)
    for top in (255.0, 65535.0) if whole else (1.0, 255.0):
        if low >= 0 and high <= top:
            return 0.0, top
    return low, high


def _scale(values: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    """(height, width) values as 8 bits, NaN as black."""
    grey = np.empty(values.shape, np.uint8)
    step = 255.0 / (high - low) if high > low else 0.0
    for top in range(0, len(values), ROWS):  # float64 takes much memory
        part = (values[top : top + ROWS].astype(np.float64) - low) * step
        grey[top : top + ROWS] = np.nan_to_num(part, nan=0.0).round().clip(0, 255)
    return grey


def _check_pixels(name: str, count: int, limits: Limits) -> None:
    if count > limits.pixels:
        raise InputError(
            f"{name} has {count:,} pixels, the limit is {limits.pixels:,}: give a smaller picture"
        )
