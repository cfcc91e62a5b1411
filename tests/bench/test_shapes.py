"""Published architectures: their sizes, and random weights in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from accelerate import init_empty_weights

from corematching import method_from_dict
from corematching.bench import SHAPES, RandomWorkload, build_random, find_shape, name_by_hand
from corematching.bench.contenders import generate_exactly, share_weights
from corematching.bench.cost import decode_bytes, weight_bytes
from corematching.errors import ConfigError
from corematching.methods import method_from_text

PARAMETERS = {
    "llava-1.5-7b": 7.06e9,
    "llava-1.5-13b": 13.35e9,
    "qwen2.5-vl-7b": 8.29e9,
    "qwen2.5-vl-3b": 3.75e9,
    "smolvlm-500m": 0.507e9,
}
"""What their model cards say, about."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_is_the_published_one(name):
    shape = find_shape(name)
    with init_empty_weights():
        model = getattr(transformers, shape.model)(shape.make_config())
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.01)


def test_unknown_shape_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'llava-1.5-7b'"):
        find_shape("llava-1.5-7")


def test_random_weights_are_finite_and_of_the_dtype():
    model = build_random(SHAPES["tiny"], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    gate = model.get_decoder().layers[0].mlp.gate_proj.weight
    assert gate.float().std() == pytest.approx(0.02, rel=0.1)


def test_requests_differ_in_picture_and_text(workload):
    first, again, second = (workload.open(number) for number in (1, 1, 2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert int((first["input_ids"] == workload.shape.image_id).sum()) == 16
    assert first["input_ids"].shape == (1, workload.prompt_tokens)


def test_exactly_so_many_tokens_whatever_the_model_wants(workload):
    inputs = workload.open(3)
    before = inputs["input_ids"].shape[1]
    assert generate_exactly(workload.model, inputs, 5).shape[1] == before + 5


def test_two_instances_share_every_weight(workload):
    twin = share_weights(workload.model)
    ours = dict(workload.model.named_parameters())
    assert twin is not workload.model
    assert all(p is ours[name] for name, p in twin.named_parameters())


def test_bytes_of_a_step_by_hand(workload):
    method = method_from_text(name_by_hand(0.25, 0.5))
    model = share_weights(workload.model)
    with method(model) as run:
        generate_exactly(model, workload.open(0), 2)
        report = run.report
    hidden, width, layers, vocabulary = 64, 160, 4, 256
    attention, ffn = 4 * hidden * hidden, 3 * hidden * width
    weights = layers * (attention + ffn // 2) + vocabulary * hidden
    cache = sum(sample.kv_bytes for sample in report.samples)
    assert decode_bytes(report) == 4 * weights + cache
    assert cache == layers * 2 * hidden * 4 * (8 + 4)  # 8 text tokens, 4 of 16 image tokens
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())


def test_too_short_a_prompt_is_refused():
    shape = find_shape("qwen2.5-vl-3b")
    with pytest.raises(ConfigError, match="--prompt-tokens 3"):
        RandomWorkload(shape, model=None, text_tokens=2)


def test_ratios_by_hand_reach_every_layer():
    method = method_from_text(name_by_hand(0.2, 0.4))
    assert method.neurons.counts(4, 160) == (64,) * 4
    assert method.tokens.drop_after(4) == (1,)
    assert method_from_text(name_by_hand(None, 0.4)).tokens is None
    assert method_from_text(name_by_hand(0.2, None)).neurons is None
    assert method_from_text(name_by_hand(0.2, 1.0, layer=2)).tokens.drop_after(4) == (2,)
    assert method_from_dict(method.to_dict()) == method


def test_a_ratio_out_of_range_names_the_option():
    with pytest.raises(ConfigError, match=r"--neuron-ratio 1.5"):
        name_by_hand(None, 1.5)
    with pytest.raises(ConfigError, match="--keep-tokens=3 is that number"):
        name_by_hand(3)
    with pytest.raises(ConfigError, match="exclude each other"):
        name_by_hand(0.3, keep_tokens=3)


def test_counts_and_rules_by_token():
    method = method_from_text(name_by_hand(keep_tokens=7, neuron_ratio=0.4, active_ratio=0.5))
    assert method.tokens.budget.keep_tokens == 7 and method.neurons.active_ratio == 0.5
    assert method.neurons.counts(4, 160) == (64,) * 4
    assert method_from_text(name_by_hand(active_ratio=0.5)).neurons.among is None


SMALL = {
    "qwen2.5-vl-3b": (
        {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"hidden_size": 64, "num_heads": 2, "depth": 1, "out_hidden_size": 128},
    ),
    "smolvlm-500m": (
        {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"hidden_size": 48, "num_attention_heads": 1, "num_hidden_layers": 1},
    ),
    "llava-1.5-7b": (
        {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2},
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_requests_fit_the_architecture(name):
    """The published layout of inputs, on narrow layers, in a batch, dense and sparse."""
    shape, (text, vision) = find_shape(name), SMALL[name]
    narrow = {"num_hidden_layers": 3, "intermediate_size": 96}
    small = replace(
        shape,
        text={**shape.text, **text, **narrow},
        vision={**shape.vision, **vision, "intermediate_size": 64},
    )
    workload = RandomWorkload(small, build_random(small), batch=2, text_tokens=6)
    inputs = workload.prepare(workload.open(0))
    with method_from_text(name_by_hand(0.25, 0.5))(workload.model) as run:
        output = generate_exactly(workload.model, inputs, 3)
        report = run.report
    assert output.shape == (2, workload.prompt_tokens + 3)
    assert [s.image_tokens for s in report.samples] == [shape.image_tokens] * 2
    assert [s.kept_tokens for s in report.samples] == [shape.image_tokens // 4] * 2
