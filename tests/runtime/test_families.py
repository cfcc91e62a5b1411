"""Every family, with every attention implementation that it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from transformers import DynamicCache

from corematching.runtime import attach, detach
from tests.models import FAMILIES, VISION_FAMILIES, build, image_mask, make_inputs
from tests.runtime.families import (
    BANNED,
    STEPS,
    RandomNeurons,
    RandomTokens,
    TestMethod,
    assert_same,
    generate,
    reference,
)

EVERY = [(name, attention) for name in FAMILIES for attention in FAMILIES[name].attention]
VISION = [pair for pair in EVERY if pair[0] in VISION_FAMILIES]
TEXT = [pair for pair in EVERY if pair not in VISION]


@contextmanager
def attached(model, method) -> Iterator:
    run = attach(model, method)
    try:
        yield run
    finally:
        detach(model)


def sparse(model, inputs, method, steps: int = STEPS):
    with attached(model, method):
        return generate(model, inputs, steps)


def own_cache(name: str, model) -> DynamicCache | None:
    """A cache for a decoder that makes none of its own; None for all others."""
    return DynamicCache(config=model.config) if name == "granite4_vision" else None


def single(name: str, inputs: dict, sample: int, counts: list[int]) -> dict:
    """One sample of a batch, without its padding; ``counts`` are the images of every sample."""
    real = inputs["attention_mask"][sample].bool()
    first = sum(counts[:sample])
    alone = {}
    for key, value in inputs.items():
        if key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            alone[key] = value[sample : sample + 1, real]
        elif name in ("smolvlm", "idefics3"):  # (samples, images, 3, height, width)
            alone[key] = value[sample : sample + 1, : counts[sample]]
        else:
            share = value.shape[0] // sum(counts)
            alone[key] = value[first * share : (first + counts[sample]) * share]
    return alone


@pytest.mark.parametrize(("name", "attention"), EVERY)
def test_keeping_everything_equals_dense(name, attention):
    model = build(name, attention)
    inputs = make_inputs(name, model, batch=2)
    dense = generate(model, inputs)
    tokens = RandomTokens((0, 2), (1, 2), share=1.1) if FAMILIES[name].has_vision else None
    method = TestMethod(tokens, RandomNeurons((1, 2), share=1.0))
    assert_same(sparse(model, inputs, method), dense, tolerance=1e-5)


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize(("name", "attention"), VISION)
def test_dropped_tokens_equal_the_reference(name, attention, layer):
    model = build(name, attention)
    inputs = make_inputs(name, model)
    method = TestMethod(RandomTokens((layer,), (1,), weighed=False))
    assert_same(sparse(model, inputs, method), reference(name, inputs, method))


@pytest.mark.parametrize(("name", "attention"), VISION)
def test_progressive_dropping_equals_the_reference(name, attention):
    model = build(name, attention)
    inputs = make_inputs(name, model, images=2)
    method = TestMethod(RandomTokens((0, 2), (1,), share=0.6))
    assert_same(sparse(model, inputs, method), reference(name, inputs, method))


@pytest.mark.parametrize(("name", "attention"), VISION)
def test_a_batch_of_unequal_samples_equals_the_singles(name, attention):
    model = build(name, attention)
    counts = [1, 2]
    inputs = make_inputs(name, model, batch=2, images=counts, text_lengths=[10, 7])
    tokens, neurons = RandomTokens((0, 2), (1, 2), share=0.6), RandomNeurons((1, 2), True)
    kept = tokens.kept_after(image_mask(name, inputs))[2] & inputs["attention_mask"].bool()
    assert len(set(kept.sum(1).tolist())) == 2, "the samples must keep unequal numbers"
    batch = sparse(model, inputs, TestMethod(tokens, neurons))
    for sample, seed in enumerate(tokens.seeds):
        alone = TestMethod(RandomTokens((0, 2), (seed,), share=0.6), RandomNeurons((seed,), True))
        expected = sparse(model, single(name, inputs, sample, counts), alone)
        torch.testing.assert_close(batch.logits[sample], expected.logits[0], rtol=0, atol=1e-4)
        assert torch.equal(batch.tokens[sample], expected.tokens[0])


@pytest.mark.parametrize(
    ("name", "attention", "compensated"),
    [*((*pair, False) for pair in EVERY), *((*pair, True) for pair in TEXT)],
)
def test_compact_neurons_equal_masked_neurons(name, attention, compensated):
    model = build(name, attention)
    inputs = make_inputs(name, model, batch=2)
    method = TestMethod(neurons=RandomNeurons((1, 2), compensated))
    assert_same(sparse(model, inputs, method), reference(name, inputs, method))


@pytest.mark.parametrize(("name", "attention"), VISION)
def test_dropped_tokens_and_neurons_together_equal_the_reference(name, attention):
    model = build(name, attention)
    inputs = make_inputs(name, model, batch=2)
    method = TestMethod(RandomTokens((1,), (1, 2)), RandomNeurons((1, 2), True))
    assert_same(sparse(model, inputs, method), reference(name, inputs, method))


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_a_hand_written_loop_equals_the_reference(name):
    model = build(name)
    inputs = make_inputs(name, model)
    method = TestMethod(RandomTokens((1,), (1,)), RandomNeurons((1,), True))
    expected = reference(name, inputs, method)
    logits = []
    with attached(model, method), torch.no_grad():
        out = model(**inputs, past_key_values=own_cache(name, model), use_cache=True)
        logits.append(out.logits[:, -1])
        for token in expected.tokens[:, :-1].split(1, dim=1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_a_second_turn_equals_the_reference(name):
    """A second question goes on from the shortened cache of the first."""
    model = build(name)
    inputs = make_inputs(name, model)
    method = TestMethod(RandomTokens((1,), (1,)))
    question = torch.tensor([[5, 17, 42]])
    with attached(model, method):
        first = model.generate(
            **inputs, max_new_tokens=3, suppress_tokens=BANNED, return_dict_in_generate=True
        )
        whole = torch.cat([first.sequences, question], 1)
        second = generate(
            model,
            {"input_ids": whole, "attention_mask": torch.ones_like(whole)},
            past_key_values=first.past_key_values,
        )
    given = whole[:, inputs["input_ids"].shape[1] :]
    assert_same(second, reference(name, inputs, method, given=given))


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_a_prompt_without_an_image_drops_nothing(name):
    model = build(name)
    inputs = make_inputs(name, model, batch=2, images=0)
    method = TestMethod(RandomTokens((1,), (1, 2)))
    assert_same(sparse(model, inputs, method), generate(model, inputs), tolerance=1e-5)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_every_cache_layer_holds_the_kept_tokens_only(name):
    model = build(name)
    inputs = make_inputs(name, model)
    tokens = RandomTokens((0, 2), (1,), share=0.6)
    with attached(model, TestMethod(tokens)), torch.no_grad():
        given = own_cache(name, model)
        cache = model(**inputs, past_key_values=given, use_cache=True).past_key_values
    kept = int(tokens.kept_after(image_mask(name, inputs))[2].sum())
    assert kept < inputs["input_ids"].shape[1]
    for layer, kind in zip(cache.layers, _layer_kinds(model), strict=True):
        if kind == "full_attention":
            assert layer.keys.shape[-2] == layer.values.shape[-2] == kept
        else:
            assert layer.keys.shape[-2] <= kept


@pytest.mark.parametrize(("name", "attention"), EVERY)
def test_detach_leaves_nothing_behind(name, attention):
    model = build(name, attention)
    inputs = make_inputs(name, model)
    dense = generate(model, inputs)
    before = fingerprint(model)
    tokens = RandomTokens((0, 2), (1,)) if FAMILIES[name].has_vision else None
    method = TestMethod(tokens, RandomNeurons((1,), True))
    with attached(model, method):
        assert fingerprint(model) != before
        generate(model, inputs)
    assert fingerprint(model) == before
    assert_same(generate(model, inputs), dense, tolerance=0)


def _layer_kinds(model) -> list[str]:
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    windowed = getattr(text, "sliding_window", None) is not None
    return ["sliding_attention" if windowed else "full_attention"] * text.num_hidden_layers


def fingerprint(model) -> dict:
    """Every attribute, hook and patch of a model's modules and of what they are made from."""
    marks: dict = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.endswith("_hooks") or key.startswith("_forward"):
                marks[name, key] = sorted(value, key=str) if isinstance(value, dict) else value
            elif callable(value):
                marks[name, key] = id(value)
            else:
                marks[name, key] = type(value)
    owners = {c for module in model.modules() for c in type(module).__mro__ if c is not object}
    for owner in owners | {transformers.masking_utils, transformers.generation.utils}:
        for key, value in vars(owner).items():
            if callable(value):
                marks[owner.__name__, key] = id(value)
    marks["generation_config"] = model.generation_config.to_dict()
    text = model.config.get_text_config()
    marks["config"] = (str(model.config), str(text), id(text), text._attn_implementation)
    return marks
