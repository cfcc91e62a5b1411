"""Pictures from files and from the network, within limits on bytes, pixels and time."""

from corematching.media.download import download, download_async
from corematching.media.files import read_file
from corematching.media.limits import Limits
from corematching.media.pictures import (
    decode_picture,
    fetch_picture,
    open_picture,
    read_picture,
    to_rgb,
)

__all__ = [
    "Limits",
    "decode_picture",
    "download",
    "download_async",
    "fetch_picture",
    "open_picture",
    "read_file",
    "read_picture",
    "to_rgb",
]
