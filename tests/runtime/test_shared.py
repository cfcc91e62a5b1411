"""What a recording spares, and that nobody can tell."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from corematching.errors import InputError
from corematching.methods import method_from_text
from corematching.model.attention import find_attention
from corematching.runtime import attach, detach, record_prompt, replay_prompt
from tests.models import FAMILIES, VISION_FAMILIES, build, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod, generate

DEPTH = 4
METHODS = {
    "tokens": TestMethod(RandomTokens((1,), (1, 2))),
    "stages": TestMethod(RandomTokens((0, 2), (1, 2), share=0.6), RandomNeurons((1, 2), True)),
    "neurons": TestMethod(neurons=RandomNeurons((1, 2), True)),
}
PUBLISHED = (
    "corematching:keep=0.3,layer=1,beta=0.5", "corematching:layer=1,over=kept", "paper",
    "fastv:keep=0.3", "pyramiddrop", "sparsevlm:keep=0.3", "visionzip:keep=0.3", "prumerge",
    "divprune:keep=0.3", "cdpruner:keep=0.3", "projection:keep=0.3", "random:keep=1.0,beta=0.5",
    "stride:keep=0.3", "coreinfer", "griffin", "teal", "cats",
    "corematching:token_score=none,firing=0.2",
)  # fmt: skip


def record(model, inputs):
    run = attach(model, TestMethod(), "torch")
    with record_prompt(run, activations=True, inputs=True) as recording:
        generate(model, inputs, 1)
    detach(model)
    return recording


def answer(model, inputs, method, recording=None):
    """Its tokens and logits, and how often each layer's attention ran over a prompt."""
    runs = Counter()
    layers = model.get_decoder().layers
    attentions = [find_attention(layer) for layer in layers]
    originals = [attention.forward for attention in attentions]

    def count(index, original, *args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        runs[index] += hidden.shape[1] > 1
        return original(*args, **kwargs)

    for index, (attention, original) in enumerate(zip(attentions, originals, strict=True)):
        attention.forward = lambda *a, i=index, f=original, **k: count(i, f, *a, **k)
    run = attach(model, method, "torch")
    try:
        if recording is None:
            return generate(model, inputs), run.report, runs
        with replay_prompt(run, recording):
            return generate(model, inputs), run.report, runs
    finally:
        detach(model)
        for attention in attentions:
            del attention.forward


def assert_equal(ours, theirs):
    assert torch.equal(ours[0].tokens, theirs[0].tokens)
    torch.testing.assert_close(ours[0].logits, theirs[0].logits, rtol=0, atol=1e-6)
    for mine, other in zip(ours[1].samples, theirs[1].samples, strict=True):
        assert mine.keep_mask == other.keep_mask
        assert mine.prefill_flops == other.prefill_flops and mine.kv_bytes == other.kv_bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_a_replayed_prompt_gives_the_same(name, method):
    model = build(name, FAMILIES[name].attention[0])
    inputs = make_inputs(name, model, batch=2)
    recording = record(model, inputs)
    whole = answer(model, inputs, METHODS[method])
    assert_equal(answer(model, inputs, METHODS[method], recording), whole)


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_methods_cannot_tell(text):
    model = build("llava", "sdpa")
    inputs = make_inputs("llava", model, batch=2)
    method = method_from_text(text)
    whole = answer(model, inputs, method)
    assert_equal(answer(model, inputs, method, record(model, inputs)), whole)


def test_layers_up_to_the_first_cut_are_spared():
    model = build("llava", "sdpa")
    inputs = make_inputs("llava", model, batch=2)
    recording = record(model, inputs)
    runs = {name: answer(model, inputs, METHODS[name], recording)[2] for name in METHODS}
    assert runs["tokens"] == Counter({0: 0, 1: 0, 2: 1, 3: 1})
    assert runs["stages"] == Counter({0: 0, 1: 1, 2: 1, 3: 1})
    assert runs["neurons"] == Counter(dict.fromkeys(range(DEPTH), 0))


def test_a_layer_whose_attention_is_read_runs():
    model = build("llava", "sdpa")
    inputs = make_inputs("llava", model, batch=2)
    method = method_from_text("fastv:keep=0.3,layer=1")
    runs = answer(model, inputs, method, record(model, inputs))[2]
    assert runs[0] == 0 and runs[1] == 1


def test_another_prompt_is_refused():
    model = build("llava", "sdpa")
    recording = record(model, make_inputs("llava", model, batch=2))
    other = make_inputs("llava", model, batch=2)
    other["input_ids"][:, -1] += 1
    with pytest.raises(InputError, match="of another prompt"):
        answer(model, other, METHODS["tokens"], recording)
    assert not any("forward" in vars(layer) for layer in model.get_decoder().layers)


def test_nothing_stays_on_the_model():
    model = build("llava", "sdpa")
    inputs = make_inputs("llava", model, batch=2)
    answer(model, inputs, METHODS["stages"], record(model, inputs))
    for module in model.modules():
        assert "forward" not in vars(module) and "get_image_features" not in vars(module)
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert all("output_capturing" in hook.__qualname__ for hook in hooks), "not transformers'"


def test_a_sliding_window_that_forgot_tokens_is_not_recorded():
    model = build("gemma3", "sdpa")
    recording = record(model, make_inputs("gemma3", model, batch=2))
    assert len(recording.outputs) == len(recording.keys) < len(model.get_decoder().layers)
