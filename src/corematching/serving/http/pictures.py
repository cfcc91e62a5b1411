"""The pictures of a request, from data URIs, allowed hosts and an allowed directory."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from corematching.errors import InputError
from corematching.media import decode_picture, download_async, read_file
from corematching.serving.http.errors import ApiError
from corematching.serving.http.settings import Settings


class PictureReader:
    """Reads the pictures of one request; decodes them later, when the engine prepares its prompt.

    Parameters
    ----------
    settings : Settings
        What is allowed, and the limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._pictures, self._pixels = 0, 0

    async def read(self, url: str, field: str) -> Callable[[], Image.Image]:
        """What decodes a picture.

        Parameters
        ----------
        url : str
            ``data:image/...;base64,...``, or ``http(s)://`` or ``file://`` where that is allowed.
        field : str
            The field that holds the address, for messages.

        Raises
        ------
        ApiError
            400 for an address that is not allowed or one too many, 422 for a picture that cannot
            be had; 422 also from what is returned.
        """
        self._pictures += 1
        if self._pictures > self.settings.most_pictures:
            most = self.settings.most_pictures
            raise ApiError(400, f"{field}: at most {most} pictures", field, "too_many_images")
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            data = _decode_base64(url, self.settings, field)
        elif scheme in ("http", "https"):
            data = await _fetch(url, self.settings, field)
        elif scheme == "file":
            path = _find_file(url, self.settings, field)
            data = await asyncio.to_thread(_read_file, path, self.settings, field)
        else:
            text = f"{field}: give a data URI, such as data:image/png;base64,..."
            raise ApiError(400, text, field, "invalid_value")
        return partial(self._decode, data, field)

    def _decode(self, data: bytes, field: str) -> Image.Image:
        limits, most = self.settings.limits, self.settings.most_pixels
        left = max(min(limits.pixels, most - self._pixels), 1)
        try:
            picture = decode_picture(data, field, replace(limits, pixels=left))
        except InputError as error:
            raise _unreadable(str(error), field) from error
        self._pixels += picture.width * picture.height
        return picture


def _unreadable(text: str, field: str) -> ApiError:
    return ApiError(422, text, field, "unreadable_image")


def _decode_base64(url: str, settings: Settings, field: str) -> bytes:
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
        text = f"{field}: this server fetches no pictures: send a data URI"
        raise ApiError(400, text, field, "not_allowed")
    try:
        return await download_async(url, settings.limits, hosts=settings.media_hosts)
    except InputError as error:
        raise _unreadable(str(error), field) from error


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


def _read_file(path: Path, settings: Settings, field: str) -> bytes:
    try:
        return read_file(path, settings.limits)
    except InputError as error:
        raise _unreadable(f"{field}: the file cannot be read, or is too large", field) from error
