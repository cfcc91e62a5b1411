"""Checks of parameters; each raises a ConfigError that says what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from corematching.errors import ConfigError, unknown_name


def check_ratio(name: str, value: Any) -> None:
    """Check for a ratio in (0, 1]; 1 means all."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r}: give a ratio in (0, 1], such as 0.2")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check for a whole number of at least ``least``."""
    if not _is_int(value) or value < least:
        raise ConfigError(f"{name}={value!r}: give a whole number of at least {least}")


def check_tokens_ratio(ratio_name: str, tokens_name: str, value: Any) -> float:
    """The ratio of the image tokens as a float; the error names the parameter for counts."""
    if _is_number(value) and 0 < value <= 1:
        return float(value)
    whole = int(value) if _is_number(value) and value > 1 and value == int(value) else None
    instead = f"; {tokens_name}={whole} is that number of tokens" if whole else ""
    raise ConfigError(f"{ratio_name}={value!r}: give a ratio in (0, 1], such as 0.2{instead}")


def check_tokens_count(ratio_name: str, tokens_name: str, value: Any) -> int:
    """The number of image tokens; the error names the parameter for ratios."""
    if _is_count(value):
        return int(value)
    is_ratio = isinstance(value, float) and 0 < value <= 1
    instead = f"; {ratio_name}={value!r} is that ratio of the tokens" if is_ratio else ""
    raise ConfigError(f"{tokens_name}={value!r}: give a whole number of at least 1{instead}")


def normalize_amount(
    owner: Any, default: Any = None, prefix: str = "keep", several: bool = False
) -> None:
    """Check the parameters ``keep_ratio`` and ``keep_tokens`` of a frozen dataclass.

    An int 1 as a ratio becomes 1.0; where neither is given, the ratio becomes the default. With
    ``several``, each may be a list, which becomes a tuple.

    Raises
    ------
    ConfigError
        Both are given, or one is out of range.
    """
    names = ratio_name, tokens_name = f"{prefix}_ratio", f"{prefix}_tokens"
    ratio, tokens = (getattr(owner, name) for name in names)
    if ratio is not None and tokens is not None:
        raise ConfigError(
            f"{ratio_name}={ratio!r} and {tokens_name}={tokens!r} exclude each other: give one"
        )
    if ratio is None and tokens is None:
        ratio = default
    for name, value, check in zip(
        names, (ratio, tokens), (check_tokens_ratio, check_tokens_count), strict=True
    ):
        if several and isinstance(value, list | tuple):
            value = tuple(check(*names, item) for item in value)
        elif value is not None:
            value = check(*names, value)
        object.__setattr__(owner, name, value)


def check_depth(name: str, value: Any, least: int = 0) -> None:
    """Check for an int of at least ``least``, or a ratio of the depth in [0, 1)."""
    if _is_int(value) and value >= least:
        return
    if isinstance(value, float) and 0 <= value < 1:
        return
    raise ConfigError(
        f"{name}={value!r}: give layers as an int of {least} or more, or as a ratio of the "
        "model's depth, a float in [0, 1)"
    )


def check_number(name: str, value: Any, least: float = -math.inf) -> None:
    """Check for a finite number of at least ``least``."""
    if not _is_number(value) or value < least:
        raise ConfigError(f"{name}={value!r}: give a finite number of at least {least:g}")


def check_bool(name: str, value: Any) -> None:
    """Check for True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: give True or False")


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Check for a word of ``known``; the error names the nearest one."""
    known = list(known)
    if value not in known:
        raise unknown_name(f"value for {name}:", str(value), known)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
