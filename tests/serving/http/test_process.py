"""The command as people start it: a process that listens, answers, drains and ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from corematching.cli.entry import run_command
from corematching.serving.http.app import State
from corematching.serving.http.server import DrainingServer
from tests.serving.http.conftest import KEY, httpx

COMMAND = [sys.executable, "-m", "corematching.cli", "serve"]


@contextmanager
def started(*arguments):
    """A process, its address, and the lines that it has written."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    lines: list[str] = []
    try:
        while True:
            line = process.stderr.readline()
            assert line, lines
            lines.append(line)
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                break
        reader = threading.Thread(target=lambda: lines.extend(process.stderr))
        reader.start()
        with httpx.Client(base_url=found[0], timeout=60, trust_env=False) as client:
            for _ in range(500):
                try:
                    client.get("/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.02)
            yield process, client, lines
    finally:
        process.kill()
        process.wait()
        reader.join()


def test_a_server_drains_at_the_end(tiny_vlm, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with started("--model", tiny_vlm, "--api-key-file", keys, "--device", "cpu") as made:
        process, client, lines = made
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 480, "n": 16}
        assert client.get("/ready").json() == {"ready": True}
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        client.headers["Authorization"] = f"Bearer {KEY}"
        codes = []

        def ask():
            codes.append(client.post("/v1/chat/completions", json=body).status_code)

        waiting = [threading.Thread(target=ask) for _ in range(3)]
        streamed = {**body, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=streamed) as running:
            pieces = running.iter_lines()
            next(pieces)
            for thread in waiting:
                thread.start()
            for _ in range(400):
                if re.search(r"num_requests_waiting{.*} [1-9]", client.get("/metrics").text):
                    break
            process.send_signal(signal.SIGTERM)
            while client.get("/ready").status_code == 200:
                time.sleep(0.005)
            late = client.post("/v1/chat/completions", json=body)
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "stopping"
            assert late.headers["retry-after"] == "1"
            text = "\n".join(pieces)
        for thread in waiting:
            thread.join()
        assert 200 in codes and set(codes) <= {200, 503}
        assert '"finish_reason": "length"' in text and text.rstrip().endswith("data: [DONE]")
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
    assert not any("Traceback" in line for line in lines)


class StuckEngine:
    """An engine whose answer never ends."""

    running, is_busy = 1, True

    def drain(self):
        self.drained = True

    def close(self):
        self.closed = True


def test_grace_ends_and_a_second_signal_does_not_wait():
    app = SimpleNamespace(state=SimpleNamespace(server=State()))

    async def stop(grace, times):
        engine = StuckEngine()
        server = DrainingServer(app, engine, grace)
        for _ in range(times):
            server.stop()
        if times == 1:
            await server._drain
        return engine, server

    engine, server = asyncio.run(stop(0.05, 1))
    assert engine.drained and engine.closed and server.should_exit and not server.force_exit
    assert app.state.server.draining
    _, server = asyncio.run(stop(60, 2))
    assert server.should_exit and server.force_exit


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--kv-memory", "much"), "--kv-memory"),
        (("--log-level", "loud"), "log level"),
        (("--api-key-file", "missing"), "missing"),
        (("--allowed-local-media-path", "missing"), "no directory"),
        (("--allowed-media-domains", "http://a"), "no host"),
        (("--method", "corematchin"), "did you mean"),
        (("--host", "192.0.2.1"), "cannot listen"),
        (("--max-batch", "0"), "--max-batch"),
    ],
)
def test_wrong_options_end_at_once(arguments, reason, capsys):
    assert run_command(["serve", *arguments]) == 2
    assert reason in capsys.readouterr().err
