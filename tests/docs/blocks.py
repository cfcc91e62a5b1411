"""The pages of the documentation and their fenced code blocks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = ("board/board.md", "rivals/board.md", "neurons/board.md", "results/co-adaptation.md")
"""Pages that a command wrote as a whole."""
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it holds, and why it is not run, if so."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """A shell block's commands, as words."""
        joined = self.text.replace("\\\n", " ")
        lines = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [words for words in lines if words]


def written_pages() -> list[Path]:
    """README, CONTRIBUTING and the pages of the site that people write."""
    generated = {DOCS / name for name in GENERATED}
    pages = sorted(path for path in DOCS.rglob("*.md") if path not in generated)
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages]


def read_blocks(page: Path) -> list[Block]:
    """A page's blocks, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start("text")),
            match["language"],
            match["text"],
            match["reason"],
        )
        for match in FENCE.finditer(text)
    ]
