"""Limits on pictures."""

from __future__ import annotations

from dataclasses import dataclass

from corematching.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits on one picture.

    Attributes
    ----------
    bytes : int
        Of a file, or of a response after decompression.
    pixels : int
        Width times height; decoding takes up to about 13 bytes for each.
    seconds : float
        For a download as a whole: name lookup, redirects, headers and body.
    redirects : int
        Followed by a download.
    """

    bytes: int = 64 << 20
    pixels: int = 64_000_000
    seconds: float = 60.0
    redirects: int = 5

    def __post_init__(self) -> None:
        for name in ("bytes", "pixels", "seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give a limit above 0")
        if self.redirects < 0:
            raise ConfigError(f"redirects={self.redirects}: give a limit of at least 0")
