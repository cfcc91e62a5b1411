"""Checks on a page: well-formed, and in need of nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "br"}
OUTSIDE = re.compile(r"(https?:)?//(?!www\.w3\.org/2000/svg)")


class Checker(HTMLParser):
    """Follows the nesting of elements, and collects ids, references and texts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.note(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.note(tag, attrs)

    def note(self, tag, attrs):
        assert tag not in ("script", "iframe", "object", "embed", "base"), tag
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}"
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
                self.references.append(value)
            if name in ("filter", "fill"):
                self.references += re.findall(r"url\((.*?)\)", value)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def check_page(page: str) -> Checker:
    """Parse a page; refuse unbalanced elements, doubled ids and references to anything outside."""
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert page.startswith("<!doctype html>") and not checker.open
    assert len(checker.ids) == len(set(checker.ids))
    for reference in checker.references:
        if reference.startswith("#"):
            assert reference[1:] in checker.ids, reference
        else:
            assert reference.startswith("data:image/"), reference
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert "@import" not in style and "url(" not in style and style.count("{") == style.count("}")
    assert not OUTSIDE.search(re.sub(r"data:image/[^\"]*", "", page))
    return checker
