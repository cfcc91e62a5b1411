"""Methods in code of one's own: the documented file, found by name through its entry point."""

import logging
import re
import sys
from pathlib import Path

import pytest
import torch

from corematching import method_from_text, method_names, score_by_name
from corematching.errors import ConfigError
from corematching.policies import plugins
from corematching.policies.component import REGISTRY
from tests.models import build, make_inputs

DOCS = Path(__file__).parents[2] / "docs" / "guides" / "add-a-method.md"


def read_classes():
    """The documented file: the blocks of the page that define the score and the method."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    score = next(block for block in blocks if "class Loudest(" in block)
    method = next(block for block in blocks if "class LoudTokens(" in block)
    imports = "from dataclasses import field\nfrom corematching import TokenRule\n"
    return score + imports + method.partition("\nwith ")[0]


def read_entry():
    """The documented entry point, of the module that the test installs."""
    (toml,) = re.findall(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    group = toml[toml.index("[project.entry-points") :]
    return (
        group.replace('[project.entry-points."', "[")
        .replace('"]', "]")
        .replace('"my_package.loud"', "loudest")
    )


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


def test_the_documented_file_is_found_by_name(package):
    package(read_classes(), read_entry())
    method = method_from_text("loud-tokens:keep_ratio=0.3,layer=1")
    assert "loud-tokens" in method_names() and type(method).__module__ == "loudest"
    assert score_by_name("loudest")
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    for chosen in (method, method_from_text("corematching:score=loudest,keep_tokens=5,layer=1")):
        with torch.no_grad(), chosen(model) as run:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert [sample.kept_tokens for sample in run.report.samples] == [5, 5]


def test_the_documented_commands_name_what_the_file_has():
    text = DOCS.read_text(encoding="utf-8")
    assert "-M loud-tokens:keep_ratio=0.2" in text and "--score loudest" in text


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
