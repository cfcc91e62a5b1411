"""Layers run in one call where that sees all that is asked, and else in parts, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from corematching import CoreMatching, Sparsifier
from corematching.backends.cpu.layer import LlamaLayer
from corematching.backends.cpu.native import PrefillLayer
from tests.chosen import neurons_of

pytestmark = pytest.mark.usefixtures("native_prompts")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NEURONS = {"token_score": None, "dense_first": 0, "dense_last": 0}


def build(kind="llama"):
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    return model(config(**SIZES)).to(torch.bfloat16).eval()


@pytest.fixture
def whole(monkeypatch):
    """Notes each layer that runs in one call."""
    runs, own = [], PrefillLayer.run

    def run(self, *args):
        runs.append(self)
        return own(self, *args)

    monkeypatch.setattr(PrefillLayer, "run", run)
    return runs


def prompt(batch=1, length=11):
    return torch.arange(batch * length).view(batch, length) * 7 % 97


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs).logits


def in_parts(monkeypatch):
    monkeypatch.setattr(LlamaLayer, "_goes_at_once", lambda *_: False)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_at_once_is_as_in_parts(kind, padded, cached, whole, monkeypatch):
    model, ids = build(kind), prompt(2)
    mask = torch.ones_like(ids)
    mask[0, :4] = int(not padded)
    found, kept = [], []
    with Sparsifier()(model):
        for expected in (3, 0):
            whole.clear()
            cache = DynamicCache(config=model.config)
            found.append(logits(model, input_ids=ids, attention_mask=mask, use_cache=cached,
                                past_key_values=cache if cached else None))  # fmt: skip
            kept.append([x for layer in cache.layers if cached for x in (layer.keys, layer.values)])
            assert len(whole) == expected
            in_parts(monkeypatch)
    assert torch.equal(*found)
    assert all(map(torch.equal, *kept))


def test_neurons_are_chosen_behind_a_layer(whole, monkeypatch):
    model, ids = build(), prompt()
    answers, chosen = [], []
    with CoreMatching(beta=0.6, firing=0.5, **NEURONS)(model) as run:
        for expected in (3, 0):
            whole.clear()
            answers.append(model.generate(ids, max_new_tokens=4, do_sample=False))
            chosen.append(neurons_of(run))
            assert len(whole) == expected
            in_parts(monkeypatch)
    assert torch.equal(*answers)
    for index, choice in chosen[0].items():
        assert torch.equal(choice.indices, chosen[1][index].indices)
        assert torch.equal(choice.gate_threshold, chosen[1][index].gate_threshold)


def test_caches_that_hold_something_are_read(whole):
    model, ids = build(), prompt(length=16)
    dense = logits(model, input_ids=ids)[:, 9:]
    with Sparsifier()(model):
        for cache in (DynamicCache(config=model.config), StaticCache(model.config, 16)):
            logits(model, input_ids=ids[:, :9], past_key_values=cache)
            whole.clear()
            ours = logits(model, input_ids=ids[:, 9:], past_key_values=cache)
            assert not whole
            assert (ours - dense).float().norm() < 2e-2 * dense.float().norm()


@pytest.mark.parametrize("place", ["mlp", "mlp.down_proj", "self_attn", "mlp.up_proj"])
def test_hooks_that_may_change_something_run_in_time(place, whole):
    model, ids = build(), prompt()

    def halve(module, args, kwargs):
        halved = {"hidden_states": kwargs["hidden_states"] / 2} if not args else {}
        return tuple(x / 2 for x in args), kwargs | halved

    module = model.model.layers[1].get_submodule(place)
    module.register_forward_pre_hook(halve, with_kwargs=True)
    expected = logits(model, input_ids=ids)
    with Sparsifier()(model):
        whole.clear()
        got = logits(model, input_ids=ids)
    assert len(whole) == 2
    assert (got - expected).float().norm() < 2e-2 * expected.float().norm()
