"""What decoders hand to their layers beside hidden states: shortened, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from corematching.errors import UnsupportedModelError
from corematching.methods import CoreMatching, TopNeurons
from corematching.model.attention import find_attention
from corematching.model.layer_inputs import (
    find_cache,
    may_add_between_layers,
    name_inputs,
    needs_positions,
    takes_cache,
)
from corematching.runtime import attach
from tests.models import VISION_FAMILIES, build, make_inputs
from tests.runtime.families import RandomTokens, TestMethod, generate

TOKENS = TestMethod(RandomTokens((1,), (1,)))


def replace_layers(model, kind):
    for layer in model.get_decoder().layers:
        layer.__class__ = kind(type(layer))


def renamed(base):
    class Renamed(base):
        def forward(self, hidden_states, kv_store=None, **kwargs):
            return super().forward(hidden_states, past_key_values=kv_store, **kwargs)

    return Renamed


def with_tables(base):
    class WithTables(base):
        def forward(self, hidden_states, past_key_values=None, table=None, **kwargs):
            return super().forward(hidden_states, past_key_values=past_key_values, **kwargs)

    return WithTables


def test_a_cache_under_an_unknown_name_is_refused_at_install():
    model = build("llava")
    replace_layers(model, renamed)
    with pytest.raises(UnsupportedModelError, match=r"no KV cache named.*score=None"):
        attach(model, TOKENS)


def test_a_cache_that_no_layer_shows_is_refused_before_an_answer(monkeypatch):
    """Layers that take a cache by a known name, and get it another way."""
    model = build("llava")
    inputs = make_inputs("llava", model)
    run = attach(model, TOKENS)
    monkeypatch.setattr("corematching.runtime.prefill.prefill.find_cache", lambda _: None)
    try:
        with pytest.raises(UnsupportedModelError, match="no KV cache named"):
            generate(model, inputs)
    finally:
        run.remove()


def test_an_unknown_input_with_an_entry_per_token_is_refused():
    model = build("llava")
    inputs = make_inputs("llava", model)
    length = inputs["input_ids"].shape[1]
    replace_layers(model, with_tables)

    def add_table(_, args, kwargs):
        return args, {**kwargs, "table": torch.zeros(1, length)}

    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(add_table, with_kwargs=True)
    run = attach(model, TOKENS)
    try:
        with pytest.raises(UnsupportedModelError, match=r"takes 'table'.*score=None"):
            generate(model, inputs)
    finally:
        run.remove()


def test_hidden_states_of_four_dimensions_are_refused():
    model = build("llava")
    inputs = make_inputs("llava", model)
    run = attach(model, TOKENS)
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: ((args[0][None],), kwargs), with_kwargs=True
        )
    )
    try:
        with pytest.raises(UnsupportedModelError, match="4 dimensions"):
            generate(model, inputs)
    finally:
        run.remove()
        handle.remove()


def test_positions_with_gaps_and_flash_attention_are_refused_where_they_count():
    model = build("ministral3")
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"set_attn_implementation\('sdpa'\)"):
        attach(model, TOKENS)


def test_layers_read_kept_positions():
    """The layers behind a cut get the position ids of the tokens that they see."""
    model = build("llava")
    inputs = make_inputs("llava", model)
    tokens = RandomTokens((1,), (1,))
    seen = []
    run = attach(model, TestMethod(tokens))
    handle = (
        model.get_decoder()
        .layers[2]
        .self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    run.remove()
    kept = tokens.kept_after(inputs["input_ids"] == 120)[1]
    assert torch.equal(seen[0], kept.nonzero()[None, :, 1])


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_what_is_known_about_the_families(name):
    decoder = build(name).get_decoder()
    assert all(takes_cache(layer) for layer in decoder.layers)
    assert may_add_between_layers(decoder) == (name == "granite4_vision")
    assert needs_positions(find_attention(decoder.layers[0])) == (name == "ministral3")


def test_positional_inputs_get_their_names():
    class Layer(nn.Module):
        def forward(self, x, mask=None, *, layer_past=None, **kwargs):
            return x

    cache, x = DynamicCache(), torch.zeros(1)
    hidden, rest = name_inputs(Layer(), (x, None), {"layer_past": cache})
    assert hidden is x and rest == {"mask": None, "layer_past": cache}
    assert find_cache(rest) is cache and find_cache({"past_key_values": None}) is None
    hidden, rest = name_inputs(Layer(), (), {"x": x, "other": 1})
    assert hidden is x and rest == {"other": 1}


@pytest.mark.parametrize("name", ["gemma4", "gemma4_per_layer", "granite4_vision", "ministral3"])
def test_the_default_method_answers_and_reports(name):
    model = build(name)
    inputs = make_inputs(name, model, batch=2)
    with CoreMatching(layer=1)(model) as run:
        generate(model, inputs)
        samples = run.report.samples
    assert all(0 < x.kept_tokens < x.image_tokens for x in samples)
    assert all(x.prefill_flops < x.dense_prefill_flops for x in samples)


def test_the_report_counts_each_layers_own_heads():
    model = build("gemma4")
    inputs = make_inputs("gemma4", model)
    with CoreMatching(score=None, neurons=None)(model) as run, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        found = run.report.samples[0].kv_bytes
    sizes = {(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers}
    assert sizes == {(2, 16), (1, 32)}
    stored = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert found == sum(tensor.numel() * tensor.element_size() for tensor in stored)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_weights_are_counted():
    model = build("llava")
    inputs = make_inputs("llava", model)
    with CoreMatching(neurons=None)(model) as run:
        generate(model, inputs)
        plain = run.report
    with torch.no_grad():
        packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with CoreMatching(neurons=None)(packed) as run:
        generate(packed, inputs)
        report = run.report
    assert report.vision_flops == plain.vision_flops
    ours, theirs = report.samples[0], plain.samples[0]
    assert ours.dense_prefill_flops == theirs.dense_prefill_flops
    assert ours.dense_decode_flops == theirs.dense_decode_flops


def test_no_gate_and_neurons_for_the_whole_answer():
    model = build("llava_neox")
    inputs = make_inputs("llava_neox", model)
    with CoreMatching(layer=1, neurons=TopNeurons())(model) as run:
        generate(model, inputs)
        assert run.report.samples[0].kept_tokens < 16
