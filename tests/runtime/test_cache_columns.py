"""What a cache remembers of its prompts follows its columns; copies remember it, too."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache

from corematching.cache.pruned_cache import pruned_prompt_of
from corematching.errors import ConfigError, InputError, UnsupportedModelError
from corematching.runtime import attach, detach
from tests.models import IMAGE_ID, build, make_inputs
from tests.runtime.families import RandomNeurons, TestMethod, assert_same, generate
from tests.runtime.turns import ENGINES, by_hand, call, layer_by_layer, talking

CUTS = {
    "crop": lambda count: call("crop", -count),
    "by hand": lambda count: by_hand(lambda x: x[:, :, :-count]),
    "layer by layer": lambda count: layer_by_layer("crop", -count),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cut", CUTS)
def test_steps_go_on_in_front_of_what_was_cropped(cut, engine):
    with talking("means", engine) as turns:
        for _ in range(3):
            turns.feed()
        turns.cut(2, CUTS[cut](2))
        turns.check_each(1, 3)
        turns.cut(3, CUTS[cut](3))
        turns.check()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["weights", "neurons", "means", "limits", "late"])
def test_a_prompts_last_words_may_be_cropped(kind, engine):
    """They are fed again, as a turn behind a shorter prompt, which keeps the same image tokens."""
    with talking(kind, engine) as turns:
        turns.feed()
        seen = int(turns.cache.get_seq_length())
        turns.cut(1, call("crop", -3))
        assert int(turns.cache.get_seq_length()) == seen - 3
        words = turns.inputs["input_ids"][:, -2:]
        turns.mask = turns.mask[:, :-2]
        for name in ("input_ids", "attention_mask"):
            turns.inputs[name] = turns.inputs[name][:, :-2]
        turns.move([2, 0], call("batch_select_indices", [2, 0]))
        turns.draw = lambda length: words[[2, 0]]
        turns.check(2)
        del turns.draw
        turns.check()
        turns.check_answer()


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_and_columns_change_together(engine):
    with talking("means", engine) as turns:
        turns.feed()
        turns.feed()
        turns.move([2, 2, 0], call("batch_select_indices", torch.tensor([2, 2, 0])))
        turns.cut(1, call("crop", -1))
        turns.check()
        turns.move([1, 0], by_hand(lambda x: x[[1, 0]]))
        turns.cut(1, by_hand(lambda x: x[:, :, :-1]))
        turns.check()
        turns.check_answer()


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_without_a_mask_follow_rows_and_columns(engine):
    """Nothing but the cache says then that a step is another one than the one before it."""
    with talking("means", engine, lengths=[9, 9, 9]) as turns:
        turns.masked = False
        turns.check()
        turns.cut(1, call("crop", -1))
        turns.move([2, 0, 1], call("reorder_cache", torch.tensor([2, 0, 1])))
        turns.check()


def test_every_row_may_be_cropped_as_far_as_it_is_whole():
    """The image ends in another column of each row."""
    with talking("weights", "torch", lengths=[9, 14, 11]) as turns:
        far = [_whole_length(turns, row) for row in range(3)]
        assert len(set(far)) > 1
        for row, most in enumerate(far):
            cache = copy.deepcopy(turns.cache)
            cache.batch_select_indices([row])
            with pytest.raises(InputError, match="from which tokens were dropped"):
                cache.crop(-most - 1)
            cache.crop(-most)


def _whole_length(turns, row):
    """Tokens of a row behind the last one that was dropped."""
    image = turns.inputs["input_ids"][row] == IMAGE_ID
    kept = image.clone()
    kept[image] = turns.run.method.tokens.alive(row, int(image.sum()), 2)
    return len(image) - 1 - int((image & ~kept).nonzero().max())


@pytest.mark.parametrize("kind", ["means", "counts"])
def test_dropped_tokens_cannot_be_cropped_over(kind):
    with talking(kind, "auto") as turns:
        turns.feed()
        length = int(turns.cache.get_seq_length())
        stored = turns.cache.layers[0].keys.shape[2]
        for count in (stored - 1, stored, length - 1):
            with pytest.raises(InputError, match="from which tokens were dropped"):
                turns.cache.crop(-count)
        turns.check()
        by_hand(lambda x: x[:, :, :5])(turns.cache)
        with pytest.raises(InputError, match="cannot be told"):
            turns.feed()


def test_a_positive_number_is_refused_and_changes_nothing():
    with talking("means", "auto") as turns:
        turns.feed()
        with pytest.raises(ConfigError, match="with a minus"):
            turns.cache.crop(5)
        with pytest.raises(ValueError, match="with a minus"):
            turns.cache.crop(1)
        turns.cache.crop(0)
        turns.check()


@pytest.mark.parametrize("name", ["gemma3_window", "llava_mistral_window"])
def test_full_sliding_windows_cannot_be_cropped(name):
    """gemma3_window's layers differ: none may be cropped alone."""
    model = build(name)
    inputs = make_inputs(name, model, images=0, text_lengths=[6])
    cache = DynamicCache(config=model.config)
    attach(model, TestMethod(None, RandomNeurons((1,))))
    try:
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
            for _ in range(8):
                model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        before = [layer.keys.shape for layer in cache.layers]
        with pytest.raises(UnsupportedModelError, match="activate_past_recording"):
            cache.crop(-1)
        assert [layer.keys.shape for layer in cache.layers] == before
    finally:
        detach(model)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("empty", ["reset", "crop", "layer by layer"])
def test_an_emptied_cache_takes_any_prompt(empty, engine):
    """One without images leaves nothing of what was remembered before."""
    with talking("weights", engine) as turns:
        turns.feed()
        cache, length = turns.cache, int(turns.cache.get_seq_length())
        if empty == "reset":
            cache.reset()
        elif empty == "crop":
            cache.crop(-length)
        else:
            for layer in cache.layers:
                layer.reset()
        assert int(cache.get_seq_length()) == 0
        for images in (0, 1):
            inputs = make_inputs("llava", turns.model, batch=2, images=images, seed=3)
            turns.run.method.tokens.seeds = (1, 2)
            expected = generate(turns.model if images else turns.single, inputs)
            assert_same(generate(turns.model, inputs, past_key_values=cache), expected)
            assert pruned_prompt_of(cache).is_blank == (not images)
            cache.reset()


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("kind", ["means", "late"])
def test_copies_go_on_by_themselves(kind, make, engine):
    with talking(kind, engine) as turns:
        if kind != "late":
            turns.feed()
        original, mask = turns.cache, turns.mask
        fed = [list(row) for row in turns.fed]
        turns.cache = make(original)
        turns.move([2, 0], call("batch_select_indices", torch.tensor([2, 0])))
        turns.check()
        turns.check_answer()
        turns.cache, turns.mask, turns.rows, turns.fed = original, mask, [0, 1, 2], fed
        turns.check()
        turns.cache = make(turns.cache)
        turns.check()


def test_a_prompts_cache_is_read_once_for_many_questions():
    """The way prompts are kept for several continuations: copy, expand, decode."""
    with talking("product", "auto", batch=1) as turns:
        kept, mask = copy.deepcopy(turns.cache), turns.mask
        for rows in (2, 3, 1):
            turns.cache, turns.mask, turns.rows, turns.fed = copy.deepcopy(kept), mask, [0], [[]]
            turns.move([0] * rows, call("batch_repeat_interleave", rows))
            turns.check_each(2, 1)


def test_a_cache_cannot_be_rebuilt_from_its_keys():
    with talking("means", "auto") as turns:
        turns.feed()
        for rebuild in (list, DynamicCache, lambda cache: zip(*cache, strict=True)):
            with pytest.raises(UnsupportedModelError, match=r"copy\.deepcopy"):
                rebuild(turns.cache)
        turns.cache.reset()
        assert list(turns.cache)


def test_a_mask_that_does_not_reach_the_new_tokens_is_refused():
    """Such as one over the stored tokens only."""
    with talking("means", "auto") as turns, torch.no_grad():
        turns.feed()
        stored = turns.cache.layers[0].keys.shape[2]
        mask = torch.ones(3, stored + 1, dtype=torch.long)
        with pytest.raises(InputError, match="counts dropped tokens as well"):
            turns.model(input_ids=turns.draw(), attention_mask=mask, past_key_values=turns.cache)
        turns.check()


def test_a_mask_with_room_for_later_tokens_fits():
    with talking("means", "auto", batch=1) as turns, torch.no_grad():
        ids, long = turns.draw(), torch.ones(1, turns.mask.shape[1] + 9, dtype=torch.long)
        expected = turns.model(input_ids=ids, past_key_values=copy.deepcopy(turns.cache)).logits
        found = turns.model(input_ids=ids, attention_mask=long, past_key_values=turns.cache).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
