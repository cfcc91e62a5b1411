"""Vision features that are kept: the same answers, and the vision tower runs once."""

from __future__ import annotations

import asyncio

import pytest
import torch
from PIL import Image

from corematching import CoreMatching, Dense, VisionZip
from corematching.serving import Engine, Observer
from corematching.serving.features import FeatureCache
from corematching.serving.prompt import PromptReader
from tests.models import VISION_FAMILIES, build, make_inputs
from tests.serving.conftest import ask


class Seen(Observer):
    """What was found, in order."""

    def __init__(self):
        self.found = []

    def on_pictures(self, found):
        self.found.append(found)


def read(reader, inputs):
    prompt = reader.read(inputs, None)
    layers = prompt.cache.layers
    return [prompt.logits, *(x.keys.clone() for x in layers), *(x.values.clone() for x in layers)]


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_every_family_reads_the_same_from_kept_features(name):
    model, seen = build(name), Seen()
    inputs, other = (make_inputs(name, model, images=2, seed=seed) for seed in (0, 1))
    with torch.inference_mode(), CoreMatching(0.5, neurons=None)(model, engine="torch") as run:
        fresh = PromptReader(run, FeatureCache(model, 0, Observer()))
        expected, different = read(fresh, inputs), read(fresh, other)
        reader = PromptReader(run, FeatureCache(model, 1 << 24, seen))
        for prompt, due in ((inputs, expected), (other, different), (inputs, expected)):
            assert all(map(torch.equal, read(reader, prompt), due))
        assert "get_image_features" not in vars(model.base_model)
    assert seen.found == [False, False, True]


def test_memory_is_a_limit_and_the_oldest_go_first():
    model, seen = build("llava"), Seen()
    prompts = [make_inputs("llava", model, seed=seed) for seed in range(3)]
    with torch.inference_mode(), Dense()(model, engine="torch") as run:
        cache = FeatureCache(model, 1 << 24, Observer())
        PromptReader(run, cache).read(prompts[0], None)
        size = cache.used
        assert size > 0
        cache = FeatureCache(model, 2 * size, seen)
        reader = PromptReader(run, cache)
        for index in (0, 1, 0, 2, 0, 1):
            reader.read(prompts[index], None)
            assert cache.used <= 2 * size
        small = FeatureCache(model, size - 1, seen)
        for _ in range(2):
            PromptReader(run, small).read(prompts[0], None)
        assert small.used == 0
    assert seen.found == [False, False, True, False, True, False, False, False]


def test_a_method_that_reads_the_tower_makes_it_run():
    model, seen = build("llava"), Seen()
    inputs = make_inputs("llava", model)
    with torch.inference_mode(), VisionZip()(model, engine="torch") as run:
        reader = PromptReader(run, FeatureCache(model, 1 << 24, seen))
        first, again = read(reader, inputs), read(reader, inputs)
        assert all(map(torch.equal, first, again)) and not seen.found


def test_a_further_turn_finds_them(tiny_vlm):
    seen, picture = Seen(), Image.new("RGB", (64, 64), "red")
    chat = ask("What?", picture)
    turns = [*chat, {"role": "assistant", "content": "red"}, {"role": "user", "content": "Why?"}]

    async def answers(engine):
        chats = (chat, ask("Where?", picture), turns, ask("What?", picture.rotate(9)))
        return [(await engine.complete(each, max_tokens=6)).answers for each in chats]

    with Engine.from_pretrained(str(tiny_vlm), device="cpu", observer=seen) as engine:
        kept = asyncio.run(answers(engine))
    with Engine.from_pretrained(str(tiny_vlm), device="cpu", image_memory=None) as engine:
        assert asyncio.run(answers(engine)) == kept
    assert seen.found == [False, True, True, False]
