"""What an engine tells about its work, for metrics."""

from __future__ import annotations

from corematching.serving.usage import Usage


class Observer:
    """Gets told what happens, in the engine's thread; this one does nothing with it."""

    def on_pictures(self, found: bool) -> None:
        """The features of a prompt's pictures were asked for, and found or computed."""

    def on_prompt(self, usage: Usage, waited: float, seconds: float) -> None:
        """A prompt was read, after ``waited`` seconds in the queue."""

    def on_token(self, seconds: float, first: bool) -> None:
        """A token came, so many seconds after the one before it, or after the request."""

    def on_end(self, usage: Usage, seconds: float, reason: str) -> None:
        """A request ended after so many seconds: "stop", "length", "abort" or "error"."""
