"""The lock that allows one run at a time per model."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from corematching.errors import AlreadyInstalledError

POLL_SECONDS = 0.005


@dataclass(eq=False)
class Holder:
    """The run that holds the lock.

    Attributes
    ----------
    user : str
        Name of the operation, such as "generate()".
    thread : int
        Id of its thread.
    """

    user: str
    thread: int


class UseLock:
    """Allows one run at a time; refuses a second one before anything changes.

    Not an operating system lock: the holder releases its own entry, whatever moment an exception
    arrives at, and the entry of a thread that has ended is void.
    """

    def __init__(self) -> None:
        self._holders: dict[str, Holder] = {}

    @contextlib.contextmanager
    def hold(self, user: str, wait: bool = False) -> Iterator[None]:
        """Hold the lock for the duration of the block.

        Parameters
        ----------
        user : str
            Name of the operation, for the error message of others.
        wait : bool
            Wait for other threads instead of raising.

        Raises
        ------
        AlreadyInstalledError
            The model is in use; with ``wait``, only if it is by this thread.
        """
        mine = Holder(user, threading.get_ident())
        try:
            try:
                while (other := self._holders.setdefault("", mine)) is not mine:
                    self._give_way(other, wait)
                yield
            finally:
                self._release(mine)
        finally:
            self._release(mine)  # an interrupt may have cut the first call short

    def check(self) -> None:
        """Raise AlreadyInstalledError if another thread uses the model."""
        holder = self._holders.get("")
        if holder is not None and holder.thread != threading.get_ident():
            raise _in_use(holder)

    @property
    def is_mine(self) -> bool:
        """Whether this thread uses the model."""
        holder = self._holders.get("")
        return holder is not None and holder.thread == threading.get_ident()

    def _release(self, mine: Holder) -> None:
        if self._holders.get("") is mine:
            del self._holders[""]

    def _give_way(self, other: Holder, wait: bool) -> None:
        """Raise or wait; a holder whose thread has ended gives way."""
        if other.thread not in {thread.ident for thread in threading.enumerate()}:
            self._release(other)
        elif not wait or other.thread == threading.get_ident():
            raise _in_use(other)
        else:
            time.sleep(POLL_SECONDS)


def _in_use(holder: Holder) -> AlreadyInstalledError:
    where = "" if holder.thread == threading.get_ident() else " in another thread"
    return AlreadyInstalledError(
        f"the model is in use by {holder.user}{where}: one run at a time per model with a method "
        "installed; wait for it, or load the model twice (the weights may be shared)"
    )
