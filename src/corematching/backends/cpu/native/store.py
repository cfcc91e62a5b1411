"""Where compiled kernels are kept, and which of them may be loaded.

A library's name ends in the checksum of its contents, so that one rename makes it appear whole, and
a damaged one is seen before it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import time
from pathlib import Path

from corematching.directories import cache_root

log = logging.getLogger(__name__)

BUILDING = "building-"
"""What names of directories begin with in which a compiler is at work."""
DAY = 24 * 3600
UNUSED_SECONDS, BROKEN_OFF_SECONDS = 30 * DAY, DAY
"""After so long without use a library is removed, and what a compiler has left behind."""


def cache_directory() -> Path:
    """The directory for libraries, in ``$CORE_MATCHING_CACHE`` or the user's cache directory."""
    return cache_root() / "native"


def open_directory(directory: Path) -> str | None:
    """Make a directory that only its owner writes to; why it cannot be used, None if it can."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        return f"{directory} cannot be made: {error.strerror}"
    if not is_own(directory):
        return f"{directory} belongs to somebody else, or everybody may write to it"
    return None if os.access(directory, os.W_OK | os.X_OK) else f"{directory} is read-only"


def is_own(path: Path) -> bool:
    """Whether a directory or file is this user's or root's, and no others may write to it.

    A group may write to a directory: whoever puts a file there owns it, and it is not loaded.
    """
    try:
        found = path.stat()
    except OSError:
        return False
    others = stat.S_IWOTH if stat.S_ISDIR(found.st_mode) else stat.S_IWOTH | stat.S_IWGRP
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & others


def find_stored(directory: Path, key: str) -> Path | None:
    """The library for a key that is as it was made; None if there is none that may be loaded."""
    if not is_own(directory):
        return None
    for path in sorted(directory.glob(f"kernels-{key}-*.so")):
        if path.is_symlink() or not path.is_file() or not is_own(path):
            log.warning("%s belongs to somebody else, or others may write to it: ignored", path)
        elif path.name != name_of(path, key):
            log.warning("%s is damaged: the kernels are compiled again", path)
        else:
            return path
    return None


def name_of(path: Path, key: str) -> str:
    """What a library of these contents is called."""
    try:
        contents = path.read_bytes()
    except OSError:
        return ""
    return f"kernels-{key}-{hashlib.sha256(contents).hexdigest()[:32]}.so"


def put(made: Path, directory: Path, key: str) -> Path:
    """Move a library to its place, in one step and so that it outlasts a crash."""
    made.chmod(0o500)
    path = directory / name_of(made, key)
    _sync(made)
    os.replace(made, path)
    with contextlib.suppress(OSError):  # some file systems cannot do it for directories
        _sync(directory)
    for other in directory.glob(f"kernels-{key}-*.so"):
        if other != path:
            _remove(other)
    return path


def note_use(path: Path) -> None:
    """Let `remove_unused` see that a library is in use."""
    try:
        if time.time() - path.stat().st_mtime > DAY:
            os.utime(path)
    except OSError as error:
        log.debug("the time of %s stays as it is: %s", path, error)


def remove_unused(directory: Path) -> None:
    """Remove libraries of earlier versions, and what compilers that were stopped have left."""
    for pattern, limit in (("kernels-*", UNUSED_SECONDS), (f"{BUILDING}*", BROKEN_OFF_SECONDS)):
        for path in directory.glob(pattern):
            try:
                old = time.time() - path.lstat().st_mtime > limit
            except OSError:
                continue
            if old:
                _remove(path)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.debug("%s stays: %s", path, error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
