"""Pictures from files and URLs."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from corematching.errors import InputError

TIMEOUT_SECONDS = 30
MAX_BYTES = 64 << 20


def read_images(places: Sequence[str]) -> list[Image.Image]:
    """Read pictures as upright RGB.

    Raises
    ------
    InputError
        A picture is missing, cannot be fetched, or is none.
    """
    return [read_image(place) for place in places]


def read_image(place: str) -> Image.Image:
    """Read one picture from a path or an http(s) URL."""
    is_url = place.lower().startswith(("http://", "https://"))
    data = fetch(place) if is_url else read_bytes(Path(place).expanduser())
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{place} is no picture that can be read: give a whole PNG, JPEG, WebP, GIF or BMP file"
        ) from error


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"no picture at {path}: check the path") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give a picture file") from error


def fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "corematching"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"cannot fetch {url} ({reason}): check the address and the network, or give a file"
        ) from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{url} is larger than {MAX_BYTES >> 20} MiB: give a smaller picture")
    return data
