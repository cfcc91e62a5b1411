"""Methods in code of one's own: the documented file, found by name through its entry point."""

import logging
import re
import sys
from pathlib import Path

import pytest
import torch

from corematching import method_from_text, method_names, score_by_name
from corematching.errors import ConfigError
from corematching.policy import plugins
from corematching.policy.component import REGISTRY
from tests.models import build, make_inputs

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def read_blocks():
    """The code blocks of the page's last section: the file, its entry point, its use."""
    section = DOCS.read_text(encoding="utf-8").partition("\n## A method of your own\n")[2]
    return dict(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes an installed package with one module and one entry point."""
    before = {kind: dict(known) for kind, known in REGISTRY.items()}

    def make(code, entry, name="loudest"):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        facts = tmp_path / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(entry)
        monkeypatch.syspath_prepend(str(tmp_path))
        plugins.load.cache_clear()

    yield make
    plugins.load.cache_clear()
    for name in [name for name in sys.modules if name in ("loudest", "broken")]:
        del sys.modules[name]
    for kind, known in before.items():
        REGISTRY[kind].clear()
        REGISTRY[kind].update(known)


def entry_of(toml):
    """The entry points of a pyproject.toml, as installers write them."""
    return toml.replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "")


def test_the_documented_file_is_found_by_name(package):
    blocks = read_blocks()
    package(blocks["python"], entry_of(blocks["toml"]))
    method = method_from_text("loudest:keep_ratio=0.3,layer=1")
    assert "loudest" in method_names() and type(method).__module__ == "loudest"
    assert score_by_name("loudest")
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    for chosen in (method, method_from_text("corematching:score=loudest,keep_tokens=5,layer=1")):
        with torch.no_grad(), chosen(model) as run:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert [sample.kept_tokens for sample in run.report.samples] == [5, 5]


def test_the_documented_commands_name_what_the_file_has():
    commands = read_blocks()["bash"]
    assert "--method loudest:keep_ratio=0.2" in commands and "--score loudest" in commands


def test_a_package_that_cannot_be_loaded_is_named(package, caplog):
    package("raise RuntimeError('no luck')", "[corematching.methods]\nx = broken\n", "broken")
    with (
        caplog.at_level(logging.WARNING, "corematching"),
        pytest.raises(ConfigError, match=r"unknown method 'loudest'.*'x' of broken .*no luck"),
    ):
        method_from_text("loudest")
    assert "no luck" in caplog.text
    assert method_from_text("fastv").name == "fastv"


def test_a_taken_name_is_refused(package):
    code = "from corematching import BaseMethod\nclass Mine(BaseMethod, name='fastv'):\n    pass\n"
    package(code, "[corematching.methods]\nfastv = broken:Mine\n", "broken")
    with pytest.raises(ConfigError, match="'fastv' is taken by FastV: rename one"):
        method_from_text("something-else")
