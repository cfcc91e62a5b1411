"""What every request passes first: its id, the key, and the size of its body."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corematching.serving.http.errors import ApiError
from corematching.serving.http.settings import Settings

log = logging.getLogger(__name__)

OPEN = ("/health", "/ready", "/metrics")
"""Paths without a key, for probes and Prometheus."""


class Guards:
    """Refuses a request before it is read, and logs what became of each.

    Parameters
    ----------
    app : ASGIApp
    settings : Settings
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, status = secrets.token_hex(8), time.perf_counter(), [500]
        scope.setdefault("state", {})["id"] = request_id

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            refused = self._refuse(scope)
            if refused is not None:
                await refused.response()(scope, receive, answer)
            else:
                await self._limit(scope, receive, answer)
        finally:
            level = logging.DEBUG if scope["path"] in OPEN else logging.INFO
            seconds = time.perf_counter() - started
            log.log(
                level,
                "request id=%s method=%s path=%s status=%d seconds=%.3f",
                request_id,
                scope["method"],
                repr(scope["path"][:100]),
                status[0],
                seconds,
            )

    def _refuse(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self.settings.api_keys and scope["path"] not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not self.settings.accepts(key.strip()):
                return ApiError(401, "give a valid API key", code="invalid_api_key")
        announced = headers.get("content-length", "0")
        if not announced.isdigit():
            return ApiError(400, "Content-Length is no number: correct it")
        return self._too_large(int(announced[:18]))

    def _too_large(self, count: int) -> ApiError | None:
        most = self.settings.most_bytes
        if count <= most:
            return None
        return ApiError(413, f"the body has more than {most:,} bytes", code="too_large")

    async def _limit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body within its limits, and run the app with it."""
        body = bytearray()
        try:
            reading = self._read(receive, body)
            if not await asyncio.wait_for(reading, self.settings.body_seconds):
                return
            given = [bytes(body)]

            async def replay() -> Message:
                if given:
                    return {"type": "http.request", "body": given.pop(), "more_body": False}
                return await receive()

            await self.app(scope, replay, send)
        except (asyncio.TimeoutError, TimeoutError):
            error = ApiError(408, "the body did not come in time: send it again", code="timeout")
            await error.response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self._held -= len(body)

    async def _read(self, receive: Receive, body: bytearray) -> bool:
        """Read the whole body; False where the client has gone."""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            piece = message.get("body", b"")
            more = message.get("more_body", False)
            error = self._too_large(len(body) + len(piece))
            if error is None and self._held + len(piece) > self.settings.most_held:
                error = ApiError(429, "too many bytes at a time: ask again later", code="busy")
            if error is not None:
                raise error
            body += piece
            self._held += len(piece)
        return True
