"""What messages, help texts and documents tell people to write can be written."""

import ast
import re
import shlex
import warnings
from pathlib import Path

import pytest

import corematching
from corematching import CoreMatching, Griffin, Sparsifier, TopNeurons
from corematching.lab.evaluate import make_methods
from corematching.old_names import OldNameWarning

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.sh")),
    *sorted((ROOT / "src" / "corematching" / "cli").glob("*.py")),
]


ADVICE = re.compile(
    r"\((?:CoreMatching: )?((?:neurons|tokens|score|firing|keep\w*)=\w+(?:\(\))?)\)"
)


def read_strings(path):
    """Every string of a module that a user may see: joined parts, without docstrings' quotes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def read_advice():
    """``(neurons=None)`` and ``(CoreMatching: ...)`` in the messages of the package."""
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for text in read_strings(path):
            for advice in ADVICE.findall(text):
                found.setdefault(advice, path.name)
            for advice in re.findall(r"such as (CoreMatching\(.*?\)\))", text):
                found.setdefault(advice, path.name)
    return found


def test_advice_of_messages_works():
    advice = read_advice()
    assert {"neurons=None", "score=None", "neurons=TopNeurons()"} <= advice.keys()
    for text in advice:
        call = text if text.startswith("CoreMatching") else f"CoreMatching({text})"
        assert isinstance(eval(call, vars(corematching) | NAMES), CoreMatching), text


NAMES = {"CoreMatching": CoreMatching, "TopNeurons": TopNeurons}


def test_advice_leaves_out_what_it_says():
    assert CoreMatching(neurons=None).neurons is None and CoreMatching(score=None).tokens is None
    assert Sparsifier(neurons=None).neurons is None and Griffin().tokens is None


def list_methods(page):
    """The texts of methods in a page's commands, with its shell variables filled in."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    variables = dict(re.findall(r"\b([A-Z]+)=(corematching[^\s\"]*)", text))
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    for found in re.findall(r"(?:--method|-M)[ =](\"[^\"]*\"|'[^']*'|[^\s`)]+)", text):
        words = shlex.split(found)
        if words and re.fullmatch(r"[a-z][\w-]*(:.*)?", words[0]):
            yield words[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_methods_are_read_without_a_warning(page):
    with warnings.catch_warnings():
        warnings.simplefilter("error", OldNameWarning)
        make_methods([text for text in list_methods(page) if "loud" not in text])


def test_the_pages_name_methods():
    assert sum(len(list(list_methods(page))) for page in PAGES) > 30
