"""The pictures of a request, from data URIs, allowed hosts and an allowed directory."""

from __future__ import annotations

import asyncio
import base64
import binascii
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from corematching.errors import InputError
from corematching.media import decode_picture, download_async, open_picture
from corematching.serving.http.errors import ApiError
from corematching.serving.http.settings import Settings


async def load_picture(url: str, settings: Settings, field: str) -> Image.Image:
    """Read one picture.

    Parameters
    ----------
    url : str
        ``data:image/...;base64,...``, or ``http(s)://`` or ``file://`` where that is allowed.
    settings : Settings
        What is allowed, and the limits.
    field : str
        The field that holds the address, for messages.

    Raises
    ------
    ApiError
        400 for an address that is not allowed, 422 for a picture that cannot be read.
    """
    scheme = url.partition(":")[0].lower()
    try:
        if scheme == "data":
            data = _decode(url, settings, field)
            return await asyncio.to_thread(decode_picture, data, field, settings.limits)
        if scheme in ("http", "https"):
            data = await _fetch(url, settings, field)
            return await asyncio.to_thread(decode_picture, data, field, settings.limits)
        if scheme == "file":
            path = _find_file(url, settings, field)
            return await asyncio.to_thread(open_picture, path, settings.limits)
    except InputError as error:
        raise ApiError(422, str(error), field, "unreadable_image") from error
    raise ApiError(
        400, f"{field}: give a data URI, such as data:image/png;base64,...", field, "invalid_value"
    )


def _decode(url: str, settings: Settings, field: str) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, f"{field}: a data URI needs ;base64, in it", field, "invalid_value")
    if len(text) * 3 // 4 > settings.limits.bytes + 3:
        raise ApiError(413, f"{field}: the picture has too many bytes", field, "too_large")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{field}: this is no base64", field, "invalid_value") from error


async def _fetch(url: str, settings: Settings, field: str) -> bytes:
    if not settings.media_hosts:
        raise ApiError(
            400,
            f"{field}: this server fetches no pictures: send a data URI",
            field,
            "not_allowed",
        )
    return await download_async(url, settings.limits, hosts=settings.media_hosts)


def _find_file(url: str, settings: Settings, field: str) -> Path:
    """A path under the allowed directory, symbolic links resolved."""
    refused = ApiError(400, f"{field}: this server does not read that file", field, "not_allowed")
    root, parts = settings.local_media, urlsplit(url)
    if root is None or parts.netloc not in ("", "localhost"):
        raise refused
    try:
        path = Path(unquote(parts.path)).resolve()
        inside = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise refused from error
    if not inside:
        raise refused
    return path
