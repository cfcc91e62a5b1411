"""Prompts without a cache: one forward is fine, one at every step is refused."""

from __future__ import annotations

import pytest
import torch

from corematching.errors import UnsupportedModelError
from tests.models import build, make_inputs
from tests.runtime.families import (
    STEPS,
    RandomNeurons,
    RandomTokens,
    TestMethod,
    assert_same,
    generate,
)


def build_with(name, batch=1, neurons=True):
    """A model, a method for it, and its inputs."""
    model, seeds = build(name), tuple(range(1, batch + 1))
    method = TestMethod(RandomTokens((1,), seeds), RandomNeurons(seeds) if neurons else None)
    return model, method, make_inputs(name, model, batch=batch)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("name", ["llava", "llava_mistral_window", "gemma3"])
def test_generate_without_a_cache_is_refused_before_anything_runs(name, num_beams, attached):
    model, method, inputs = build_with(name)
    run, ran = attached(model, method), []
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UnsupportedModelError, match="leave use_cache at True"):
        model.generate(**inputs, max_new_tokens=2, use_cache=False, num_beams=num_beams)
    handle.remove()
    assert not ran and run.reports == []


@pytest.mark.parametrize("name", ["llava", "llava_mistral_window"])
def test_a_prompt_does_not_run_twice_in_one_answer(name, attached):
    """Neither where generate() runs a loop that has no cache."""

    def replay(model, input_ids, **kwargs):
        inputs = {k: v for k, v in kwargs.items() if k in ("attention_mask", "pixel_values")}
        for _ in range(2):
            model(input_ids=input_ids, **inputs, use_cache=False)

    model, method, inputs = build_with(name)
    attached(model, method)
    with pytest.raises(UnsupportedModelError, match="leave use_cache at True"):
        model.generate(**inputs, custom_generate=replay, max_new_tokens=2)
    assert generate(model, inputs).tokens.shape == (1, STEPS)


@pytest.mark.parametrize("neurons", [True, False])
def test_a_prompt_without_a_cache_is_scored(neurons, attached):
    model, method, inputs = build_with("llava_mistral_window", 2, neurons)
    attached(model, method)
    with torch.no_grad():
        expected = model(**inputs).logits
        for _ in range(2):
            assert torch.equal(model(**inputs, use_cache=False).logits, expected)
        assert model(**inputs, use_cache=False).past_key_values is None


def test_dense_models_may_run_without_a_cache(attached):
    model, _, inputs = build_with("llava")
    expected = generate(model, inputs, use_cache=False)
    attached(model, TestMethod())
    assert_same(generate(model, inputs, use_cache=False), expected)
