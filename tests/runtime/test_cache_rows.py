"""What a cache remembers of its prompts follows its rows, or the operation is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from corematching.errors import ConfigError, InputError, UnsupportedModelError
from corematching.runtime import attach, detach
from tests.models import build, make_inputs
from tests.runtime.families import RandomNeurons, TestMethod
from tests.runtime.turns import (
    BATCH,
    ENGINES,
    KINDS,
    answer,
    at_work,
    by_hand,
    call,
    layer_by_layer,
    make_method,
    talking,
)

MOVES = {
    "select a tensor": ([2, 0], call("batch_select_indices", torch.tensor([2, 0]))),
    "select a list": ([1], call("batch_select_indices", [1])),
    "select one": ([2], call("batch_select_indices", torch.tensor([2]))),
    "select from behind": ([2, 1], call("batch_select_indices", torch.tensor([-1, -2]))),
    "select by a mask": (
        [0, 2],
        call("batch_select_indices", torch.tensor([True, False, True])),
    ),
    "select by a list of bool": ([1, 2], call("batch_select_indices", [False, True, True])),
    "select repeatedly": ([1, 1, 0, 1], call("batch_select_indices", torch.tensor([1, 1, 0, 1]))),
    "repeat": ([0, 0, 1, 1, 2, 2], call("batch_repeat_interleave", 2)),
    "repeat unequally": (
        [0, 1, 1, 2],
        call("batch_repeat_interleave", torch.tensor([1, 2, 1])),
    ),
    "reorder": ([2, 0, 1], call("reorder_cache", torch.tensor([2, 0, 1]))),
    "reorder to two": ([1, 1], call("reorder_cache", torch.tensor([1, 1]))),
    "by hand": ([2, 1, 0], by_hand(lambda x: x[[2, 1, 0]])),
    "slice by hand": ([1, 2], by_hand(lambda x: x[1:])),
    "repeat by hand": ([0, 1, 2, 0, 1, 2], by_hand(lambda x: x.repeat(2, 1, 1, 1))),
    "layer by layer": ([1, 0], layer_by_layer("batch_select_indices", torch.tensor([1, 0]))),
    "reorder layer by layer": ([0, 2, 2], layer_by_layer("reorder_cache", torch.tensor([0, 2, 2]))),
}


def run_a_move(kind, move, engine):
    rows, change = MOVES[move]
    with talking(kind, engine) as turns:
        turns.feed()
        turns.move(rows, change)
        for length in (1, 1, 3, 1):
            turns.check(length)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("move", MOVES)
def test_steps_follow_the_rows(move, engine):
    run_a_move("means", move, engine)


@pytest.mark.parametrize("engine", ["torch", "auto", "replayed"])
@pytest.mark.parametrize("move", ["select a tensor", "repeat", "reorder", "by hand"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "means"])
def test_every_kind_of_choice_follows_the_rows(kind, move, engine):
    run_a_move(kind, move, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["means", "limits", "counts"])
def test_one_prompt_is_expanded_to_four_rows(kind, engine):
    """By hand, as strided views of one row."""
    with talking(kind, engine, batch=1) as turns:
        turns.feed()
        turns.move([0] * 4, by_hand(lambda x: x.expand(4, -1, -1, -1)))
        for length in (1, 3, 1):
            turns.check(length)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_move_right_behind_the_prompt(engine):
    for move in ("select a tensor", "repeat by hand"):
        rows, change = MOVES[move]
        with talking("late", engine) as turns:
            turns.move(rows, change)
            turns.check()


@pytest.mark.parametrize("engine", ENGINES)
def test_moves_follow_each_other(engine):
    moves = ["repeat", "by hand", "reorder to two", "repeat unequally"]
    with talking("means", engine) as turns:
        for name in moves[:1] * 2:
            rows = [row for row in range(len(turns.rows)) for _ in range(2)]
            turns.move(rows, MOVES[name][1])
        turns.move([11, 0, 5], call("batch_select_indices", torch.tensor([11, 0, 5])))
        turns.check()
        for name in moves[1:3]:
            turns.move(*MOVES[name])
        turns.move([0, 1, 1], call("batch_repeat_interleave", torch.tensor([1, 2])))
        turns.check()
        turns.check(2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("move", ["select by a mask", "repeat", "slice by hand"])
@pytest.mark.parametrize("kind", ["means", "product"])
def test_generate_goes_on_from_moved_rows(kind, move, engine):
    with talking(kind, engine) as turns:
        turns.feed()
        turns.move(*MOVES[move])
        turns.check_answer()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llava_mistral_window", "gemma3_window", "gemma3"])
def test_sliding_windows_follow_the_rows(name, engine):
    """They keep some layers' latest tokens only; some of the caches have layers of both kinds."""
    if engine == "native":
        pytest.skip("it decodes in PyTorch")
    for move in ("select repeatedly", "by hand"):
        with talking("means", engine, name) as turns:
            turns.feed()
            turns.move(*MOVES[move])
            turns.check()


@pytest.mark.parametrize("engine", ENGINES)
def test_two_caches_keep_their_own_rows(engine):
    with talking("means", engine) as turns:
        other = make_inputs("llava", turns.model, batch=BATCH, seed=4)
        with torch.no_grad():
            cache = turns.model(**other, use_cache=True).past_key_values
        turns.move(*MOVES["reorder to two"])
        turns.check()
        cache.batch_select_indices([2])
        with torch.no_grad():
            turns.model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        turns.check()


def test_beams_that_chose_alike_take_no_neurons_again():
    """A reordering within a prompt's beams does not gather weights anew; across prompts it does."""
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    wide = {k: v.repeat_interleave(2, dim=0) for k, v in inputs.items()}
    with at_work(model, TestMethod(None, RandomNeurons((1, 1, 2, 2), True)), "torch") as run:
        with torch.no_grad():
            cache = model(**wide, use_cache=True).past_key_values
        ffn, token = run._engine.sparse[1], torch.full((4, 1), 9)
        taken = []

        def step(order):
            before, ffn.gathers = ffn.bytes_read(4), 0
            cache.reorder_cache(torch.tensor(order))
            with torch.no_grad():
                model(input_ids=token, past_key_values=cache)
            taken.append(ffn.gathers)
            assert ffn.bytes_read(4) == before

        settle = ffn._settle

        def counted(*args):
            ffn.gathers += 1
            settle(*args)

        ffn._settle = counted
        for order in ([1, 0, 3, 2], [0, 0, 3, 3], [2, 3, 0, 1], [1, 0, 3, 3]):
            step(order)
        assert taken == [0, 0, 1, 0]


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
        turns.check(1, step)
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


def test_reports_of_a_further_turn_follow_the_rows():
    with talking("means", "auto") as turns:
        first = turns.run.report.samples
        turns.move([2, 0, 2, 2], call("batch_select_indices", [2, 0, 2, 2]))
        turns.feed(2)
        report = turns.run.report
        assert report.continued and len(report.samples) == 4
        for sample, row in zip(report.samples, (2, 0, 2, 2), strict=True):
            assert sample.keep_mask == first[row].keep_mask
            assert sample.cuts == first[row].cuts
