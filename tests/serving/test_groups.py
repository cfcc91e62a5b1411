"""Rows that decode together get the logits that `generate` gives each alone, in every family."""

from __future__ import annotations

import pytest
import torch

from corematching import CoreMatching, Dense, GateThreshold, Sparsifier, TopNeurons
from corematching.serving.choices import ChoiceForm
from corematching.serving.features import FeatureCache
from corematching.serving.groups import Row, SlotGroup, TurnGroup
from corematching.serving.observer import Observer
from corematching.serving.prompt import PromptReader
from tests.models import FAMILIES, TEXT_FAMILIES, build, make_inputs

STEPS = 4
WORDS = [9, 14, 11]
WINDOWS = ("gemma2", "gemma3", "gemma4", "gemma4_per_layer", "paligemma2")
NO_GATE = ("llava_neox",)
METHODS = {
    "default": CoreMatching(0.5),
    "staged": CoreMatching(0.15),
    "chosen for the answer": CoreMatching(
        0.5, neurons=TopNeurons(0.5, dense_first=1, dense_last=0)
    ),
    "tokens only": CoreMatching(0.5, neurons=None),
    "paper": CoreMatching.paper(),
    "dense": Dense(),
}


def inputs_of(name, model):
    return [
        make_inputs(name, model, images=1 + i % 2, text_lengths=[words], seed=i)
        for i, words in enumerate(WORDS)
    ]


def generate(model, inputs, steps=STEPS):
    """Tokens and logits (steps, V)."""
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, torch.cat(out.logits)


def make_rows(run, prompts, most=64):
    reader = PromptReader(run, FeatureCache(run.model, 0, Observer()))
    read = [reader.read(prompt, None) for prompt in prompts]
    form = ChoiceForm(read[0].neurons, dict(enumerate(run.spec.widths)))
    return [Row(prompt, form.fill(prompt.neurons), prompt.kept + most) for prompt in read]


def group_for(run, row):
    return SlotGroup(run.model) if row.prompt.is_plain else TurnGroup(run.model)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_rows_of_every_family_decode_as_generate_does(name):
    text = name in TEXT_FAMILIES
    neurons = TopNeurons(0.5) if name in NO_GATE else GateThreshold()
    _compare(name, Sparsifier(neurons=neurons) if text else CoreMatching(0.5, neurons=neurons))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_rows_of_every_method_decode_as_generate_does(method, engine):
    _compare("llava", method, engine)


def _compare(name, method, engine="torch"):
    model = build(name)
    prompts = inputs_of(name, model)
    with torch.inference_mode(), method(model, engine) as run:
        expected = [generate(model, prompt) for prompt in prompts]
        rows = make_rows(run, prompts)
        assert rows[0].prompt.is_plain == (not name.endswith("_window") and name not in WINDOWS)
        group = group_for(run, rows[0])
        for row, (_, logits) in zip(rows, expected, strict=True):
            torch.testing.assert_close(row.prompt.logits, logits[0], rtol=1e-4, atol=1e-4)
            group.add(row)
        for step in range(1, STEPS):
            out = group.step([tokens[step - 1] for tokens, _ in expected])
            due = torch.stack([logits[step] for _, logits in expected])
            torch.testing.assert_close(out, due, rtol=1e-3, atol=1e-3)


def test_rows_join_and_leave():
    model = build("llava")
    prompts = inputs_of("llava", model)
    with torch.inference_mode(), CoreMatching(0.5)(model) as run:
        expected = [generate(model, prompt, 80) for prompt in prompts]
        rows = make_rows(run, prompts, most=80)
        group, done, sizes = SlotGroup(model), [1, 1, 1], []
        for step in range(140):
            if step in (0, 3, 45):
                group.add(rows[{0: 0, 3: 1, 45: 2}[step]])
            if step == 20:
                group.remove(rows[0])  # and the slot is taken out
            places = [rows.index(row) for row in group.rows]
            out = group.step([expected[i][0][done[i] - 1] for i in places])
            sizes.append(group._cache.rows)
            for index, logits in zip(places, out, strict=True):
                due = expected[index][1][done[index]]
                torch.testing.assert_close(logits, due, rtol=1e-3, atol=1e-3)
                done[index] += 1
                if done[index] == 80:
                    group.remove(rows[index])
            if not group.rows:
                break
        assert done == [21, 80, 80]
        assert (sizes[0], sizes[3], sizes[20], sizes[44], sizes[45]) == (1, 2, 2, 1, 2)
        assert group.columns_with() == 0 and SlotGroup(model).columns_with(65, 2) == 256


def test_a_row_gets_the_same_bits_in_any_batch(scene, questions):
    """In bfloat16, with compiled kernels that compute rows independently."""
    reader, loaded = scene._reader, scene.loaded
    if not scene._run._session.backend.stats().native_layers:
        pytest.skip("no compiled kernels here")
    encoded = [scene._encode(scene_turns(each), 8) for each in questions[:3]]
    logits = {}
    for together in (False, True):
        with torch.inference_mode():
            prompts = [reader.read(inputs, None) for inputs in encoded]
            rows = [Row(prompt, prompt.neurons, prompt.kept + 8) for prompt in prompts]
            groups = [SlotGroup(loaded.model) for _ in range(1 if together else len(rows))]
            for index, row in enumerate(rows):
                groups[index % len(groups)].add(row)
            seen = []
            tokens = [int(prompt.logits.argmax()) for prompt in prompts]
            for _ in range(3):
                if together:
                    out = groups[0].step(tokens)
                else:
                    pairs = zip(groups, tokens, strict=True)
                    out = torch.cat([group.step([token]) for group, token in pairs])
                tokens = out.argmax(1).tolist()
                seen.append(out)
            logits[together] = torch.stack(seen)
    assert torch.equal(logits[False], logits[True])


def scene_turns(messages):
    return [{"role": "user", "content": messages[0]["content"]}]
