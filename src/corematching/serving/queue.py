"""The requests that wait for an engine."""

from __future__ import annotations

import threading
from collections import deque

from corematching.errors import EngineClosedError, QueueFullError
from corematching.serving.request import Request


class RequestQueue:
    """A bounded queue between the clients' threads and the engine's.

    A request takes a place first, while its prompt is prepared, and gives it up when the engine
    reads the prompt.

    Parameters
    ----------
    most : int
        Places.

    Attributes
    ----------
    taken : int
        Places that are taken.
    stopped : bool
        Whether the engine's thread is to end, or has ended.
    """

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self.stopped = False
        self._closed = False
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()

    def reserve(self) -> None:
        """Take a place.

        Raises
        ------
        QueueFullError
            There is none.
        EngineClosedError
            The engine takes no more requests.
        """
        with self._changed:
            if self._closed or self.stopped:
                raise EngineClosedError("the engine is stopping and takes no more requests")
            if self.taken >= self.most:
                raise QueueFullError(
                    f"{self.taken} requests wait already: ask again later, or raise max_queue"
                )
            self.taken += 1

    def give_back(self) -> None:
        """Give up a place that no request was submitted to."""
        with self._changed:
            self.taken -= 1

    def submit(self, request: Request) -> None:
        """Queue a request that has a place.

        Raises
        ------
        EngineClosedError
            The engine has stopped.
        """
        with self._changed:
            if self.stopped:
                self.taken -= 1
                raise EngineClosedError("the engine has stopped")
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Mark a request that nobody waits for any more."""
        with self._changed:
            request.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Take no more requests; those that have a place may still be submitted."""
        with self._changed:
            self._closed = True

    def stop(self) -> None:
        """Make `wait` return False."""
        with self._changed:
            self.stopped = True
            self._changed.notify()

    def wait(self, busy: bool) -> bool:
        """Wait for a request unless there is other work; False once stopped."""
        with self._changed:
            while not (self.stopped or busy or self._waiting):
                self._changed.wait()
            return not self.stopped

    @property
    def first(self) -> Request | None:
        """The request that has waited longest."""
        with self._changed:
            return self._waiting[0] if self._waiting else None

    def take(self, request: Request) -> None:
        """Remove a request and give up its place."""
        with self._changed:
            self._waiting.remove(request)
            self.taken -= 1

    def list_waiting(self) -> list[Request]:
        """The queued requests, in order."""
        with self._changed:
            return list(self._waiting)
