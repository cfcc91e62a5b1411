"""Responses over HTTP, with OpenAI's own client where there is one."""

from __future__ import annotations

import pytest

from corematching.serving.http.errors import INTERNAL
from tests.serving.http.conftest import KEY, data_uri

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def content(*urls, text="What?"):
    images = [{"type": "input_image", "image_url": url} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "input_text", "text": text}]}]


def post(server, **fields):
    body = {"input": "What?", "max_output_tokens": 6, **fields}
    return server.client.post("/v1/responses", json=body)


def test_a_response_is_the_chat_s_answer(client, server):
    chat = server.chat(
        [
            {"type": "image_url", "image_url": {"url": data_uri()}},
            {"type": "text", "text": "What?"},
        ]
    ).json()
    done = client.responses.create(
        model=server.engine.name, input=content(data_uri()), max_output_tokens=8
    )
    assert done.output_text == chat["choices"][0]["message"]["content"]
    assert done.status == "incomplete" and done.incomplete_details.reason == "max_output_tokens"
    assert done.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert done.usage.output_tokens == 8
    assert done.usage.input_tokens_details.model_dump()["kept_image_tokens"] == 8


def test_a_stream_of_events(client, server):
    fields = {"model": server.engine.name, "input": "Hi.", "instructions": "Be short."}
    whole = client.responses.create(**fields, max_output_tokens=6)
    events = list(client.responses.create(**fields, max_output_tokens=6, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text == events[-4].text
    assert events[-1].response.usage == whole.usage


def test_turns_of_a_conversation(client, server):
    turns = [
        *content(data_uri()),
        {"role": "assistant", "content": [{"type": "output_text", "text": "red"}]},
        {"role": "user", "content": "Why?"},
    ]
    fields = {"seed": 1, "keep_ratio": "dense", "top_k": 3}
    done = client.responses.create(
        model=server.engine.name,
        input=turns,
        max_output_tokens=4,
        temperature=1.0,
        extra_body=fields,
    )
    again = post(
        server, input=turns, max_output_tokens=4, temperature=1.0, store=True, **fields
    ).json()
    assert again["output"][0]["content"][0]["text"] == done.output_text
    assert again["usage"]["input_tokens_details"]["kept_image_tokens"] == 16


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": [{"role": "robot", "content": "a"}]}, 400, "input[0].role"),
        ({"input": content("http://example.org/a.png")}, 400, "input[0].content[0].image_url"),
        ({"input": content("data:image/png;base64,AAAA")}, 422, "input[0].content[0].image_url"),
        ({"input": " "}, 422, "input"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"temperature": 9}, 400, "temperature"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"text": {"format": {"type": "json_object"}}}, 400, "text"),
        ({"inputs": "a"}, 400, "inputs"),
        ({"model": "gpt-x"}, 404, "model"),
    ],
)
def test_what_is_refused(server, fields, status, param):
    response = post(server, **fields)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_errors_inside(server, monkeypatch):
    def fail(*_):
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(server.engine._reader, "read", fail)
    assert post(server).json()["error"]["message"] == INTERNAL
    events = post(server, stream=True).text
    assert "event: error" in events and INTERNAL in events and "hunter2" not in events
    server.app.state.server.draining = True
    try:
        assert post(server).status_code == 503
    finally:
        server.app.state.server.draining = False
