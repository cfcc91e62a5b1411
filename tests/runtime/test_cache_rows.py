"""What a cache remembers of its prompts follows its rows, or the operation is refused."""

from __future__ import annotations

import pytest
import torch

from tests.models import build, image_mask, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod
from tests.runtime.reference import hidden_tokens, overwritten_neurons
from tests.runtime.turns import (
    BATCH,
    ENGINES,
    KINDS,
    assert_close,
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
        turns.check_each(1, 1, 3, 1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("move", MOVES)
def test_steps_follow_the_rows(move, engine):
    run_a_move("means", move, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("move", ["select a tensor", "repeat by hand"])
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
        turns.check_each(1, 3, 1)


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
        turns.check_each(1, 2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("move", ["select by a mask", "slice by hand"])
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
        ffn, token = run._session.sparse[1], torch.full((4, 1), 9)
        taken = []

        def step(order):
            before, ffn.gathers = ffn.bytes_read(4), 0
            cache.reorder_cache(torch.tensor(order))
            with torch.no_grad():
                model(input_ids=token, past_key_values=cache)
            taken.append(ffn.gathers)
            assert ffn.bytes_read(4) == before

        materialize = ffn._materialize

        def counted(*args):
            ffn.gathers += 1
            materialize(*args)

        ffn._materialize = counted
        for order in ([1, 0, 3, 2], [0, 0, 3, 3], [2, 3, 0, 1], [1, 0, 3, 3]):
            step(order)
        assert taken == [0, 0, 1, 0]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_beams_equal_the_references_beams(name):
    model, seeds = build(name), (1, 1, 1, 2, 2, 2)
    inputs = make_inputs(name, model, batch=2)
    method = TestMethod(RandomTokens((1,), seeds, share=0.5), RandomNeurons(seeds, True))
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    dense, prompt = build(name, "eager"), inputs["input_ids"].shape[1]
    image, valid = (
        x.repeat_interleave(3, dim=0) for x in (image_mask(name, inputs), inputs["attention_mask"])
    )
    choices = method.tokens.kept_after(image), method.tokens.weights_after(image)
    with (
        hidden_tokens(dense, valid, *choices),
        overwritten_neurons(dense, prompt, method.neurons.masks(dense)),
    ):
        expected = dense.generate(**inputs, **options, use_cache=False)
    with at_work(model, method, "auto") as run:
        assert torch.equal(model.generate(**inputs, **options), expected)
    assert [s.image_tokens for s in run.report.samples] == [16, 16]


@pytest.mark.parametrize("engine", ENGINES)
def test_beams_follow_the_row_that_they_come_from(engine):
    """All of them come from the first row, whatever the others would have chosen."""
    model = build("llava")
    inputs = make_inputs("llava", model)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    found = []
    for seeds in ((1, 1, 1), (1, 2, 3)):
        with at_work(model, TestMethod(None, RandomNeurons(seeds, True)), engine):
            found.append(model.generate(**inputs, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_move_inside_generate(engine):
    """Where a decoding loop of the caller's own does it."""
    moves = [None, None, None, [1, 1, 0], None, [2, 0, 1], [0, 0, 0], None]
    ids = torch.randint(5, 50, (len(moves), BATCH, 1), generator=torch.Generator().manual_seed(1))

    def decode(model, input_ids, kwargs):
        cache, mask, logits = kwargs["past_key_values"], torch.ones_like(input_ids), []
        prompt = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        model(**prompt)
        for rows, new in zip(moves, ids, strict=True):
            if rows is not None:
                cache.reorder_cache(torch.tensor(rows))
            mask = torch.cat([mask, torch.ones(BATCH, 1, dtype=torch.long)], 1)
            step = model.prepare_inputs_for_generation(
                new, past_key_values=cache, attention_mask=mask, use_cache=True
            )
            logits.append(model(**step).logits[:, -1])
        return torch.stack(logits)

    with talking("means", "torch", lengths=[9, 9, 9]) as turns:
        turns.masked, expected = False, []
        for rows, new in zip(moves, ids, strict=True):
            if rows is not None:
                turns.move(rows, call("reorder_cache", torch.tensor(rows)))
            turns.draw = lambda length, new=new: new
            expected.append(turns.feed())
        inputs = turns.inputs
    model = build("llava")
    with at_work(model, make_method("means"), engine):
        found = []

        def keep(model, input_ids, **kwargs):
            for name in ("logits_processor", "stopping_criteria", "generation_config"):
                del kwargs[name]
            found.append(decode(model, input_ids, kwargs))
            return input_ids

        model.generate(**inputs, custom_generate=keep, max_new_tokens=20)
    assert_close(found[0], torch.stack(expected))


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
