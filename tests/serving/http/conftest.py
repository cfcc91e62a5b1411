"""A server on loopback, in a thread of this process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from PIL import Image

from corematching import CoreMatching
from corematching.serving import Engine
from corematching.serving.http.app import make_app
from corematching.serving.http.metrics import Metrics
from corematching.serving.http.server import open_socket
from corematching.serving.http.settings import Settings

if sys.version_info >= (3, 11):
    import httpx2 as httpx
else:
    import httpx

KEY = "correct-horse-battery"


class Server:
    """A running server.

    Attributes
    ----------
    engine : Engine
    app : FastAPI
    url : str
    client : httpx.Client
        With the key.
    """

    def __init__(self, engine, app, url):
        self.engine, self.app, self.url = engine, app, url
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)

    def chat(self, content="What?", **fields):
        """The response to a chat of one message."""
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def refused(self, status, content="What?", **fields):
        """The error object of a chat that is refused."""
        response = self.chat(content, **fields)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error

    def events(self, content="What?", **fields):
        """The objects of a stream."""
        response = self.chat(content, stream=True, **fields)
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@contextmanager
def serving(path, settings, **options):
    """A server on the model of a directory, with an engine of its own."""
    metrics = Metrics(str(path))
    with Engine.from_pretrained(
        str(path), CoreMatching(0.5), device="cpu", observer=metrics, **options
    ) as engine:
        app = make_app(engine, metrics, settings, "1")
        listening = open_socket("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        made = Server(engine, app, f"http://127.0.0.1:{listening.getsockname()[1]}")
        try:
            yield made
        finally:
            made.client.close()
            server.should_exit = server.force_exit = True
            thread.join()


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """A directory whose pictures may be read, with a link that leads out of it."""
    root = tmp_path_factory.mktemp("media")
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    for path in (root / "in.png", outside):
        Image.new("RGB", (32, 32), "green").save(path)
    (root / "text.png").write_text("no picture")
    (root / "link.png").symlink_to(outside)
    (root / "fine.png").symlink_to(root / "in.png")
    return root


@pytest.fixture(scope="session")
def server(tiny_vlm, media):
    """A server with a key and a directory of pictures."""
    settings = Settings(api_keys=("another-key", KEY), local_media=media, most_bytes=1 << 20)
    with serving(tiny_vlm, settings, max_batch=4, max_queue=4) as made:
        yield made


def data_uri(size=(64, 64), color="red", kind="PNG"):
    """A picture as a data URI."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def shown(*urls, text="What?"):
    """A message's content: pictures, then a text."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*parts, {"type": "text", "text": text}]
