"""Writes the tables of finished runs into a document, between the runs' markers.

    python benchmarks/speed_table.py docs/results/speed.md scenevlm-bf16=runs/bench.json

A run's place is ``<!-- bench:NAME -->`` to ``<!-- /bench:NAME -->``; what is between goes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from corematching.bench import write_markdown


def fill_place(text: str, name: str, table: str, kind: str = "bench") -> str:
    """Put a table, which ends its last line, between the markers ``kind:name`` of a document.

    Raises
    ------
    ValueError
        The document has no place of this name, or more than one.
    """
    start, end = f"<!-- {kind}:{name} -->", f"<!-- /{kind}:{name} -->"
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
    found = len(pattern.findall(text))
    if found != 1:
        names = ", ".join(re.findall(rf"<!-- {kind}:(.+?) -->", text)) or "none"
        raise ValueError(f"{found} places for '{name}' in the document; it has {names}")
    return pattern.sub(lambda _: f"{start}\n\n{table}\n{end}", text)


def main() -> None:
    """Fill the places that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("document", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=bench.json")
    arguments = parser.parse_args()
    text = arguments.document.read_text(encoding="utf-8")
    for run in arguments.runs:
        name, _, path = run.partition("=")
        try:
            board = json.loads(Path(path).read_text(encoding="utf-8"))
            text = fill_place(text, name, write_markdown(board))
        except (OSError, ValueError) as error:
            sys.exit(f"error: {run}: {error}")
    arguments.document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
