"""Loopback servers that say what a test wants, byte by byte."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

Script = Callable[[socket.socket, str], None]
"""Gets a connection whose request was read, and the request's path."""


class RawServer:
    """Answers each connection with a script, in threads that end with the test."""

    def __init__(self, script: Script, host: str = "127.0.0.1") -> None:
        self.script = script
        self.ended = threading.Event()
        self.listener = socket.create_server((host, 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        self.hosts: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(4096)
                if not piece:
                    return
                request += piece
            lines = request.decode("latin-1").split("\r\n")
            self.hosts += [line[6:] for line in lines if line.lower().startswith("host: ")]
            self.script(connection, lines[0].split()[1])

    def close(self) -> None:
        self.ended.set()
        self.listener.close()


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., RawServer]]:
    """Starts servers; proxies are out of the way."""
    monkeypatch.setenv("no_proxy", "*")
    servers: list[RawServer] = []

    def start(script: Script | bytes, host: str = "127.0.0.1") -> RawServer:
        said = script if callable(script) else lambda connection, path: connection.sendall(script)
        servers.append(RawServer(said, host))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body
