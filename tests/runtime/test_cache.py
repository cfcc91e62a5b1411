"""Caches that were shortened still count right, whatever is done to them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from corematching.cache.layers import (
    check_cache,
    compact,
    is_fresh,
    short_mask,
    store,
    widen_sliding_layers,
)
from corematching.cache.pruned_cache import pruned_prompt_of, remember
from corematching.cache.pruned_prompt import PrunedPrompt
from corematching.errors import UnsupportedModelError
from corematching.protocol import NeuronChoice
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import RandomTokens, TestMethod


def filled(cache, length=6, layers=2, batch=2):
    """Keys and values that hold their position."""
    x = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1).expand(batch, 2, -1, 4)
    for layer in range(layers):
        cache.update(x.clone(), x.clone(), layer)
    return cache


def static_cache(length=10):
    config = build("llama", num_hidden_layers=2).config
    return StaticCache(config=config, max_cache_len=length)


ORDER = torch.tensor([[0, 2, 5], [1, 3, 4]])


class CountingCache(DynamicCache):
    """A cache whose own ``update`` has to be called."""

    updates = 0

    def update(self, *args, **kwargs):
        self.updates += 1
        return super().update(*args, **kwargs)


@pytest.mark.parametrize("make", [DynamicCache, static_cache, CountingCache])
def test_storing_does_what_updating_does(make):
    ours, theirs = make(), make()
    for length in (3, 2):
        for layer in range(2):
            key, value = torch.randn(2, 2, 2, length, 4).unbind()
            got, expected = store(ours, key, value, layer), theirs.update(key, value, layer)
            assert all(map(torch.equal, got, expected))
    assert int(ours.get_seq_length()) == int(theirs.get_seq_length()) == 5
    kinds = [
        {name: type(x) for name, x in vars(cache.layers[1]).items()} for cache in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]
    assert getattr(ours, "updates", 4) == 4


def test_an_empty_dynamic_layer_keeps_what_it_is_given():
    config = build("llama", num_hidden_layers=2).config
    cache, (key, value) = DynamicCache(config=config), torch.randn(2, 1, 2, 3, 4).unbind()
    got = store(cache, key, value, 1)
    assert got[0] is key and cache.layers[1].keys is key and cache.layers[1].values is value
    assert cache.get_seq_length(0) == 0 and cache.get_seq_length(1) == 3


@pytest.mark.parametrize("make", [DynamicCache, static_cache])
def test_compacting_keeps_the_ordered_tokens_of_the_first_layers(make):
    cache = filled(make())
    before = cache.layers[0].keys.data_ptr()
    compact(cache, 1, ORDER)
    assert cache.layers[0].keys[:, 0, :3, 0].tolist() == ORDER.tolist()
    assert cache.layers[0].values[:, 0, :3, 0].tolist() == ORDER.tolist()
    assert int(cache.get_seq_length(0)) == 3 and int(cache.get_seq_length(1)) == 6
    if make is static_cache:
        assert cache.layers[0].keys.data_ptr() == before
    more = torch.full((2, 2, 1, 4), 9.0)
    keys, _ = cache.update(more, more, 0)
    assert keys[:, 0, :4, 0].tolist() == [[0, 2, 5, 9], [1, 3, 4, 9]]


def test_compacting_a_sliding_layer_keeps_its_count():
    cache = filled(DynamicCache(config=build("mistral_window", sliding_window=8).config))
    compact(cache, 2, ORDER)
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer
    assert cache.layers[0].cumulative_length == 3


@pytest.mark.parametrize("make", [DynamicCache, static_cache])
def test_positions_count_dropped_tokens_and_masks_do_not(make):
    cache = filled(make())
    compact(cache, 2, ORDER)
    remember(cache, PrunedPrompt(torch.ones(2, 3, dtype=torch.bool), 6, 3))
    assert isinstance(cache, DynamicCache if make is DynamicCache else StaticCache)
    assert int(cache.get_seq_length()) == 6 and int(cache.get_query_offset()) == 3
    expected = 4 if make is DynamicCache else 10
    assert cache.get_mask_sizes(1, 0) == (expected, 0)


def test_a_copy_counts_on_its_own():
    cache = filled(DynamicCache())
    compact(cache, 2, ORDER)
    remember(cache, PrunedPrompt(torch.ones(2, 3, dtype=torch.bool), 6, 3))
    other = copy.deepcopy(cache)
    filled(cache, length=1)
    assert (cache.get_seq_length(), other.get_seq_length()) == (7, 6)
    assert other.pruned_prompt.valid is not cache.pruned_prompt.valid


def test_the_memory_follows_the_samples():
    cache = filled(DynamicCache())
    valid = torch.tensor([[True] * 3, [False, True, True]])
    choice = NeuronChoice(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1.0], [2.0]]))
    remember(cache, PrunedPrompt(valid, 6, 0, {1: choice}))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.pruned_prompt.valid[:, 0].tolist() == [False, False]
    assert cache.pruned_prompt.choice(1).indices.tolist() == [[2, 3], [2, 3]]
    cache.batch_repeat_interleave(2)
    assert cache.pruned_prompt.choice(1).mean.flatten().tolist() == [2.0] * 4
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.pruned_prompt.valid.shape == (1, 3) and cache.layers[0].keys.shape[0] == 1


@pytest.mark.parametrize("make", [DynamicCache, static_cache])
def test_a_reset_cache_is_fresh(make):
    cache = filled(make())
    remember(cache, PrunedPrompt(torch.ones(2, 6, dtype=torch.bool), 6, 3))
    assert not is_fresh(cache, 5)
    cache.reset()
    assert is_fresh(cache, 5) and int(cache.get_seq_length()) == 0
    assert pruned_prompt_of(cache).neurons == {}


def test_a_static_cache_can_be_used_again():
    model = build("llava")
    cache = StaticCache(config=model.config, max_cache_len=40)
    attach(model, TestMethod(RandomTokens((1,), (1,))))
    results = []
    for seed in (1, 2, 1):
        cache.reset()
        with torch.no_grad():
            inputs = make_inputs("llava", model, seed=seed)
            results.append(model(**inputs, past_key_values=cache).logits[:, -1])
    detach(model)
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_short_masks():
    valid = torch.tensor([[True] * 3, [False, True, True]])
    memory = PrunedPrompt(valid, 6, 3)
    whole = torch.ones(2, 8, dtype=torch.long)
    assert short_mask(memory, whole, 8).tolist() == [[1] * 5, [0, 1, 1, 1, 1]]
    assert short_mask(memory, None, 6).tolist() == [[1] * 3, [0, 1, 1]]
    assert short_mask(PrunedPrompt(valid[:1], 6, 3), None, 8) is None


def test_sliding_layers_are_widened_where_the_prompt_overflows_them():
    config = build("gemma3_window").config
    dynamic = DynamicCache(config=config)
    widen_sliding_layers(dynamic, 11)
    assert type(dynamic.layers[0]) is DynamicSlidingWindowLayer
    widen_sliding_layers(dynamic, 12)
    assert {type(layer) for layer in dynamic.layers} == {DynamicLayer}
    static = StaticCache(config=config, max_cache_len=30)
    widen_sliding_layers(static, 13)
    assert [type(layer) for layer in static.layers] == [StaticLayer] * 4
    assert {layer.max_cache_len for layer in static.layers} == {30}


def test_a_static_cache_of_sliding_layers_only_cannot_be_widened():
    static = StaticCache(config=build("mistral_window").config, max_cache_len=30)
    with pytest.raises(UnsupportedModelError, match="sliding windows hold 6"):
        widen_sliding_layers(static, 13)
    widen_sliding_layers(static, 13, capacity=20)
    assert static.layers[0].max_cache_len == 20


def test_odd_caches_are_refused():
    cache = DynamicCache()
    check_cache(cache)
    cache.layers = [DynamicIndexedLayer()]
    with pytest.raises(UnsupportedModelError, match="DynamicIndexedLayer"):
        check_cache(cache)
    with pytest.raises(UnsupportedModelError, match="QuantizedCache"):
        odd = object.__new__(QuantizedCache)
        odd.layers = []
        check_cache(odd)
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(UnsupportedModelError, match="off-loaded"):
        check_cache(cache)


def test_an_offloaded_cache_is_refused_in_a_forward():
    model = build("llava")
    attach(model, TestMethod(RandomTokens((1,), (1,))))
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(UnsupportedModelError, match="off-loaded"):
        model(**make_inputs("llava", model), past_key_values=cache)
    detach(model)
