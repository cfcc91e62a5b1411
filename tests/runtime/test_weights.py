"""Tokens that count for several; every family is compared with the reference in test_families."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from corematching.cache.masks import add_weights, weigh_mask
from corematching.cache.pruned_cache import pruned_prompt_of
from corematching.methods import method_from_text
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import (
    STEPS,
    RandomTokens,
    TestMethod,
    assert_same,
    generate,
    reference,
)

LOWEST = torch.finfo(torch.float32).min


def attend(query, keys, values, mask):
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


@pytest.mark.parametrize("additive", [False, True])
def test_a_key_that_counts_for_three_is_three_keys(additive):
    query, keys, values = torch.randn(3, 1, 2, 5, 4).unbind(0)
    query = query[:, :, -2:]
    counts = torch.tensor([1, 3, 1, 2, 1])
    seen = torch.tensor([[True, True, True, True, False], [False, True, True, True, True]])
    mask = torch.zeros(2, 5).masked_fill(~seen, LOWEST) if additive else seen
    weighed = add_weights(mask[None, None], counts[:4].log()[None, None, None], torch.float32)
    repeated = [x.repeat_interleave(counts, dim=2) for x in (keys, values)]
    expected = attend(query, *repeated, seen.repeat_interleave(counts, dim=1)[None, None])
    torch.testing.assert_close(attend(query, keys, values, weighed), expected)


def test_weights_of_a_prompt_without_a_mask():
    valid = torch.ones(1, 3, dtype=torch.bool)
    log_counts = torch.tensor([0.0, 1.0, 2.0])[None, None, None]
    mask = weigh_mask(None, log_counts, valid, 4, True, torch.float32)[0, 0]
    low = LOWEST
    assert mask.tolist() == [[0, low, low, low], [0, 1, low, low], [0, 1, 2, low]]
    both_ways = weigh_mask(None, log_counts, valid, 3, False, torch.float32)[0, 0]
    assert both_ways.tolist() == [[0, 1, 2]] * 3


class WeighedOnce(RandomTokens):
    """Weights after the first of its layers only."""

    def choose(self, view):
        choice = super().choose(view)
        return choice if view.layer == self.layers[0] else replace(choice, weights=None)

    def weights_after(self, image):
        return {self.layers[0]: super().weights_after(image)[self.layers[0]]}


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_weights_outlast_a_cut_that_gives_none(name):
    model = build(name)
    inputs = make_inputs(name, model, batch=2)
    method = TestMethod(WeighedOnce((0, 2), (1, 2), 0.6))
    run = attach(model, method)
    try:
        assert_same(generate(model, inputs), reference(name, inputs, method))
    finally:
        run.remove()


@pytest.mark.parametrize("kind", [None, "static"])
def test_the_cache_remembers_weights(kind):
    model = build("llava")
    inputs = make_inputs("llava", model)
    tokens = RandomTokens((0, 2), (1,), 0.6)
    attach(model, TestMethod(tokens))
    try:
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            cache_implementation=kind,
            return_dict_in_generate=True,
        )
        memory = pruned_prompt_of(out.past_key_values)
        alive = tokens.alive(0, 16, 2)
        expected = tokens.weights(0, 16, 1)[alive].log()
        found = memory.log_counts[0]
        torch.testing.assert_close(found[found != 0], expected)
        assert (len(found) > memory.valid.shape[1]) == (kind == "static")
        out.past_key_values.reset()
        assert memory.log_counts is None and memory.masks is None
    finally:
        detach(model)
    assert all("forward" not in vars(layer) for layer in model.get_decoder().layers)


def test_a_method_without_weights_leaves_the_layers_alone():
    model = build("llava")
    attach(model, TestMethod(RandomTokens((0,), (1,), weighed=False)), "torch")
    try:
        assert "forward" not in vars(model.get_decoder().layers[0])
    finally:
        detach(model)


def test_weights_change_what_is_answered():
    model = build("llava")
    inputs = make_inputs("llava", model)
    logits = []
    for proportional in ("true", "false"):
        text = f"corematching:keep=4,layer=1,neuron_score=none,proportional={proportional}"
        with method_from_text(text)(model):
            logits.append(generate(model, inputs).logits)
    assert not torch.allclose(*logits, atol=1e-3)
