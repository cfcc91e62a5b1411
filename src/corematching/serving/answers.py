"""What a client holds of its request: the answers as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from corematching.serving.queue import RequestQueue
from corematching.serving.request import Chunk, Request
from corematching.serving.sampling import TokenLogprob
from corematching.serving.usage import Usage


@dataclass
class CompletedAnswer:
    """A whole answer; see `Chunk`."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""


@dataclass
class Completion:
    """The answers of a request.

    Attributes
    ----------
    answers : list of CompletedAnswer
    usage : Usage or None
        None only while it is not complete.
    """

    answers: list[CompletedAnswer] = field(default_factory=list)
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.answers[0].text if self.answers else ""

    def add(self, chunk: Chunk) -> None:
        """Append a piece."""
        while len(self.answers) <= chunk.index:
            self.answers.append(CompletedAnswer())
        answer = self.answers[chunk.index]
        answer.text += chunk.text
        answer.tokens += chunk.tokens
        answer.logprobs += chunk.logprobs
        answer.finish_reason = chunk.finish_reason or answer.finish_reason
        self.usage = chunk.usage or self.usage


class AnswerStream:
    """The pieces of a request's answers, in the client's event loop.

    Parameters
    ----------
    loop : AbstractEventLoop
        The client's.
    queue : RequestQueue
        The engine's, for `cancel`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: RequestQueue) -> None:
        self.request: Request | None = None
        self._loop, self._queue = loop, queue
        self._events: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()

    def deliver(self, event: Chunk | BaseException | None) -> None:
        """Hand over what happened; from any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Drop the request, if it has not ended; its row is free before the next step."""
        if self.request is not None:
            self._queue.cancel(self.request)

    async def collect(self) -> Completion:
        """All pieces; the request is dropped where this is cancelled."""
        completion = Completion()
        try:
            async for chunk in self:
                completion.add(chunk)
        finally:
            self.cancel()
        return completion

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while (event := await self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
