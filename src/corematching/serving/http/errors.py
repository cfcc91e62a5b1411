"""Errors in OpenAI's shape; nothing of what goes wrong inside leaves the server."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from corematching.errors import ConfigError, EngineClosedError, InputError, QueueFullError
from corematching.serving.params import FieldError

log = logging.getLogger(__name__)

RETRY_SECONDS = "1"
KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
INTERNAL = "something went wrong inside: see the server's log"
NAMES = {"logprobs": "top_logprobs"}
"""Fields that are called otherwise in a request than in `AnswerOptions`."""


class ApiError(Exception):
    """A response that is an error.

    Parameters
    ----------
    status : int
    message : str
        For the client.
    param : str or None
        The field that is wrong.
    code : str or None
        A short name of what is wrong.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        message = message.encode("utf-8", "replace").decode("utf-8")
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The error as a response."""
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = RETRY_SECONDS
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def explain(error: BaseException) -> ApiError:
    """What a client is told about an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, "too many requests wait: ask again later", code="queue_full")
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server is stopping: ask another one", code="stopping")
    if isinstance(error, FieldError):
        name = NAMES.get(error.field, error.field)
        text = str(error)
        return ApiError(400, name + text[len(error.field) :], name, "invalid_value")
    if isinstance(error, ConfigError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, InputError):
        return ApiError(422, str(error), "messages", "unprocessable")
    log.error("a request failed", exc_info=error)
    return ApiError(500, INTERNAL, code="internal_error")


def name_field(place: Sequence[Any]) -> str:
    """``messages[0].content[1].text`` from the place of a validation error.

    The place also names the kinds that were tried: of the content, and of each part of it.
    """
    name, tried = "", False
    for part in place:
        if isinstance(part, int):
            name += f"[{part}]"
            tried = ".content[" in name
        elif tried:
            tried = False
        elif part not in ("body", "str") and "[" not in part:
            name += f".{part}" if name else part
    return name


def handle_errors(app: FastAPI) -> None:
    """Answer every error of an app in this shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return explain(error).response()

    async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = max(error.errors(), key=lambda each: len(each["loc"]))
        if found["type"] == "json_invalid":
            return ApiError(400, "the body is no JSON: correct it", code="invalid_json").response()
        field = name_field(found["loc"]) or "the body"
        return ApiError(400, f"{field}: {found['msg']}", field, "invalid_value").response()

    async def answer_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail)).response()

    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(HTTPException, answer_http)
    for kind in (ApiError, QueueFullError, EngineClosedError, ConfigError, InputError, Exception):
        app.add_exception_handler(kind, answer)
