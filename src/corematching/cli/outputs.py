"""Paths of results, checked before any work is done."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from corematching.errors import InputError


def check_file(path: Path, option: str) -> None:
    """Check that a file can be written.

    Raises
    ------
    InputError
        Its folder does not exist, or it is a directory, a device or read-only.
    """
    try:
        if not path.parent.is_dir():
            raise InputError(f"no directory {path.parent} for {option}: create it first")
        if path.is_dir():
            raise InputError(f"{path} is a directory: give {option} a file")
        with contextlib.suppress(FileNotFoundError):
            path.stat()
        place = path if path.exists() else path.parent
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no regular file: give {option} another path")
    except (OSError, ValueError) as error:  # a name that is too long, a NUL
        raise InputError(f"{option} is no path ({error}): give another one") from error
    require_right(place, option)


def make_folder(path: Path, option: str) -> None:
    """Create a folder for results, or check an existing one.

    Raises
    ------
    InputError
        It cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write to {path} ({reason}): give another folder with {option}"
        ) from error
    require_right(path, option)


def require_right(place: Path, option: str) -> None:
    """Check the right to write: mode, owner and file system."""
    rights = os.W_OK | (os.X_OK if place.is_dir() else 0)
    if not os.access(place, rights):
        raise InputError(f"{place} is read-only: give {option} another path")
