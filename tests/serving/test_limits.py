"""What an engine refuses, how many it takes, and its end."""

from __future__ import annotations

import asyncio

import pytest
from PIL import Image

from corematching import CoreMatching, Dense
from corematching.errors import ConfigError, EngineClosedError, InputError, QueueFullError
from corematching.runtime import is_attached
from corematching.serving import Engine
from corematching.serving.observer import Observer
from tests.serving.conftest import ask
from tests.serving.test_engine import answer, gather, run, wait_until_idle

RED = Image.new("RGB", (64, 64), "red")


def test_the_queue_is_bounded(tiny):
    async def flood():
        return await gather(*(answer(tiny, max_tokens=60) for _ in range(30)))

    results = run(flood())
    refused = [each for each in results if isinstance(each, Exception)]
    assert refused and all(isinstance(each, QueueFullError) for each in refused)
    assert len(results) - len(refused) >= 8
    wait_until_idle(tiny)


def test_admission_is_by_bytes(tiny_vlm):
    with Engine.from_pretrained(str(tiny_vlm), Dense(), device="cpu") as engine:
        each = engine._scheduler.token_bytes
    memory = 2 * 64 * each
    running, taken = [], []

    class Watch(Observer):
        def on_token(self, seconds, first):  # in the engine's thread, so that no step is missed
            running.append(engine.running)
            taken.append(engine.kv_bytes)

    with Engine.from_pretrained(
        str(tiny_vlm), CoreMatching(0.5), kv_memory=memory, device="cpu", observer=Watch()
    ) as engine:

        async def several():
            return await gather(*(answer(engine, "Hi?", max_tokens=24) for _ in range(5)))

        results = run(several())
        assert all(result.answers[0].finish_reason == "length" for result in results)
        assert max(running) == 2 and max(taken) <= memory and engine.kv_bytes == 0
        with pytest.raises(InputError, match="kv_memory"):
            run(answer(engine, max_tokens=130))
        with pytest.raises(ConfigError, match="n=16"):
            run(Engine.complete(small_batch(engine), ask("What?"), n=16))


def small_batch(engine):
    engine._scheduler.max_batch = 2
    return engine


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"n": 99}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"keep_ratio": 2}, "keep_ratio"),
        ({"keep_ratio": "all"}, "keep_ratio"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_wrong_options_name_the_field(tiny, options, name):
    with pytest.raises(ConfigError, match=f"^{name}=") as caught:
        run(answer(tiny, **options))
    assert caught.value.field == name
    assert tiny.waiting == 0


def test_wrong_requests_are_refused(tiny, tiny_lm):
    for messages, reason in (
        ([], "at least one"),
        ([{"role": "robot", "content": "Hi"}], "role"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "content"),
        ([{"role": "user", "content": "  "}], "empty"),
    ):
        with pytest.raises(InputError, match=reason):
            run(tiny.complete(messages))
    with pytest.raises(ConfigError, match="unknown option 'heat'"):
        run(answer(tiny, heat=1))
    with pytest.raises(ConfigError, match="max_batch"):
        Engine(tiny.loaded, max_batch=0)
    with Engine.from_pretrained(str(tiny_lm), Dense(), device="cpu") as engine:
        assert run(answer(engine)).usage.image_tokens == 0
        with pytest.raises(InputError, match="text-only"):
            run(answer(engine, "What?", RED))
        with pytest.raises(ConfigError, match="keep_ratio"):
            run(answer(engine, keep_ratio=0.5))
    assert tiny.waiting == 0


def test_closing_ends_what_runs(tiny_vlm):
    engine = Engine.from_pretrained(str(tiny_vlm), device="cpu")
    model = engine.loaded.model

    async def close_meanwhile():
        tasks = [asyncio.create_task(answer(engine, max_tokens=400)) for _ in range(3)]
        while not engine.running:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert is_attached(model)
    assert all(isinstance(each, EngineClosedError) for each in run(close_meanwhile()))
    assert not is_attached(model) and not engine.is_busy
    with pytest.raises(EngineClosedError):
        run(answer(engine))


def test_grace_lets_answers_end(tiny_vlm):
    engine = Engine.from_pretrained(str(tiny_vlm), device="cpu")

    async def close_meanwhile():
        task = asyncio.create_task(answer(engine, max_tokens=30))
        while not engine.running:
            await asyncio.sleep(0.005)
        return await asyncio.to_thread(engine.close, 20.0), await task

    done, completion = run(close_meanwhile())
    assert done and completion.usage.completion_tokens == 30


def test_a_failed_thread_ends_every_request(tiny_vlm, monkeypatch):
    engine = Engine.from_pretrained(str(tiny_vlm), device="cpu")
    monkeypatch.setattr(engine._scheduler, "_step", lambda: 1 / 0)
    with pytest.raises(EngineClosedError, match="failed"):
        run(answer(engine))
    assert isinstance(engine.error, ZeroDivisionError)
    with pytest.raises(EngineClosedError):
        run(answer(engine))
    engine.close()
