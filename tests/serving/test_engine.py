"""The engine: many requests at a time, each as if it were alone."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from PIL import Image

from corematching import Dense
from corematching.serving.groups import SlotGroup
from corematching.serving.request import Answer
from tests.serving.conftest import ask

RED = Image.new("RGB", (64, 64), "red")


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def gather(*coroutines):
    return await asyncio.gather(*coroutines, return_exceptions=True)


def answer(engine, text="What?", *pictures, **options):
    return engine.complete(ask(text, *pictures), **{"max_tokens": 8, **options})


def wait_until_idle(engine):
    end = time.monotonic() + 20
    while engine.is_busy and time.monotonic() < end:
        time.sleep(0.005)
    assert not engine.is_busy and engine.kv_bytes == 0 and engine.waiting == 0


def test_greedy_answers_are_the_same_alone_and_in_any_batch(scene, questions):
    ratios = (None, "dense", 0.5)
    options = [{"max_tokens": 16, "keep_ratio": ratios[i % 3]} for i in range(len(questions))]

    async def one_by_one():
        return [await scene.complete(q, **o) for q, o in zip(questions, options, strict=True)]

    async def together():
        pairs = zip(reversed(questions), reversed(options), strict=True)
        return await gather(*(scene.complete(q, **o) for q, o in pairs))

    alone, batch = run(one_by_one()), run(together())[::-1]
    assert [a.answers[0].tokens for a in alone] == [b.answers[0].tokens for b in batch]
    assert [a.usage for a in alone] == [b.usage for b in batch]
    kept = {ratio: done.usage.kept_image_tokens for ratio, done in zip(ratios, alone, strict=False)}
    assert kept[None] < kept[0.5] < kept["dense"] == alone[0].usage.image_tokens
    wait_until_idle(scene)


def test_answers_are_those_of_generate(tiny, tiny_vlm):
    loaded = tiny.loaded
    for ratio in (None, "dense"):
        done = run(answer(tiny, "What is this?", RED, keep_ratio=ratio))
        with torch.inference_mode(), tiny._run.substitute(Dense() if ratio else tiny.method):
            inputs = tiny._encode(turns_of("What is this?", RED), 8)
            out = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected = out[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(done.answers[0].tokens) == expected
        assert done.answers[0].finish_reason == "length"
        assert done.text == loaded.tokenizer.decode(expected, skip_special_tokens=True)


def turns_of(text, *pictures):
    return [{"role": "user", "content": ask(text, *pictures)[0]["content"]}]


def test_pieces_make_the_answer(tiny):
    async def collect():
        pieces = [chunk async for chunk in tiny.chat(ask("What?", RED), max_tokens=12)]
        return pieces, await answer(tiny, "What?", RED, max_tokens=12)

    pieces, whole = run(collect())
    assert len(pieces) > 2
    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum((piece.tokens for piece in pieces), ()) == whole.answers[0].tokens
    assert pieces[-1].usage == whole.usage and pieces[-1].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert (whole.usage.image_tokens, whole.usage.kept_image_tokens) == (16, 8)


def test_an_answer_of_no_stated_length_fits_the_model(tiny):
    limit = tiny.loaded.model.config.get_text_config().max_position_embeddings
    asked = "word " * (limit // 7)

    async def ask_long():
        return await tiny.complete(ask(asked))

    usage = run(ask_long()).usage
    assert usage.completion_tokens == min(256, limit - usage.prompt_tokens) < 256


def test_several_answers_and_seeds(tiny):
    async def draw():
        options = {"n": 3, "temperature": 1.0, "seed": 7}
        first, again = await gather(answer(tiny, **options), answer(tiny, **options))
        other = await answer(tiny, temperature=1.0, seed=8)
        second = await answer(tiny, temperature=1.0, seed=8)
        greedy = await answer(tiny, n=2)
        return first, again, other, second, greedy

    first, again, other, second, greedy = run(draw())
    texts = [each.tokens for each in first.answers]
    assert len(set(texts)) == 3 and texts == [each.tokens for each in again.answers]
    assert other.answers[0].tokens == second.answers[0].tokens == texts[1]  # the stream of seed + 1
    assert greedy.answers[0].tokens == greedy.answers[1].tokens
    assert greedy.usage.completion_tokens == 16


def test_stop_strings_end_an_answer_and_are_left_out(tiny):
    whole = run(answer(tiny, max_tokens=12)).text
    stop = whole[len(whole) // 2 :][:3]
    done = run(answer(tiny, max_tokens=12, stop=[stop, "never there"]))
    assert done.text == whole[: whole.index(stop)] and done.answers[0].finish_reason == "stop"


def test_logprobs(tiny):
    (one,) = run(answer(tiny, logprobs=2)).answers
    assert [each.token for each in one.logprobs] == list(one.tokens)
    for each in one.logprobs:
        assert each.top[0] == (each.token, pytest.approx(each.logprob)) and len(each.top) == 2
        assert each.top[0][1] >= each.top[1][1]


def test_cancelling_frees_the_row(tiny, monkeypatch):
    step = SlotGroup.step

    def step_slowly(*args, **kwargs):  # no answer ends before its client has looked
        time.sleep(0.05)
        return step(*args, **kwargs)

    monkeypatch.setattr(SlotGroup, "step", step_slowly)

    async def leave():
        stream = tiny.chat(ask("What?"), max_tokens=400, ignore_eos=True)
        first = asyncio.ensure_future(anext(stream))  # random tokens may have no text for long
        while tiny.running < 1:
            await asyncio.sleep(0.005)
        assert tiny.running == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await stream.aclose()
        options = {"max_tokens": 400, "ignore_eos": True}
        waiting = [asyncio.create_task(answer(tiny, **options)) for _ in range(6)]
        while tiny.running < 4:
            await asyncio.sleep(0.005)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(leave())
    wait_until_idle(tiny)


@pytest.mark.parametrize("place", ["prompt", "token", "step"])
def test_an_error_ends_only_its_own_request(tiny, monkeypatch, place):
    expected = run(answer(tiny, "Other?", max_tokens=20)).text
    victim = ask("Victim?")
    marked = tiny._encode(turns_of("Victim?"), 8)["input_ids"][0].tolist()

    def is_marked(request):
        return request.prompt == marked

    if place == "prompt":
        read = tiny._reader.read

        def fail_to_read(inputs, method):
            if inputs["input_ids"][0].tolist() == marked:
                raise RuntimeError("broken")
            return read(inputs, method)

        monkeypatch.setattr(tiny._reader, "read", fail_to_read)
    elif place == "token":
        take = Answer.take

        def fail_to_take(self, logits):
            if is_marked(self.request) and self.count == 3:
                raise RuntimeError("broken")
            return take(self, logits)

        monkeypatch.setattr(Answer, "take", fail_to_take)
    else:
        step = SlotGroup.step

        def fail_to_step(self, tokens, rows):
            answers = [tiny._scheduler.answers[row] for row in rows]
            if any(is_marked(each.request) and each.count == 3 for each in answers):
                raise RuntimeError("broken")
            return step(self, tokens, rows)

        monkeypatch.setattr(SlotGroup, "step", fail_to_step)

    async def both():
        good = answer(tiny, "Other?", max_tokens=20)
        return await gather(good, tiny.complete(victim, max_tokens=8), answer(tiny, "Other?"))

    good, bad, third = run(both())
    assert good.text == expected and expected.startswith(third.text)
    assert isinstance(bad, RuntimeError)
    wait_until_idle(tiny)


def test_other_threads_make_the_engine_wait(tiny):
    expected = run(answer(tiny, "Other?", max_tokens=20)).text
    inputs = tiny._encode(turns_of("Mine?", RED), 30)
    made, stop = [], threading.Event()

    def generate():
        while not stop.is_set():
            try:
                with torch.inference_mode():
                    out = tiny.loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            except Exception as error:
                made.append(type(error).__name__)
            else:
                made.append(tuple(out[0].tolist()))
            time.sleep(0.02)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        texts = [run(answer(tiny, "Other?", max_tokens=20)).text for _ in range(3)]
    finally:
        stop.set()
        thread.join()
    assert texts == [expected] * 3
    assert set(made) - {"AlreadyInstalledError"} and len(set(made)) <= 2
