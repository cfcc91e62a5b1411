"""Checks of parameters; each raises a ConfigError that says what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from corematching.errors import ConfigError, unknown_name


def check_share(name: str, value: Any) -> None:
    """Refuse what is no share in (0, 1]."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r}: give a share in (0, 1], such as 0.2")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if not _is_int(value) or value < least:
        raise ConfigError(f"{name}={value!r}: give a whole number of at least {least}")


def check_amount(name: str, value: Any) -> None:
    """Refuse what is neither a share (a float in (0, 1]) nor a count (an int of 1 or more)."""
    if _is_int(value) and value >= 1:
        return
    if isinstance(value, float) and 0 < value <= 1:
        return
    raise ConfigError(
        f"{name}={value!r}: give a share as a float in (0, 1] or a count as an int of 1 or more"
    )


def check_depth(name: str, value: Any, least: int = 0) -> None:
    """Refuse what is neither an int from ``least`` on nor a share of the depth in [0, 1)."""
    if _is_int(value) and value >= least:
        return
    if isinstance(value, float) and 0 <= value < 1:
        return
    raise ConfigError(
        f"{name}={value!r}: give layers as an int of {least} or more, or as a share of the "
        "model's depth, a float in [0, 1)"
    )


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
    """Refuse what is no finite number of at least ``least``."""
    if not _is_number(value) or value < least:
        raise ConfigError(f"{name}={value!r}: give a finite number of at least {least:g}")


def check_bool(name: str, value: Any) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: give True or False")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse a word that is not one of ``known``, naming the nearest one."""
    known = list(known)
    if value not in known:
        raise unknown_name(f"value for {name}:", str(value), known)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
