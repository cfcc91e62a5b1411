"""Line references in the documentation: finds them, and writes today's lines with --write.

    python docs/hooks/line_references.py --write

A reference is `path.py:LINE` followed by the name of the class, function or method that begins
there, both in backquotes.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("docs/explanation/architecture.md", "CONTRIBUTING.md")
REFERENCE = re.compile(r"`(src/[\w/]+\.py):(\d+)`(\s+)`([\w.]+)`")


def find_line(path: str, name: str) -> int:
    """The line where a class, a function or a ``Class.method`` of a file begins."""
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    line = 0
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = next((x for x in body if isinstance(x, kinds) and x.name == part), None)
        if found is None:
            raise LookupError(f"{path} has no {name}")
        body, line = found.body, found.lineno
    return line


def stale(text: str) -> list[str]:
    """The references whose line is another today."""
    return [
        f"{path}:{line} {name} is at {find_line(path, name)}"
        for path, line, _, name in REFERENCE.findall(text)
        if find_line(path, name) != int(line)
    ]


def renew(text: str) -> str:
    """The text with today's lines."""
    return REFERENCE.sub(lambda m: f"`{m[1]}:{find_line(m[1], m[4])}`{m[3]}`{m[4]}`", text)


if __name__ == "__main__":
    for page in PAGES:
        file = ROOT / page
        text = file.read_text(encoding="utf-8")
        if "--write" in sys.argv:
            file.write_text(renew(text), encoding="utf-8")
        else:
            print("\n".join(stale(text)))
