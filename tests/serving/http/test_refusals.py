"""What a server refuses, with which status, and what the client is told."""

from __future__ import annotations

import base64
import json
import threading
import time

import pytest

from corematching.errors import ConfigError, InputError
from corematching.media import addresses
from corematching.serving.http.errors import INTERNAL
from corematching.serving.http.settings import Settings, read_keys
from tests.media.conftest import answer, serve  # noqa: F401
from tests.serving.http.conftest import KEY, data_uri, serving, shown

JSON = {"Content-Type": "application/json"}
BASE64 = data_uri().partition(",")[2]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 5}, "n"),
        ({"n": 99}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"keep_ratio": 0}, "keep_ratio"),
        ({"keep_ratio": "some"}, "keep_ratio"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temprature": 1}, "temprature"),
        ({"seed": 2**80}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, None),
        ({"content": [{"type": "sound"}]}, "messages[0].content[0]"),
    ],
)
def test_a_wrong_field_is_named(server, fields, param):
    error = server.refused(400, **fields)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param and param in error["message"]


def test_fields_that_change_nothing_are_taken(server):
    fields = {"user": "me", "tools": [], "response_format": {"type": "text"}, "metadata": {}}
    assert server.chat(**fields, top_p=None, model=server.engine.name).status_code == 200


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("data:image/png,abc", 400),
        ("data:image/png;base64,%%%", 400),
        (f"data:image/png;base64,{BASE64[:-40]}", 422),
        ("data:image/png;base64,bm8gcGljdHVyZQ==", 422),
        (data_uri((9000, 9000), kind="GIF"), 422),
        ("http://example.org/a.png", 400),
        ("ftp://example.org/a.png", 400),
        ("picture.png", 400),
        ("", 400),
    ],
)
def test_pictures_that_are_refused(server, url, status):
    error = server.refused(status, shown(url))
    assert error["param"] == "messages[0].content[0].image_url"


def test_other_statuses(server):
    assert server.refused(404, model="gpt-x")["code"] == "model_not_found"
    assert server.client.get("/v1/models/gpt-x").status_code == 404
    assert server.client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert server.client.get("/v1/chat/completions").status_code == 405
    bad = server.client.post("/v1/chat/completions", content=b"{bad", headers=JSON)
    assert bad.status_code == 400 and bad.json()["error"]["code"] == "invalid_json"
    assert server.refused(422, " ")["param"] == "messages"
    assert server.refused(422, max_tokens=10**6)["code"] == "unprocessable"
    assert server.refused(400, shown(*[data_uri((8, 8))] * 17))["code"] == "too_many_images"
    assert server.refused(413, "a" * (2 << 20))["code"] == "too_large"

    def pieces():
        for _ in range(40):
            yield b" " * (64 << 10)

    unannounced = server.client.post("/v1/chat/completions", content=pieces())
    assert unannounced.status_code == 413
    assert server.client.get("/openapi.json").json()["info"]["title"] == "corematching"


def test_the_key(server):
    for header in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY):
        for path in ("/v1/models", "/docs", "/openapi.json"):
            response = server.client.get(path, headers={"Authorization": header})
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
    for path in ("/health", "/ready", "/metrics"):
        assert server.client.get(path, headers={"Authorization": ""}).status_code == 200
    other = {"Authorization": "bearer another-key"}
    assert server.client.get("/v1/models", headers=other).status_code == 200


def test_a_full_queue_is_a_429(server):
    codes, tasks = [], []

    def ask():
        response = server.chat(max_tokens=100)
        codes.append((response.status_code, response.headers.get("retry-after")))

    for _ in range(16):
        tasks.append(threading.Thread(target=ask))
        tasks[-1].start()
    for task in tasks:
        task.join()
    assert set(codes) == {(200, None), (429, "1")}


def test_while_draining(server):
    state = server.app.state.server
    state.draining = True
    try:
        assert server.refused(503)["code"] == "stopping"
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
    finally:
        state.draining = False


def test_nothing_of_the_inside_is_told(server, monkeypatch):
    def fail(*_):
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(server.engine._reader, "read", fail)
    assert server.refused(500)["message"] == INTERNAL
    assert server.events()[-1]["error"]["message"] == INTERNAL
    monkeypatch.setattr(server.engine, "start", fail)
    assert server.refused(500)["message"] == INTERNAL


def test_remote_pictures_come_from_allowed_hosts_only(tiny_vlm, serve, monkeypatch):  # noqa: F811
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    picture = answer(base64.b64decode(BASE64), "200 OK", "Content-Type: image/png")
    there = serve(picture)
    moved = serve(answer(b"", "302 Found", f"Location: http://localhost:{there.port}/a.png"))
    settings = Settings(media_hosts=frozenset({"127.0.0.1"}))
    with serving(tiny_vlm, settings) as server:
        assert server.chat(shown(f"{there.url}/a.png")).status_code == 200
        for url in (f"http://localhost:{there.port}/a.png", f"{moved.url}/a.png"):
            assert "localhost" in server.refused(422, shown(url))["message"]
        assert server.refused(400, shown("file:///etc/hosts"))["code"] == "not_allowed"
        monkeypatch.setattr(addresses, "is_public", lambda address: False)
        assert "public" in server.refused(422, shown(f"{there.url}/a.png"))["message"]


def test_limits_on_bytes_pixels_and_time(tiny_vlm):
    settings = Settings(most_bytes=4000, most_held=6000, most_pixels=9000, body_seconds=0.3)
    with serving(tiny_vlm, settings) as server:
        assert server.chat(shown(*[data_uri()] * 2)).status_code == 200
        error = server.refused(422, shown(*[data_uri()] * 3))
        assert error["param"] == "messages[0].content[2].image_url"
        assert server.refused(413, "a" * 4000)["code"] == "too_large"

        def slow(first):
            yield first
            time.sleep(0.6)
            yield b"{}"

        path, replies = "/v1/chat/completions", []
        holding = threading.Thread(
            target=lambda: replies.append(server.client.post(path, content=slow(b" " * 3500)))
        )
        holding.start()
        time.sleep(0.1)
        assert server.refused(429, "a" * 3000)["code"] == "busy"
        holding.join()
        assert replies[0].status_code == 408
        assert server.chat("a" * 300).status_code == 200


def test_settings_and_keys(tmp_path):
    with pytest.raises(ConfigError, match="no directory"):
        Settings(local_media=tmp_path / "missing")
    with pytest.raises(ConfigError, match="no host"):
        Settings(media_hosts=frozenset({"http://example.org"}))
    keys = tmp_path / "keys"
    for text in ("", "# none\n", "short\n"):
        keys.write_text(text)
        with pytest.raises(InputError):
            read_keys(keys)
    with pytest.raises(InputError, match="cannot read"):
        read_keys(tmp_path)
    keys.write_text(f"# ours\n{KEY}\n\n another-key \n")
    assert read_keys(keys) == (KEY, "another-key")
    assert KEY not in repr(Settings(api_keys=read_keys(keys)))


def test_surrogates_are_no_500(server):
    body = json.dumps({"messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 2})
    response = server.client.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code in (400, 422)
    named = json.dumps({"messages": [{"role": "user", "content": "a"}], "model": "\ud800"})
    response = server.client.post("/v1/chat/completions", content=named, headers=JSON)
    assert response.status_code in (400, 404)
