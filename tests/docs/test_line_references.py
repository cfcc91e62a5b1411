"""The lines that documentation names are those of the present code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("refs", ROOT / "docs/hooks/line_references.py")
refs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(refs)
ARCHITECTURE = (ROOT / refs.PAGES[0]).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", refs.PAGES)
def test_lines_are_those_of_today(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = refs.stale(text)
    assert not found, f"{found}: run python docs/hooks/line_references.py --write"


def test_a_request_passes_through_few_files():
    files = {path for path, *_ in refs.REFERENCE.findall(ARCHITECTURE)}
    assert 15 <= len(files) <= 25


def test_every_package_is_in_the_table():
    packages = {
        p.name for p in (ROOT / "src/corematching").iterdir() if (p / "__init__.py").is_file()
    }
    assert packages <= set(re.findall(r"`(\w+)/`", ARCHITECTURE))


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", refs.PAGES[0]])
def test_named_places_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"`(src/[\w/]+(?:\.py)?/?)", text):
        assert (ROOT / path).exists(), path


def test_a_stale_line_is_found_and_renewed():
    stale = "`src/corematching/runtime/session.py:1` `Session._forward`"
    assert refs.stale(stale)
    assert not refs.stale(refs.renew(stale))
