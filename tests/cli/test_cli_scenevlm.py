"""SceneVLM as a user gets it: assembled from the shipped files and the wheel where it is not yet.

It lies in the user's own cache, as for the pages of the documentation: one assembly for all tests.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
from PIL import Image

from corematching.cli.entry import run_command
from corematching.demo.example import read_example
from corematching.demo.language import PACKAGE
from tests.cli.test_cli_process import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"the wheel of {PACKAGE} is not installed"
)


def test_run_answers_from_core_tokens(tmp_path):
    example = read_example()
    overlay = tmp_path / "kept.png"
    arguments = ("--image", example.image, "--question", example.question, "--overlay", overlay)
    done = run("run", *arguments, "--json", "--compare")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["model"] == "SceneVLM"
    assert example.answer.lower() in result["dense_answer"].lower()
    assert example.answer.lower() in result["answer"].lower()
    (sample,) = result["report"]["samples"]
    assert 0 < sample["kept_tokens"] <= 0.51 * sample["image_tokens"]
    assert sample["prefill_flops"] < sample["dense_prefill_flops"]
    assert sample["decode_flops"] < sample["dense_decode_flops"]
    assert sample["kv_bytes"] < sample["dense_kv_bytes"]
    with Image.open(overlay) as drawn:
        assert drawn.format == "PNG"


def test_demo_shows_dense_beside_sparse(capsys):
    code = run_command(["demo"])
    said = capsys.readouterr()
    assert code == 0, said.err
    lines = said.out.splitlines()
    assert any(line.startswith("dense:") for line in lines)
    assert any(line.startswith("sparse:") for line in lines)
    assert any(line.startswith("image tokens") for line in lines)
    assert "Traceback" not in said.err
