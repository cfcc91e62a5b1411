"""Rows that a pruned prompt's cache cannot follow are refused, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from corematching.errors import ConfigError, InputError, UnsupportedModelError
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import RandomNeurons, TestMethod
from tests.runtime.turns import ENGINES, answer, at_work, by_hand, call, make_method, talking

WRONG_MOVES = {
    "a row beyond the last": (InputError, call("batch_select_indices", torch.tensor([0, 3]))),
    "a mask of another length": (
        InputError,
        call("batch_select_indices", torch.tensor([True, False])),
    ),
    "no row": (InputError, call("batch_select_indices", torch.tensor([], dtype=torch.long))),
    "a number": (InputError, call("batch_select_indices", 1)),
    "two dimensions": (InputError, call("batch_select_indices", torch.tensor([[0, 1]]))),
    "halves": (InputError, call("batch_select_indices", torch.tensor([0.5]))),
    "beams beyond the last": (InputError, call("reorder_cache", torch.tensor([5, 0, 0]))),
    "no repetition": (ConfigError, call("batch_repeat_interleave", 0)),
    "repetitions of other rows": (
        ConfigError,
        call("batch_repeat_interleave", torch.tensor([1, 2])),
    ),
}


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("wrong", WRONG_MOVES)
def test_what_is_no_row_is_refused_and_changes_nothing(wrong, engine):
    error, change = WRONG_MOVES[wrong]
    with talking("means", engine) as turns:
        turns.feed()
        with pytest.raises(error):
            change(turns.cache)
        turns.check()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["means", "neurons", "weights"])
def test_a_step_of_other_rows_is_refused_and_changes_nothing(kind, engine):
    with talking(kind, engine) as turns, torch.no_grad():
        turns.feed()
        for rows in (1, 2, 6):
            for length in (1, 2):
                with pytest.raises(InputError, match=f"{rows} rows of new tokens .* cache of 3"):
                    turns.model(
                        input_ids=torch.full((rows, length), 9), past_key_values=turns.cache
                    )
        with pytest.raises(InputError, match="6 rows of new tokens do not fit a cache of 3"):
            ids, mask = turns.draw(2), torch.cat([turns.mask, torch.ones(3, 2).long()], 1)
            answer(turns.model, ids, mask, turns.cache, 2, num_beams=2)
        turns.check()


def test_a_mask_of_other_rows_is_refused_and_changes_nothing():
    with talking("means", "auto") as turns, torch.no_grad():
        turns.feed()
        turns.move([1], call("batch_select_indices", [1]))
        wide = torch.ones(3, turns.mask.shape[1] + 1, dtype=torch.long)
        with pytest.raises(InputError, match="mask of 3 rows does not fit a cache of 1"):
            turns.model(input_ids=turns.draw(), attention_mask=wide, past_key_values=turns.cache)
        turns.check()


@pytest.mark.parametrize("engine", ENGINES)
def test_keys_of_nobody_are_refused(engine):
    """Other prompts' keys, or a prompt's keys moved along."""
    for change in (lambda x: x + 1, lambda x: x.roll(1, 2), lambda x: torch.cat([x, x + 1])):
        with talking("means", engine) as turns:
            turns.feed()
            by_hand(change)(turns.cache)
            with pytest.raises(InputError, match="cannot be told"):
                turns.feed()


def test_keys_of_one_row_may_change_where_nothing_depends_on_them():
    """One prompt without weights or filler: its columns may be edited, as without a method."""
    with talking("neurons", "torch", batch=1) as turns:
        turns.feed()
        by_hand(lambda x: x * 1.5)(turns.cache)
        turns.feed()


def test_ffns_refuse_rows_that_they_have_no_neurons_for():
    """Also where somebody calls the decoder without the model around it."""
    model = build("llava")
    for engine in ("torch", "auto"):
        with at_work(model, make_method("neurons"), engine), torch.no_grad():
            cache = model(**make_inputs("llava", model, batch=3), use_cache=True).past_key_values
            decoder = model.get_decoder()
            decoder(input_ids=torch.full((3, 1), 9), past_key_values=cache)
            other = DynamicCache(config=model.config)
            with pytest.raises(InputError, match="chosen for 3 samples, and tokens of 1 rows"):
                decoder(input_ids=torch.full((1, 1), 9), past_key_values=other)


def static(model):
    return StaticCache(config=model.config, max_cache_len=64)


@pytest.mark.parametrize("kind", ["means", "counts", "limits"])
def test_static_caches_are_reordered_and_refuse_other_moves(kind):
    with talking(kind, "auto", cache=static) as turns:
        turns.feed()
        for name, argument in (
            ("batch_select_indices", torch.tensor([0])),
            ("batch_repeat_interleave", 2),
            ("crop", -1),
        ):
            with pytest.raises(UnsupportedModelError, match=f"{name}.*use a DynamicCache"):
                getattr(turns.cache, name)(argument)
        turns.move([2, 0, 0], call("reorder_cache", torch.tensor([2, 0, 0])))
        turns.check()
        turns.check(2)
        by_hand(lambda x: x[:2])(turns.cache)
        with pytest.raises(InputError, match="cannot be told"):
            turns.feed()


def test_compiled_steps_refuse_rows_that_they_have_no_neurons_for():
    torch._dynamo.reset()
    with talking("means", "auto", cache=static) as turns:
        step = torch.compile(turns.model, backend="aot_eager", fullgraph=True)
        turns.check()
        turns.check(1, step)
        turns.move([2, 0, 0], call("reorder_cache", torch.tensor([2, 0, 0])))
        with pytest.raises(RuntimeError, match="a compiled step cannot take neurons"):
            turns.feed(1, step)
        turns.check()
        with torch.no_grad():
            turns.model(**turns.inputs, use_cache=True)
        with pytest.raises(RuntimeError, match="a compiled step cannot take neurons"):
            turns.feed(1, step)


def test_neurons_of_another_method_are_refused():
    model = build("llava")
    inputs = make_inputs("llava", model)
    attach(model, TestMethod(None, RandomNeurons((1,), share=0.4)))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    detach(model)
    attach(model, TestMethod(None, RandomNeurons((1,), share=0.6)))
    try:
        with torch.no_grad(), pytest.raises(InputError, match="the method that read the prompt"):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    finally:
        detach(model)


def test_labels_are_refused_and_the_conversation_keeps_its_neurons():
    with talking("means", "auto") as turns:
        turns.feed()
        with pytest.raises(InputError, match="labels"):
            turns.model(**turns.inputs, labels=turns.inputs["input_ids"])
        turns.check()
