"""The command line that repeats a run, for what a run writes down."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def write_command(command: str, given: Mapping[str, Any]) -> str:
    """The command with the options that were given; None is left out, a list repeats its option."""
    words = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}={item}" for item in values if item is not None]
    return shlex.join(["corematching", command, *words])
