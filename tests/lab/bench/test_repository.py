"""The adapters and the table script that come with the repository."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from corematching.lab.bench import read_adapters

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_engine_has_an_adapter_with_an_install_line():
    adapters = read_adapters(BENCHMARKS / "peers")
    names = {"transformers_eager", "transformers_compiled", "openvino_genai", "vllm"}
    assert set(adapters) == names | {"llama_cpp", "llama_server"}
    for name, adapter in adapters.items():
        assert adapter.path.stem == name and adapter.install
        assert adapter.needs and set(adapter.find_missing()) <= {*adapter.needs, *adapter.programs}
        text = (BENCHMARKS.parent / "docs" / "guides" / "benchmark.md").read_text()
        assert f"| `{name}` |" in text


def test_a_table_goes_between_its_markers():
    fill = load(BENCHMARKS / "speed_table.py").fill_place
    text = "a\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nb <!-- bench:y --><!-- /bench:y -->\n"
    filled = fill(text, "x", "| new \\1 |\n")
    assert "old" not in filled and "<!-- bench:x -->\n\n| new \\1 |\n\n<!-- /bench:x -->" in filled
    assert fill(filled, "x", "| new \\1 |\n") == filled
    with pytest.raises(ValueError, match="it has x, y"):
        fill(text, "z", "")


def test_a_missing_run_is_one_line(tmp_path, monkeypatch):
    document = tmp_path / "speed.md"
    document.write_text("<!-- bench:x --><!-- /bench:x -->")
    script = str(BENCHMARKS / "speed_table.py")
    monkeypatch.setattr(sys, "argv", [script, str(document), f"x={tmp_path}/none.json"])
    with pytest.raises(SystemExit, match=r"\Aerror: x=.*\Z") as ended:
        runpy.run_path(script, run_name="__main__")
    assert isinstance(ended.value.code, str)  # printed to stderr, and exit code 1


def test_text_tensors_of_a_checkpoint_as_they_are(tmp_path):
    gguf_text = load(BENCHMARKS / "peers" / "gguf_text.py")
    stored = {
        "model.language_model.layers.0.mlp.up_proj.weight": torch.randn(3, 4).bfloat16(),
        "language_model.model.embed_tokens.weight": torch.randn(5, 2),
        "language_model.lm_head.weight": torch.randn(5, 2).half(),
        "model.language_model.norm.weight": torch.ones(2),
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight": torch.randn(2, 2),
        "model.multi_modal_projector.linear_1.weight": torch.randn(2, 2),
    }
    save_file(stored, tmp_path / "model.safetensors")
    read = dict(gguf_text.read_text_tensors(tmp_path))
    expected = {
        "model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.norm.weight": "model.language_model.norm.weight",
    }
    assert set(read) == set(expected)
    for name, source in expected.items():
        np.testing.assert_array_equal(read[name], stored[source].float().numpy())


def test_heads_are_reordered_from_halves_to_neighbours():
    reorder = load(BENCHMARKS / "peers" / "gguf_text.py").reorder_heads
    rows = np.arange(8.0)[:, None]  # two heads of four rows
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    moved = reorder("model.layers.0.self_attn.q_proj.weight", rows, config)
    assert moved[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    one = reorder("model.layers.0.self_attn.k_proj.weight", rows, config)
    assert one[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert reorder("model.layers.0.self_attn.v_proj.weight", rows, config) is rows
