"""What an engine tells about its work, for metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corematching.serving.request import Request


class Observer:
    """Gets told what happens, in the engine's thread; this one does nothing with it."""

    def on_prompt(self, request: Request, waited: float, seconds: float) -> None:
        """A prompt was read, after ``waited`` seconds in the queue."""

    def on_token(self, seconds: float, first: bool) -> None:
        """A token came, so many seconds after the one before it, or after the request."""

    def on_end(self, request: Request, seconds: float, reason: str) -> None:
        """A request ended after so many seconds: "stop", "length", "abort" or "error"."""
