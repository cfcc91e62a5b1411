"""Hooks, replaced modules and choices of neurons see prompts in the kernels as they always do."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from corematching import CoreMatching, Sparsifier
from tests.chosen import neurons_of
from tests.runtime.native_prompts import (
    NEURONS,
    build,
    by_default,
    logits,
    prompt,
)


class DoublingLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@by_default
@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
def test_a_projection_that_becomes_another_is_run_as_it_is(name):
    model, ids = build(), prompt()
    with Sparsifier()(model):
        logits(model, input_ids=ids)
        for layer in model.model.layers:
            old = getattr(layer.self_attn, name)
            new = DoublingLinear(old.in_features, old.out_features, bias=False).to(old.weight.dtype)
            new.weight = old.weight
            setattr(layer.self_attn, name, new)
        ours = logits(model, input_ids=ids)
    dense = logits(model, input_ids=ids)
    assert (ours - dense).norm() < 2e-2 * dense.norm()


@by_default
def test_hooks_on_all_modules_see_every_module():
    model, ids, seen = build(), prompt(), []
    with Sparsifier()(model):
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: seen.append(module)
        )
        try:
            logits(model, input_ids=ids)
        finally:
            handle.remove()
    for layer in model.model.layers:
        assert {layer.mlp.gate_proj, layer.mlp.act_fn, layer.self_attn.q_proj} <= set(seen)


@by_default
def test_hooks_see_what_they_always_see(native_calls):
    model, ids, seen = build(), prompt(), []
    layer = model.model.layers[1]
    modules = [layer.mlp.gate_proj, layer.mlp.down_proj, layer.self_attn.k_proj, layer.mlp]
    with Sparsifier()(model):
        for module in modules:
            module.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out)))
        logits(model, input_ids=ids)
    assert [m for m, *_ in seen] == [modules[2], modules[0], modules[1], modules[3]]
    for module, x, out in seen[:3]:
        expected = torch.nn.functional.linear(x, module.weight)
        assert (out - expected).float().norm() < 1e-2 * expected.float().norm()


@by_default
@pytest.mark.parametrize("with_kwargs", [False, True])
def test_hooks_in_front_of_an_ffn_change_what_it_gets(native_calls, with_kwargs):
    model, ids = build(), prompt()
    layer, last = model.model.layers[1], model.model.layers[2]

    def halve(module, args, *kwargs):
        return ((args[0] / 2,), *kwargs) if with_kwargs else args[0] / 2

    layer.mlp.register_forward_pre_hook(halve, with_kwargs=with_kwargs)
    last.mlp.down_proj.register_forward_pre_hook(halve, with_kwargs=with_kwargs)
    expected = logits(model, input_ids=ids)
    with Sparsifier()(model):
        native_calls.clear()
        got = logits(model, input_ids=ids)
    assert native_calls.count("gated") == len(model.model.layers)
    assert (got - expected).norm() < 2e-2 * expected.norm()


@by_default
def test_a_gate_is_seen_without_another_forward(native_calls):
    model, ids = build(), prompt()
    method = CoreMatching(beta=0.5, firing=0.5, **NEURONS)
    found = []
    for engine in ("torch", "auto"):
        with method(model, engine=engine) as run:
            native_calls.clear()
            logits(model, input_ids=ids)
            found.append(neurons_of(run))
    assert native_calls.count("gated") == len(model.model.layers)
    for index, choice in found[0].items():
        close = choice.gate_threshold / found[1][index].gate_threshold
        assert close.sub(1).abs().max() < 0.05


@by_default
def test_neurons_are_chosen_from_the_kernels_activations(native_calls):
    model, ids = build(), prompt()
    method = CoreMatching(beta=0.5, **NEURONS)
    chosen = []
    for engine in ("torch", "auto"):
        with method(model, engine=engine) as run:
            model.generate(ids, max_new_tokens=3, do_sample=False)
            chosen.append(neurons_of(run))
    assert "gated" in native_calls
    for index, choice in chosen[0].items():
        assert torch.equal(choice.indices, chosen[1][index].indices)


@by_default
def test_batches_of_single_tokens_run_on_chosen_neurons(native_calls):
    model, ids = build(), prompt(2)
    method = CoreMatching(beta=0.5, **NEURONS)
    answers = []
    for engine in ("torch", "auto"):
        with method(model, engine=engine), torch.no_grad():
            cache = StaticCache(model.config, max_cache_len=16)
            model(input_ids=ids, past_key_values=cache)
            native_calls.clear()
            answers.append(model(input_ids=ids[:, :1], past_key_values=cache).logits.float())
    assert "gated" not in native_calls
    assert (answers[1] - answers[0]).norm() < 2e-2 * answers[0].norm()
