"""Amounts of memory as people write them: ``12GiB``, ``800MB``."""

from __future__ import annotations

import re

from corematching.errors import ConfigError

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def parse_size(name: str, value: str | int) -> int:
    """Bytes of a size such as ``12GiB`` (2**30 each), ``800MB`` (10**6 each), or an int of bytes.

    Parameters
    ----------
    name : str
        The parameter, for the message.
    value : str or int
        The size.

    Raises
    ------
    ConfigError
        It is no size, or not above zero.
    """
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str):
        found = PATTERN.fullmatch(value.strip())
        if found and found[2].upper() in UNITS and len(found[1]) < 30:
            size = int(float(found[1]) * UNITS[found[2].upper()])
    if size <= 0:
        raise ConfigError(
            f"{name}={value!r} is no size: give a number with its unit, such as '12GiB' or "
            "'800MB', or bytes as an int"
        )
    return size


def format_size(size: float) -> str:
    """Bytes with three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
