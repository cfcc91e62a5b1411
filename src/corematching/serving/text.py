"""Tokens to text as they come, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""What a tokenizer gives for bytes that are not yet a whole character."""


class TextStream:
    """The text of one answer, in pieces that do not change any more.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        Decodes the answer's tokens.
    stops : sequence of str
        Texts that end the answer and are not part of it.

    Attributes
    ----------
    stopped : bool
        Whether a stop string came.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped = False
        self._tokens: list[int] = []
        self._start = self._read = 0
        self._held = ""

    def add(self, token: int) -> str:
        """The text that a token completes; "" while it may still change or become a stop."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._read])
        now = self._decode(self._tokens[self._start :])
        if len(now) <= len(before) or now.endswith(INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """The text that is left at the end of the answer."""
        before = self._decode(self._tokens[self._start : self._read])
        rest = self._decode(self._tokens[self._start :])[len(before) :]
        text = self._release(rest) if rest else ""
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _release(self, text: str) -> str:
        """What of the held text and a new piece can neither be nor become part of a stop."""
        self._held += text
        found = [at for at in map(self._held.find, self.stops) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that are the begin of a stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
