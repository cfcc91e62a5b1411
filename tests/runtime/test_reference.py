"""The reference itself: it must obey the dense model, and hide what it says it hides."""

from __future__ import annotations

import pytest
import torch

from corematching.backends.sparse_ffn import SparseFFN
from corematching.model.ffn import find_ffn
from tests.models import FAMILIES, VISION_FAMILIES, build, image_mask, make_inputs
from tests.runtime.families import (
    STEPS,
    RandomNeurons,
    RandomTokens,
    TestMethod,
    assert_same,
    generate,
    reference,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_without_a_choice_is_the_dense_model(name):
    model = build(name)
    inputs = make_inputs(name, model, batch=2)
    assert_same(generate(model, inputs), reference(name, inputs, TestMethod()), tolerance=1e-5)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_a_token_dropped_before_the_first_layer_does_not_count(name):
    model = build(name, "eager")
    inputs = make_inputs(name, model)
    method = TestMethod(RandomTokens((-1,), (1,)))
    dropped = ~method.tokens.kept_after(image_mask(name, inputs))[-1]
    before = reference(name, inputs, method)
    disturbed = _disturb(name, inputs, dropped, method)
    assert_same(disturbed, before, tolerance=1e-6)
    with pytest.raises(AssertionError):
        assert_same(_disturb(name, inputs, dropped, TestMethod()), before)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_the_reference_that_keeps_everything_is_the_dense_model(name):
    model = build(name)
    inputs = make_inputs(name, model, batch=2)
    method = TestMethod(RandomTokens((0, 2), (1, 2), share=1.1))
    assert_same(generate(model, inputs), reference(name, inputs, method), tolerance=1e-5)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "qwen3", "mistral_window"])
def test_compact_ffns_alone_equal_the_reference(name, compensated):
    """Without `attach`: the choices are set by hand between prefill and decode."""
    model = build(name)
    inputs = make_inputs(name, model, batch=2)
    policy = RandomNeurons((1, 2), compensated)
    layers = model.get_decoder().layers
    counts = policy.counts(len(layers), find_ffn(layers[0]).down_proj.in_features)
    ffns = [SparseFFN(find_ffn(layer), n) for layer, n in zip(layers, counts, strict=True)]
    for layer, ffn in enumerate(ffns):
        ffn.install()
        ffn.take(policy.pick(layer, ffn.width, ffn.count))
        ffn.gather()
    expected = reference(name, inputs, TestMethod(neurons=policy), STEPS)
    assert_same(generate(model, inputs), expected)
    for ffn in ffns:
        ffn.remove()
    dense = generate(model, inputs)
    assert not torch.allclose(dense.logits, expected.logits, atol=1e-2)


def _disturb(name, inputs, dropped, method):
    """The reference with other embeddings on the dropped tokens."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(*dropped.shape, 64, generator=rng) * dropped[..., None]

    def disturb(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.cat(
            [hidden[:, : noise.shape[1]] + 5 * noise, hidden[:, noise.shape[1] :]], dim=1
        )
        return (hidden, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

    return reference(name, inputs, method, before_first_layer=disturb)
