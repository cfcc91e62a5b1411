"""Bytes of a regular file, within a limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from corematching.errors import InputError
from corematching.media.download import check_bytes, shorten
from corematching.media.limits import Limits

NONBLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def read_file(source: str | Path, limits: Limits | None = None) -> bytes:
    """Read a file whole; a leading ``~`` stands for a home directory.

    Raises
    ------
    InputError
        It does not exist, is a directory, a device or a pipe, cannot be read, or is larger
        than the limit.
    """
    limits = limits or Limits()
    shown = shorten(str(source))
    try:
        path = Path(source).expanduser()
        _check_kind(shown, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | NONBLOCKING)  # a pipe put there now does not block
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            _check_kind(shown, status.st_mode)
            check_bytes(shown, status.st_size, limits)
            data = file.read(limits.bytes + 1)
    except FileNotFoundError as error:
        raise InputError(f"no picture at {shown}: check the path") from error
    except OSError as error:
        raise InputError(f"cannot read {shown} ({error.strerror}): give a picture file") from error
    except (ValueError, RuntimeError) as error:  # a NUL, an unknown user's home
        raise InputError(f"{shown} is no path ({error}): give a picture file") from error
    check_bytes(shown, len(data), limits)
    return data


def _check_kind(shown: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise InputError(f"{shown} is {kind}: give a picture file")
