"""POST /v1/chat/completions: from a request's body to its answer, whole or as events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from corematching.serving.answers import AnswerStream, Completion
from corematching.serving.engine import Engine
from corematching.serving.http.errors import ApiError, explain
from corematching.serving.http.pictures import PictureReader
from corematching.serving.http.schema import ChatRequest, Message, TextPart
from corematching.serving.http.settings import Settings
from corematching.serving.sampling import TokenLogprob
from corematching.serving.usage import Usage

log = logging.getLogger(__name__)

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity."""
CLIENT_GONE = 499


class ChatRoute:
    """Answers chats from an engine.

    Parameters
    ----------
    engine : Engine
    settings : Settings
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings

    async def answer(self, body: ChatRequest, request: Request) -> Response:
        """The response to a chat request."""
        self.check_model(body.model)
        options = body.options()
        started = time.perf_counter()
        messages = await self.read_messages(body.messages)
        stream = await self.engine.start(messages, options)
        reply = Reply(request.state.id, self.engine, logprobs=bool(body.logprobs))
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return respond_with_events(self._stream(stream, reply, with_usage, started))
        return await respond_whole(stream, reply, request, started)

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name; none means ours."""
        if name is not None and name != self.engine.name:
            shown = name[:100]
            raise ApiError(
                404,
                f"there is no model '{shown}' here: this server has '{self.engine.name}'",
                "model",
                "model_not_found",
            )

    async def read_messages(
        self, given: Sequence[Message], name: str = "messages"
    ) -> list[dict[str, Any]]:
        """A chat for the engine, with what decodes its pictures; ``name`` is the field's."""
        messages, pictures = [], PictureReader(self.settings)
        for index, message in enumerate(given):
            content: str | list[dict[str, Any]] = ""
            if isinstance(message.content, str):
                content = message.content
            else:
                content = []
                for at, part in enumerate(message.content):
                    if isinstance(part, TextPart):
                        content.append({"type": "text", "text": part.text})
                        continue
                    field = f"{name}[{index}].content[{at}].image_url"
                    if not self.engine.loaded.takes_images:
                        text = f"{field}: this model takes no pictures"
                        raise ApiError(400, text, field, "invalid_value")
                    image = await pictures.read(part.image_url.url, field)
                    content.append({"type": "image", "image": image})
            messages.append({"role": message.role, "content": content})
        return messages

    async def _stream(
        self, stream: AnswerStream, reply: Reply, with_usage: bool, started: float
    ) -> AsyncIterator[str]:
        """Server-sent events; leaving early drops the request."""
        begun: set[int] = set()
        usage: Usage | None = None
        try:
            async for chunk in stream:
                if chunk.index not in begun:
                    begun.add(chunk.index)
                    yield event(reply.piece(chunk.index, {"role": "assistant", "content": ""}))
                delta = {"content": chunk.text} if chunk.text else {}
                logprobs = chunk.logprobs if reply.logprobs else None
                yield event(reply.piece(chunk.index, delta, logprobs, chunk.finish_reason))
                usage = chunk.usage or usage
            if with_usage and usage is not None:
                yield event({**reply.head("chat.completion.chunk"), "choices": [],
                             "usage": describe_usage(usage)})  # fmt: skip
            note(reply.id, usage, started)
        except Exception as error:
            yield event(explain(error).body())
        finally:
            stream.cancel()
        yield "data: [DONE]\n\n"


class Reply:
    """The JSON of one response.

    Parameters
    ----------
    request_id : str
    engine : Engine
    logprobs : bool
        Whether they were asked for.
    """

    def __init__(self, request_id: str, engine: Engine, logprobs: bool) -> None:
        self.id, self.engine, self.logprobs = f"chatcmpl-{request_id}", engine, logprobs
        self.created = int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of the response begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.engine.name,
        }

    def piece(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """One object of a stream."""
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._describe(logprobs),
            "finish_reason": finish_reason,
        }
        return {**self.head("chat.completion.chunk"), "choices": [choice]}

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._describe(answer.logprobs if self.logprobs else None),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(completion.answers)
        ]
        assert completion.usage is not None
        usage = describe_usage(completion.usage)
        return {**self.head("chat.completion"), "choices": choices, "usage": usage}

    def _describe(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content = [
            {
                **self._token(each.token, each.logprob),
                "top_logprobs": [self._token(token, value) for token, value in each.top],
            }
            for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.engine.token_text(token)
        value = max(logprob, LOWEST_LOGPROB)
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}


def describe_usage(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, with the image tokens and those that were kept."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "image_tokens": usage.image_tokens,
            "kept_image_tokens": usage.kept_image_tokens,
            "kv_bytes": usage.kv_bytes,
        },
    }


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def note(response_id: str, usage: Usage | None, started: float) -> None:
    """One log line about an answer; nothing of its text."""
    if usage is None:
        return
    log.info(
        "answered id=%s prompt_tokens=%d image_tokens=%d kept_image_tokens=%d "
        "completion_tokens=%d seconds=%.3f",
        response_id,
        usage.prompt_tokens,
        usage.image_tokens,
        usage.kept_image_tokens,
        usage.completion_tokens,
        time.perf_counter() - started,
    )


class WholeReply(Protocol):
    """What makes the JSON of a whole answer."""

    id: str

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The response object."""
        ...


def respond_with_events(events: AsyncIterator[str]) -> Response:
    """The response that server-sent events make."""
    headers = {"Cache-Control": "no-cache"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def respond_whole(
    stream: AnswerStream, reply: WholeReply, request: Request, started: float
) -> Response:
    """The response with the whole answer, unless the client goes before it is there."""
    completion = await collect_while_connected(stream, request)
    if completion is None:
        return Response(status_code=CLIENT_GONE)
    note(reply.id, completion.usage, started)
    return JSONResponse(reply.whole(completion))


async def collect_while_connected(stream: AnswerStream, request: Request) -> Completion | None:
    """The whole answer; None, and the request dropped, where the client has gone."""
    answer = asyncio.ensure_future(stream.collect())
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        gone.cancel()
        stream.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
