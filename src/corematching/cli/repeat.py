"""The command line that repeats a run, for its result files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def write_command(command: str, given: Mapping[str, Any]) -> str:
    """The command with the options that were given.

    None and False are left out, True stands for a flag, a list repeats its option.
    """
    words = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        values = [item for item in values if item is not None and item is not False]
        words += [option if item is True else f"{option}={item}" for item in values]
    return shlex.join(["corematching", command, *words])
