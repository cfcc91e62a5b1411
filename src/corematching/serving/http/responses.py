"""POST /v1/responses: text and pictures in, a text out, whole or as events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from corematching.errors import InputError
from corematching.serving.answers import AnswerStream, Completion
from corematching.serving.http import schema
from corematching.serving.http.chat import (
    ChatRoute,
    describe_usage,
    note,
    respond_whole,
    respond_with_events,
)
from corematching.serving.http.errors import ApiError, explain
from corematching.serving.params import AnswerOptions, FieldError

STRICT = ConfigDict(strict=True)
SAME = ("temperature", "top_p", "top_k", "min_p", "seed", "keep_ratio")


class InputText(BaseModel):
    """A text; ``output_text`` is that of an answer before."""

    model_config = STRICT

    type: Literal["input_text", "output_text"]
    text: str


class InputImage(BaseModel):
    """A picture."""

    model_config = STRICT

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] = "auto"


class InputItem(BaseModel):
    """One turn of the input."""

    model_config = STRICT

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[InputText | InputImage, Field(discriminator="type")]]

    def message(self) -> schema.Message:
        """The same as a chat's message."""
        if isinstance(self.content, str):
            return schema.Message(role=self.role, content=self.content)
        parts: list[schema.TextPart | schema.ImagePart] = [
            schema.TextPart(type="text", text=part.text)
            if isinstance(part, InputText)
            else schema.ImagePart(
                type="image_url", image_url=schema.ImageUrl(url=part.image_url, detail=part.detail)
            )
            for part in self.content
        ]
        return schema.Message(role=self.role, content=parts)


class ResponseRequest(BaseModel):
    """The input and how to answer it; nothing is stored.

    ``keep_ratio`` is this server's own; ``top_k``, ``min_p`` and ``seed`` are as in a chat.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    keep_ratio: float | str | None = None
    stream: bool | None = None

    def options(self) -> AnswerOptions:
        """The options of the answer.

        Raises
        ------
        ApiError
            A field is unknown or not supported, or a value is out of range.
        """
        schema.check_extra(self.model_extra)
        given = {name: getattr(self, name) for name in SAME}
        given["max_tokens"] = self.max_output_tokens
        try:
            return AnswerOptions(**{k: value for k, value in given.items() if value is not None})
        except FieldError as error:
            name = "max_output_tokens" if error.field == "max_tokens" else error.field
            text = name + str(error)[len(error.field) :]
            raise ApiError(400, text, name, "invalid_value") from error

    def messages(self) -> list[schema.Message]:
        """The input as messages of a chat, without the instructions."""
        if isinstance(self.input, str):
            return [schema.Message(role="user", content=self.input)]
        return [item.message() for item in self.input]


class ResponseRoute:
    """Answers from the engine of a chat route.

    Parameters
    ----------
    chat : ChatRoute
    """

    def __init__(self, chat: ChatRoute) -> None:
        self.chat, self.engine = chat, chat.engine

    async def answer(self, body: ResponseRequest, request: Request) -> Response:
        """The response to a request."""
        self.chat.check_model(body.model)
        options, started = body.options(), time.perf_counter()
        messages = await self.chat.read_messages(body.messages(), "input")
        if body.instructions:
            messages.insert(0, {"role": "system", "content": body.instructions})
        try:
            stream = await self.engine.start(messages, options)
        except InputError as error:
            raise ApiError(422, str(error), "input", "unprocessable") from error
        reply = ResponseReply(request.state.id, body, self.engine.name)
        if body.stream:
            return respond_with_events(_stream(stream, reply, started))
        return await respond_whole(stream, reply, request, started)


class ResponseReply:
    """The JSON of one response.

    Parameters
    ----------
    request_id : str
    body : ResponseRequest
    model : str
    """

    def __init__(self, request_id: str, body: ResponseRequest, model: str) -> None:
        self.id, self.item_id = f"resp_{request_id}", f"msg_{request_id}"
        self.body, self.model, self.created = body, model, int(time.time())
        self._events = 0

    def whole(self, completion: Completion | None = None) -> dict[str, Any]:
        """The response object; without an answer while it is in progress."""
        status, details = "in_progress", None
        if completion is not None:
            cut = completion.answers[0].finish_reason == "length"
            status = "incomplete" if cut else "completed"
            details = {"reason": "max_output_tokens"} if cut else None
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": details,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.model,
            "output": [] if completion is None else [self.item(status, completion.text)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if completion is None else _describe(completion),
            "metadata": {},
        }

    def item(self, status: str, text: str | None) -> dict[str, Any]:
        """The answer as an item of the output; None: nothing of it yet."""
        content = [] if text is None else [part_of(text)]
        head = {"type": "message", "id": self.item_id, "status": status}
        return {**head, "role": "assistant", "content": content}

    def event(self, kind: str, **fields: Any) -> str:
        """A server-sent event."""
        value = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return f"event: {kind}\ndata: {json.dumps(value)}\n\n"

    def begin(self) -> Iterator[str]:
        """The events in front of the text."""
        yield self.event("response.created", response=self.whole())
        yield self.event("response.in_progress", response=self.whole())
        item = self.item("in_progress", None)
        yield self.event("response.output_item.added", output_index=0, item=item)
        yield self.event("response.content_part.added", **self._place(), part=part_of(""))

    def delta(self, text: str) -> str:
        """A piece of the text."""
        place = self._place()
        return self.event("response.output_text.delta", **place, delta=text, logprobs=[])

    def end(self, completion: Completion) -> Iterator[str]:
        """The events behind the text."""
        response, text, place = self.whole(completion), completion.text, self._place()
        yield self.event("response.output_text.done", **place, text=text, logprobs=[])
        yield self.event("response.content_part.done", **place, part=part_of(text))
        item = response["output"][0]
        yield self.event("response.output_item.done", output_index=0, item=item)
        yield self.event(f"response.{response['status']}", response=response)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item_id, "output_index": 0, "content_index": 0}


async def _stream(stream: AnswerStream, reply: ResponseReply, started: float) -> AsyncIterator[str]:
    """The events of a response; leaving early drops the request."""
    completion = Completion()
    try:
        for event in reply.begin():
            yield event
        async for chunk in stream:
            completion.add(chunk)
            if chunk.text:
                yield reply.delta(chunk.text)
        note(reply.id, completion.usage, started)
        for event in reply.end(completion):
            yield event
    except Exception as error:
        told = explain(error)
        fields = {"code": told.code, "message": told.message, "param": told.param}
        yield reply.event("error", **fields)
    finally:
        stream.cancel()


def part_of(text: str) -> dict[str, Any]:
    """The content of an answer."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _describe(completion: Completion) -> dict[str, Any]:
    assert completion.usage is not None
    usage = describe_usage(completion.usage)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
