"""A request, its answers, and what its client gets of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from corematching.methods.base import BaseMethod
from corematching.serving.groups import Row
from corematching.serving.params import USUAL_TOKENS, AnswerOptions
from corematching.serving.sampling import Defaults, Sampler, TokenLogprob
from corematching.serving.text import TextStream
from corematching.serving.usage import Usage


@dataclass(frozen=True)
class Chunk:
    """The next piece of one answer.

    Attributes
    ----------
    text : str
    index : int
        Which of the request's answers.
    tokens : tuple of int
        The tokens since the piece before.
    logprobs : tuple of TokenLogprob
        Theirs, where the request asks for them.
    finish_reason : str or None
        On the answer's last piece: "stop" (end token or stop string) or "length".
    usage : Usage or None
        On the last piece of all.
    """

    text: str
    index: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(eq=False)
class Request:
    """A prompt and how to answer it.

    Attributes
    ----------
    inputs : mapping
        What the processor gave.
    options : AnswerOptions
    method : BaseMethod or None
        In place of the engine's own.
    deliver : callable
        Gets each `Chunk`, the error that ends the request, or None at its end; called in the
        engine's thread.
    prompt : list of int
        The prompt's tokens.
    image_tokens : int
        How many of them are image tokens.
    most : int
        Tokens that each answer's row stores at most.
    arrived : float
        ``time.perf_counter()`` of its arrival.
    cancelled : bool
        Whether nobody waits for it any more.
    answers : list of Answer
        Empty until its prompt is read.
    """

    inputs: Any
    options: AnswerOptions
    method: BaseMethod | None
    deliver: Callable[[Chunk | BaseException | None], None]
    prompt: list[int] = field(repr=False, default_factory=list)
    image_tokens: int = 0
    most: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    answers: list[Answer] = field(repr=False, default_factory=list)
    dropped: int = 0
    kv_bytes: int = 0

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=sum(answer.count for answer in self.answers),
            image_tokens=self.image_tokens,
            kept_image_tokens=self.image_tokens - self.dropped,
            kv_bytes=self.kv_bytes,
        )

    @property
    def is_done(self) -> bool:
        """Whether every answer has ended."""
        return bool(self.answers) and all(answer.finish_reason for answer in self.answers)


class Answer:
    """One answer of a request while it is made.

    Parameters
    ----------
    request : Request
    index : int
        Which of its answers.
    row : Row
        The conversation that decodes it.
    tokenizer : PreTrainedTokenizer
    ends : collection of int
        End tokens.
    defaults : Defaults
        The model's.

    Attributes
    ----------
    token : int
        The last token, which the next step reads.
    count : int
        Tokens so far.
    finish_reason : str or None
        Why it has ended.
    last : float
        ``time.perf_counter()`` of the last token.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        row: Row,
        tokenizer: Any,
        ends: Sequence[int],
        defaults: Defaults,
    ) -> None:
        options = request.options
        self.request, self.index, self.row = request, index, row
        self.ends = () if options.ignore_eos else tuple(ends)
        self.sampler = Sampler(options, index, request.prompt, defaults)
        self.stream = TextStream(tokenizer, options.stop)
        self.token, self.count, self.last = 0, 0, request.arrived
        self.most = options.max_tokens or USUAL_TOKENS
        self.finish_reason: str | None = None
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, logits: Tensor) -> Chunk | None:
        """Choose a token from (V,) logits; the piece of text that it completes, if any."""
        token, logprob = self.sampler.choose(logits)
        self.token, self.count = token, self.count + 1
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        text = ""
        if token in self.ends:
            self.finish_reason, text = "stop", self.stream.finish()
        else:
            text = self.stream.add(token)
            if not self.stream.stopped and self.count >= self.most:
                self.finish_reason, text = "length", text + self.stream.finish()
            if self.stream.stopped:
                self.finish_reason = "stop"
        if not text and self.finish_reason is None:
            return None
        tokens, logprobs = tuple(self._tokens), tuple(self._logprobs)
        self._tokens, self._logprobs = [], []
        return Chunk(text, self.index, tokens, logprobs, self.finish_reason)
