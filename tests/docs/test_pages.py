"""Limits of the README, widths, links, and figures that stand in several places."""

from __future__ import annotations

import json
import re

import pytest

from tests.docs.blocks import DOCS, FENCE, ROOT, written_pages

WIDTH = 100
LINK = re.compile(r"\]\(([^)\s]+)\)")
PER_TOKEN = "time per further token (TPOT)"
WRITTEN_BY_BENCH = re.compile(r"<!-- bench:([\w-]+) -->.*?<!-- /bench:\1 -->", re.DOTALL)
PAGES = [*written_pages(), ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "training/README.md"]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def test_the_readme_is_short_and_narrow():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", written_pages(), ids=name_of)
def test_prose_is_wrapped(page):
    prose = WRITTEN_BY_BENCH.sub("", FENCE.sub("", page.read_text()))
    wide = [line for line in prose.splitlines() if len(line) > WIDTH]
    assert [line for line in wide if not line.startswith(("|", "<!--"))] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"https://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        if anchor and file.suffix == ".md" and "corematching." not in anchor:
            assert anchor in anchors_of(file), f"{name_of(page)}: {target}"


def anchors_of(page):
    """What a page's headings are called in links."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower())).strip("-") for head in heads
    }


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        folder = name.partition("/")[0]
        assert f": {name}\n" in listed or f"  /{folder}/\n" in listed, name


def test_figures_of_the_readme_are_those_of_the_results():
    board = json.loads((DOCS / "board" / "board.json").read_text())
    methods = {entry["method"]: entry for entry in board["methods"]}
    ours, dense = methods["corematching"], methods["dense"]
    readme = (ROOT / "README.md").read_text()
    rows = {cells[1].strip(): cells for cells in re.findall(r"^\|(.+)\|$", readme, re.MULTILINE)
            for cells in [["", *cells.split("|")]]}  # fmt: skip
    accuracy = rows["accuracy, 2,000 questions of SceneQA"]
    assert accuracy[2].strip() == f"{100 * dense['accuracy']['value']:.1f} %"
    assert accuracy[4].strip() == f"{100 * ours['accuracy']['value']:.1f} %"
    cache = f"{100 * ours['kv_bytes'] / ours['dense_kv_bytes']:.1f} %"
    assert rows["KV cache"][4].strip() == cache
    assert board["settings"]["questions"] == 2000
    times = read_times("scenevlm-bf16")
    first, further = (rows[name] for name in ("time to the first token (TTFT)", PER_TOKEN))
    for column, engine in ((2, "dense"), (3, "openvino_genai"), (4, "corematching")):
        assert (first[column].split()[0], further[column].split()[0]) == times[engine]
    alone = " and ".join(times["transformers_eager"])
    assert f"alone takes {alone} ms" in readme.replace("\n", " ")


def read_times(name):
    """TTFT and TPOT of each engine in a run's table, as they are written."""
    page = (DOCS / "results" / "speed.md").read_text()
    run = page.partition(f"<!-- bench:{name} -->")[2].partition(f"<!-- /bench:{name} -->")[0]
    cells = (line.split("|") for line in run.splitlines() if line.startswith("| `"))
    return {
        row[1].strip(" `"): (row[2].split()[0], row[6].split()[0])
        for row in cells
        if len(row) > 10 and row[1].strip(" `").isidentifier()
    }


def test_results_are_of_the_present_weights():
    scene = (DOCS / "results" / "board.md").read_text()
    board = json.loads((DOCS / "board" / "board.json").read_text())
    assert board["settings"]["weights"][:8] in scene
    for study in ("rivals", "neurons"):
        settings = json.loads((DOCS / study / "board.json").read_text())["settings"]
        assert settings["weights"][:8] in (DOCS / "results" / "studies.md").read_text()


def test_the_lead_picture_is_small():
    picture = ROOT / "docs" / "images" / "what-is-kept.png"
    assert picture.stat().st_size < 400_000


def test_the_range_of_transformers_is_the_one_that_is_tested():
    project = (ROOT / "pyproject.toml").read_text()
    oldest, below = re.search(r'"transformers>=([\d.]+),<([\d.]+)"', project).groups()
    assert f"OLDEST_TRANSFORMERS := {oldest}\n" in (ROOT / "Makefile").read_text()
    pinned = re.search(r"^transformers==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert below == f"{pinned[1]}.{int(pinned[2]) + 1}"
    assert "make test-oldest" in (ROOT / ".ci" / "run").read_text()
