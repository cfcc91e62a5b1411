"""Modules that are replaced, wrapped or patched while a method is installed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from corematching.errors import UnsupportedModelError
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod, assert_same, generate
from tests.runtime.test_families import fingerprint

ENGINES = ("torch", "auto")
LAYER = 2


def tokens_only():
    return TestMethod(RandomTokens((0, 2), (1,)))


def both():
    return TestMethod(RandomTokens((1,), (1,)), RandomNeurons((1,), True))


def other_linear(linear, seed=5):
    rng = torch.Generator().manual_seed(seed)
    fresh = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    with torch.no_grad():
        fresh.weight.copy_(0.3 * torch.randn(fresh.weight.shape, generator=rng))
        if fresh.bias is not None:
            fresh.bias.zero_()
    return fresh.to(linear.weight.dtype).eval()


def in_ffn(name):
    def replace(model):
        mlp = model.get_decoder().layers[LAYER].mlp
        setattr(mlp, name, other_linear(getattr(mlp, name)))

    return replace


def whole_ffn(model):
    layer = model.get_decoder().layers[LAYER]
    layer.mlp = copy.deepcopy(build("llava", seed=7).get_decoder().layers[LAYER].mlp)


def whole_layer(model):
    layers = model.get_decoder().layers
    layers[LAYER] = build("llava", seed=7).get_decoder().layers[LAYER]


def in_attention(model):
    attention = model.get_decoder().layers[LAYER].self_attn
    attention.v_proj = other_linear(attention.v_proj)


def head(model):
    model.set_output_embeddings(other_linear(model.get_output_embeddings()))


def projector(model):
    own = model.base_model.multi_modal_projector
    own.linear_1 = other_linear(own.linear_1)


def in_vision_tower(model):
    layer = model.base_model.vision_tower.encoder.layers[0]
    layer.mlp.fc1 = other_linear(layer.mlp.fc1)


def patched(path):
    def patch(model):
        module = model.get_decoder().layers[LAYER].get_submodule(path)
        original = module.forward

        def forward(*args, **kwargs):
            return 1.5 * original(*args, **kwargs)

        module.forward = forward

    return patch


REPLACEMENTS = {
    "up_proj": in_ffn("up_proj"),
    "gate_proj": in_ffn("gate_proj"),
    "down_proj": in_ffn("down_proj"),
    "ffn": whole_ffn,
    "layer": whole_layer,
    "attention": in_attention,
    "head": head,
    "projector": projector,
    "vision": in_vision_tower,
    "forward of a norm": patched("input_layernorm"),
    "forward of q_proj": patched("self_attn.q_proj"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [tokens_only, both])
@pytest.mark.parametrize("what", REPLACEMENTS)
def test_a_replaced_module_counts_from_the_next_prompt_on(what, make, engine):
    replace = REPLACEMENTS[what]
    model, expected = build("llava"), build("llava")
    inputs = make_inputs("llava", model)
    replace(expected)
    attach(expected, make(), engine="torch")
    attach(model, make(), engine=engine)
    before = generate(model, inputs)
    replace(model)
    after = generate(model, inputs)
    assert_same(after, generate(expected, inputs), tolerance=2e-4)
    assert not torch.allclose(after.logits, before.logits, atol=1e-2)
    detach(model)
    plain = build("llava")
    replace(plain)
    assert_same(generate(model, inputs), generate(plain, inputs), tolerance=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_replaced_between_two_steps_counts_at_once(engine):
    logits = []
    for name in (engine, "torch"):
        model = build("llava")
        inputs = make_inputs("llava", model)
        attach(model, tokens_only(), engine=name)
        with torch.no_grad():
            out = model(**inputs, use_cache=True)
            if name == "torch":  # what stands there from the start
                detach(model)
                cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
                attach(model, tokens_only(), engine="torch")
            else:
                cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
                model(input_ids=token, past_key_values=copy.deepcopy(cache))
            in_ffn("up_proj")(model)
            logits.append(model(input_ids=token, past_key_values=cache).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-4)


class Adapter(nn.Module):
    """What an adapter library puts in a linear layer's place."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.delta = other_linear(base_layer)

    def forward(self, x):
        return self.base_layer(x) + self.delta(x)


def put_adapter(model):
    mlp = model.get_decoder().layers[LAYER].mlp
    mlp.up_proj = Adapter(mlp.up_proj)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_that_comes_later_works_where_no_neurons_are_chosen(engine):
    model, expected = build("llava"), build("llava")
    inputs = make_inputs("llava", model)
    put_adapter(expected)
    attach(expected, tokens_only(), engine="torch")
    attach(model, tokens_only(), engine=engine)
    generate(model, inputs)
    put_adapter(model)
    assert_same(generate(model, inputs), generate(expected, inputs), tolerance=2e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_that_comes_later_is_refused_where_neurons_are_chosen(engine):
    model = build("llava")
    inputs = make_inputs("llava", model)
    attach(model, both(), engine=engine)
    expected = generate(model, inputs)
    mlp = model.get_decoder().layers[LAYER].mlp
    own = mlp.up_proj
    put_adapter(model)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="merge it first"):
            generate(model, inputs)
    mlp.up_proj = own
    assert_same(generate(model, inputs), expected, tolerance=0)
    put_adapter(model)
    detach(model)
    plain = build("llava")
    put_adapter(plain)
    assert_same(generate(model, inputs), generate(plain, inputs), tolerance=0)


def test_a_wrapper_that_was_put_over_ours_stays_and_works():
    model = build("llava")
    inputs = make_inputs("llava", model)
    dense = generate(model, inputs)
    attach(model, both())
    mlp, calls = model.get_decoder().layers[LAYER].mlp, []
    ours = mlp.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    mlp.forward = theirs
    detach(model)
    assert mlp.forward is theirs
    assert_same(generate(model, inputs), dense, tolerance=0)
    assert calls


def test_nothing_is_read_anew_without_need(monkeypatch):
    model = build("llava")
    inputs = make_inputs("llava", model)
    attach(model, both())
    monkeypatch.setattr(
        "corematching.runtime.session.Installation", lambda *_: pytest.fail("read anew")
    )
    generate(model, inputs)
    model.to(torch.float32)
    generate(model, inputs)


def test_removal_after_a_replacement_leaves_no_trace():
    model, plain = build("llava"), build("llava")
    inputs = make_inputs("llava", model)
    attach(model, both())
    generate(model, inputs)
    for other in (model, plain):
        in_ffn("up_proj")(other)
        generate(other, inputs)
    detach(model)
    ours, theirs = counts(model), counts(plain)
    assert ours == theirs


def counts(model):
    """Hooks on every module, and the forwards that stand on instances."""
    return {
        key: len(value) if isinstance(value, list) else key[1]
        for key, value in fingerprint(model).items()
        if "forward" in key[1]
    }


def test_a_hook_that_decoding_does_not_call_is_spoken_of(caplog):
    model = build("llava")
    inputs = make_inputs("llava", model)
    attach(model, both())
    generate(model, inputs)
    assert not caplog.records
    up = model.get_decoder().layers[LAYER].mlp.up_proj
    up.register_forward_hook(lambda *_: None)
    for _ in range(2):
        generate(model, inputs)
    said = [record.message for record in caplog.records if "hooks on the linear" in record.message]
    assert len(said) == 1
