"""Chats over HTTP, with OpenAI's own client where there is one."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from corematching.serving.groups import SlotGroup
from tests.serving.http.conftest import KEY, data_uri, httpx, shown

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def messages(*urls, text="What?"):
    return [{"role": "user", "content": shown(*urls, text=text)}]


def test_a_whole_answer(client, server):
    (model,) = client.models.list().data
    done = client.chat.completions.create(
        model=model.id, messages=messages(data_uri()), max_completion_tokens=8
    )
    (choice,) = done.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert (done.object, done.model) == ("chat.completion", model.id)
    details = done.usage.prompt_tokens_details.model_dump()
    assert (details["image_tokens"], details["kept_image_tokens"]) == (16, 8)
    assert done.usage.completion_tokens == 8
    assert done.usage.total_tokens == 8 + done.usage.prompt_tokens
    assert client.models.retrieve(model.id).id == model.id


def test_a_stream_is_the_same_answer(client, server):
    fields = {"messages": messages(data_uri()), "max_tokens": 8, "model": server.engine.name}
    whole = client.chat.completions.create(**fields)
    pieces = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.delta.content or "" for piece in pieces for c in piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [c.finish_reason for piece in pieces for c in piece.choices][-1] == "length"
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
    assert len({piece.id for piece in pieces}) == 1


def test_the_asynchronous_client(server):
    async def ask():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0
        ) as client:
            fields = {"model": server.engine.name, "messages": messages(), "max_tokens": 6}
            whole = await client.chat.completions.create(**fields)
            stream = await client.chat.completions.create(**fields, stream=True)
            text = "".join([c.delta.content or "" async for p in stream for c in p.choices])
            return whole.choices[0].message.content, text

    whole, text = asyncio.run(ask())
    assert whole == text


def test_turns_pictures_and_answers(server):
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": shown(data_uri(), data_uri(color="blue"))},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": shown(data_uri(kind="JPEG"), text="And this?")},
    ]
    body = {"messages": turns, "max_tokens": 4, "n": 2, "temperature": 1.0, "seed": 3}
    first, again = (server.client.post("/v1/chat/completions", json=body) for _ in range(2))
    choices = first.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices == again.json()["choices"]
    assert first.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 48
    events = server.events(n=2)
    ended = [c["index"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert sorted(ended) == [0, 1]


def test_keep_ratio_of_a_request(server):
    for ratio, kept in ((0.25, 4), ("dense", 16), (None, 8)):
        done = server.chat(shown(data_uri()), keep_ratio=ratio).json()
        assert done["usage"]["prompt_tokens_details"]["kept_image_tokens"] == kept


def test_logprobs_and_stop(server):
    done = server.chat(logprobs=True, top_logprobs=2).json()
    (choice,) = done["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 8 and all(len(each["top_logprobs"]) == 2 for each in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    events = server.events(logprobs=True)
    streamed = [c["logprobs"]["content"] for e in events for c in e["choices"] if c["logprobs"]]
    assert sum(map(len, streamed)) == 8
    text = choice["message"]["content"]
    stop = text[len(text) // 2]
    ended = server.chat(stop=stop).json()["choices"][0]
    assert ended["message"]["content"] == text[: text.index(stop)]
    assert ended["finish_reason"] == "stop"


def test_local_pictures(server, media):
    assert server.chat(shown(f"file://{media}/in.png")).status_code == 200
    assert server.chat(shown(f"file://{media}/fine.png")).status_code == 200
    error = server.refused(422, shown(f"file://{media}/text.png"))
    assert error["param"] == "messages[0].content[0].image_url"
    texts = set()
    for path in ("link.png", "missing.png", "../outside0/secret.png", "%2e%2e/x", "", "a%00b"):
        texts.add(server.refused(400, shown(f"file://{media}/{path}"))["message"])
    texts.add(server.refused(400, shown("file:///etc/passwd"))["message"])
    texts.add(server.refused(400, shown(f"file://elsewhere{media}/in.png"))["message"])
    assert len(texts) == 1  # so nobody learns which files there are


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, monkeypatch, stream):
    step = SlotGroup.step

    def slow_step(self, tokens, rows):
        time.sleep(0.01)
        return step(self, tokens, rows)

    monkeypatch.setattr(SlotGroup, "step", slow_step)
    body = {"messages": messages(), "max_tokens": 480, "stream": stream}
    with (
        httpx.Client(base_url=server.url, headers=server.client.headers, timeout=0.5) as leaving,
        pytest.raises(httpx.ReadTimeout),
        leaving.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        next(response.iter_raw())
        raise httpx.ReadTimeout("enough")
    end = time.monotonic() + 3
    while server.engine.running and time.monotonic() < end:
        time.sleep(0.02)
    assert not server.engine.running


def test_metrics_count(server):
    server.chat(shown(data_uri()))
    lines = server.client.get("/metrics", headers={"Authorization": ""}).text.splitlines()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}
    assert values["vllm:prompt_tokens_total"] > values["corematching:image_tokens_total"] > 0
    assert values["corematching:kept_image_tokens_total"] > 0
    assert values["vllm:generation_tokens_total"] > 0
    assert values["vllm:mm_cache_queries_total"] > values["vllm:mm_cache_hits_total"] > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert values[f"vllm:{name}"] == 0
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert values[f"vllm:{name}_seconds_count"] > 0


def test_no_text_of_a_request_is_logged(server, caplog):
    with caplog.at_level(logging.DEBUG):
        server.chat(shown(data_uri(), text="my secret words"))
        server.refused(422, shown("data:image/png;base64,bXkgc2VjcmV0"))
    shown_text = caplog.text
    assert "answered id=" in shown_text and "status=422" in shown_text
    assert "secret" not in shown_text and "bXkgc2Vj" not in shown_text
