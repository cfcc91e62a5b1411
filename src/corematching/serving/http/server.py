"""The server process: its socket, its signals and its end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from corematching.errors import InputError
from corematching.serving.engine import Engine

log = logging.getLogger(__name__)

IDLE_SECONDS = 30
FLUSH_SECONDS = 2
MOST_CONNECTIONS = 4096


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises
    ------
    InputError
        The address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        opened.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {host}:{port} ({reason}): give another --host or --port"
        ) from error
    return opened


class DrainingServer(uvicorn.Server):
    """A server that refuses new requests after a signal and lets the running ones end.

    Parameters
    ----------
    app : FastAPI
        What `make_app` gave.
    engine : Engine
    grace : float
        Seconds for the running requests; a second signal does not wait for them.
    """

    def __init__(self, app: FastAPI, engine: Engine, grace: float) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=IDLE_SECONDS,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
        super().__init__(config)
        self.engine, self.grace = engine, grace
        self._state = app.state.server
        self._drain: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on SIGTERM and SIGINT while the block runs."""
        loop = asyncio.get_running_loop()
        kinds = (signal.SIGTERM, signal.SIGINT)
        for kind in kinds:
            loop.add_signal_handler(kind, self.stop)
        try:
            yield
        finally:
            for kind in kinds:
                loop.remove_signal_handler(kind)

    def stop(self) -> None:
        """Begin to drain; at the second call, end at once."""
        if self._drain is None:
            log.info("stopping: %d answers have %g s to end", self.engine.running, self.grace)
            self._drain = asyncio.ensure_future(self._wait())
        else:
            self.should_exit = self.force_exit = True

    async def _wait(self) -> None:
        self._state.draining = True
        self.engine.drain()
        end = asyncio.get_running_loop().time() + self.grace
        while self.engine.is_busy and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        if self.engine.is_busy:
            log.warning("stopping: %d answers did not end in time", self.engine.running)
            await asyncio.to_thread(self.engine.close)
        self.should_exit = True


def serve(app: FastAPI, engine: Engine, listening: socket.socket, grace: float) -> None:
    """Serve until a signal, and close the engine.

    Parameters
    ----------
    app : FastAPI
    engine : Engine
    listening : socket
        What `open_socket` gave.
    grace : float
        See `DrainingServer`.
    """
    server: Any = DrainingServer(app, engine, grace)
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        engine.close()
        listening.close()
