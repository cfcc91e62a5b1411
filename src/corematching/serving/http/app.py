"""The server's routes."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from corematching.serving.engine import Engine
from corematching.serving.http.chat import ChatRoute
from corematching.serving.http.errors import ApiError, handle_errors
from corematching.serving.http.guards import Guards
from corematching.serving.http.metrics import Metrics
from corematching.serving.http.responses import ResponseRequest, ResponseRoute
from corematching.serving.http.schema import ChatRequest
from corematching.serving.http.settings import Settings

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class State:
    """What the routes share.

    Attributes
    ----------
    draining : bool
        Whether new requests are refused.
    """

    def __init__(self) -> None:
        self.draining = False
        self.started = int(time.time())


def make_app(engine: Engine, metrics: Metrics, settings: Settings, version: str) -> FastAPI:
    """An app that answers chats from an engine.

    Parameters
    ----------
    engine : Engine
    metrics : Metrics
        The engine's observer.
    settings : Settings
    version : str
        Of this package.
    """
    app = FastAPI(title="corematching", version=version, redoc_url=None, debug=False)
    state = app.state.server = State()
    route = ChatRoute(engine, settings)
    handle_errors(app)

    @app.post("/v1/chat/completions", summary="Answer a chat", responses=ERRORS)
    async def complete(body: Annotated[ChatRequest, Body()], request: Request) -> Response:
        if state.draining:
            raise ApiError(503, "the server is stopping: ask another one", code="stopping")
        return await route.answer(body, request)

    @app.post("/v1/responses", summary="Answer as a response", responses=ERRORS)
    async def respond(body: Annotated[ResponseRequest, Body()], request: Request) -> Response:
        if state.draining:
            raise ApiError(503, "the server is stopping: ask another one", code="stopping")
        return await ResponseRoute(route).answer(body, request)

    @app.get("/v1/models", summary="The model")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe_model(engine, state)]}

    @app.get("/v1/models/{name:path}", summary="The model, by name", responses=ERRORS)
    async def model(name: str) -> dict[str, Any]:
        route.check_model(name)
        return describe_model(engine, state)

    @app.get("/health", summary="Whether the engine runs")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"} if engine.error is None else {"status": "failed"},
                            200 if engine.error is None else 503)  # fmt: skip

    @app.get("/ready", summary="Whether new requests are taken")
    async def ready() -> JSONResponse:
        takes = engine.error is None and not state.draining
        return JSONResponse({"ready": takes}, 200 if takes else 503)

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def show_metrics() -> Response:
        return Response(metrics.show(engine), media_type=TEXT)

    app.add_middleware(Guards, settings=settings)
    return app


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field is wrong; `param` names it"},
    401: {"description": "No valid API key"},
    404: {"description": "No such model"},
    413: {"description": "Too many bytes"},
    422: {"description": "A picture or a prompt that cannot be taken"},
    429: {"description": "Too many requests wait"},
    503: {"description": "The server is stopping"},
}


def describe_model(engine: Engine, state: State) -> dict[str, Any]:
    """OpenAI's model object."""
    return {
        "id": engine.name,
        "object": "model",
        "created": state.started,
        "owned_by": "corematching",
    }
