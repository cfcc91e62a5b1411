"""Fills the places ``<!-- generated: WHAT -->`` of the documentation from the package itself.

=====================  =====================================================================
``command``            the command's options, from typer
``methods``            one row per registered method
``parameters CLASS``   a class's parameters, with defaults and help
``names KIND``         the registered scores, budgets or rules of a kind, one row each
``families``           the model families that are tested
=====================  =====================================================================
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import command_tables
import method_tables

CELL_CODE = re.compile(r"(?<=<td>)<code>[^<]+</code>|(?<=<br>)<code>[^<]+</code>")
BREAKS = re.compile(r"(?<=[,:(])(?=.)(?!</code>)")
PLACE = re.compile(r"<!-- generated: (\w+) ?(.*?) -->")
WRITERS = {
    "command": command_tables.write_command,
    "methods": method_tables.write_methods,
    "parameters": method_tables.write_parameters,
    "names": method_tables.write_names,
    "families": method_tables.write_families,
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the places of a page; MkDocs calls this for each."""

    def fill(place: re.Match[str]) -> str:
        what, argument = place.groups()
        if what not in WRITERS:
            raise ValueError(f"{page.file.src_uri}: nothing writes '{what}'")
        return WRITERS[what](*([argument] if argument else []))

    return PLACE.sub(fill, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Let a method's text break behind commas, colons and brackets where it is in a cell."""
    return CELL_CODE.sub(lambda code: BREAKS.sub("<wbr>", code[0]), html)
