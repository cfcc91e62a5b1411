"""What a server allows."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from pathlib import Path

from corematching.errors import ConfigError, InputError
from corematching.media import Limits

LEAST_KEY = 8
PICTURE = Limits(bytes=20 << 20, pixels=36_000_000, seconds=20.0, redirects=3)


@dataclass(frozen=True)
class Settings:
    """Limits and permissions of a server.

    Parameters
    ----------
    api_keys : tuple of str
        Any of them opens ``/v1``; none: it is open.
    local_media : Path or None
        Local pictures are read under this directory only; None: not at all.
    media_hosts : frozenset of str
        Pictures are fetched from these hosts only, in lower case.
    limits : Limits
        On each picture.
    most_pictures, most_pixels : int
        In one request.
    most_bytes, most_held : int
        Of a request's body, and of all bodies at a time.
    body_seconds : float
        For a request's body to come.

    Raises
    ------
    ConfigError
        The directory is none.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    local_media: Path | None = None
    media_hosts: frozenset[str] = frozenset()
    limits: Limits = PICTURE
    most_pictures: int = 16
    most_pixels: int = 64_000_000
    most_bytes: int = 32 << 20
    most_held: int = 512 << 20
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.local_media is not None:
            if not self.local_media.is_dir():
                raise ConfigError(f"'{self.local_media}' is no directory: create it, or correct it")
            object.__setattr__(self, "local_media", self.local_media.resolve())
        hosts = frozenset(host.strip().lower() for host in self.media_hosts)
        wrong = sorted(host for host in hosts if not host or "/" in host or ":" in host)
        if wrong:
            raise ConfigError(f"'{wrong[0]}' is no host: give names such as images.example.org")
        object.__setattr__(self, "media_hosts", hosts)

    def accepts(self, key: str) -> bool:
        """Whether a key is one of ours; takes equally long for any key of that length."""
        given, found = key.encode(), False
        for known in self.api_keys:
            found |= hmac.compare_digest(given, known.encode())
        return found


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and those that begin with # are left out.

    Raises
    ------
    InputError
        The file cannot be read, or holds no key, or one that is too short.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the keys in {path}: give a text file") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys or min(map(len, keys)) < LEAST_KEY:
        raise InputError(f"{path} needs one key a line, each of {LEAST_KEY} characters or more")
    return tuple(keys)
