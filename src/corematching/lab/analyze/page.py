"""The frame of a self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from corematching import __version__
from corematching.errors import InputError
from corematching.lab.analyze.style import STYLE

ICON = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E"


def build_page(title: str, body: str, command: str, style: str = "") -> str:
    """A whole HTML document.

    Parameters
    ----------
    title : str
        Plain text.
    body : str
        HTML.
    command : str
        The command behind the page, for its foot; empty: none.
    style : str
        CSS beside `corematching.lab.analyze.style.STYLE`.
    """
    made = f"Made by <code>{escape(command)}</code>, " if command else "Made with "
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="{ICON}">'
        f"<style>{STYLE}{style}</style></head>\n<body><main>\n{body}\n"
        f'<footer class="soft">{made}corematching {__version__}.</footer>\n'
        "</main></body></html>\n"
    )


def draw_key(entries: Sequence[tuple[str, str]]) -> str:
    """The key to a chart's colours, from (class, text)."""
    items = (f'<span class="{kind}"><i>{escape(text)}</i></span>' for kind, text in entries)
    return f'<div class="key">{"".join(items)}</div>'


def draw_figure(content: str, caption: str) -> str:
    """A figure; both parts are HTML."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def list_terms(terms: Mapping[str, str]) -> str:
    """Definitions, in HTML."""
    items = (f"<dt>{term}</dt><dd>{text}</dd>" for term, text in terms.items())
    return f'<dl class="terms">{"".join(items)}</dl>'


def write_percent(ratio: float, digits: int = 0) -> str:
    """0.125 -> 12 %."""
    return f"{100 * ratio:.{digits}f} %"


def write_signed(value: float | None) -> str:
    """A correlation with its sign, or a dash."""
    return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def save_page(path: Path, text: str) -> None:
    """Write a file.

    Raises
    ------
    InputError
        It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): give another path") from error
