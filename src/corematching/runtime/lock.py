"""One run at a time per model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from corematching.errors import AlreadyInstalledError


class UseLock:
    """Lets one run at a time use the model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self.user = ""

    @contextlib.contextmanager
    def hold(self, user: str) -> Iterator[None]:
        """Use the model for as long as the block lasts.

        Raises
        ------
        AlreadyInstalledError
            Somebody else does.
        """
        if not self._lock.acquire(blocking=False):
            raise AlreadyInstalledError(
                f"the model is in use by {self.user}: one run at a time per model with a method "
                "installed; wait for it, or load the model twice (the weights may be shared)"
            )
        self._owner, self.user = threading.get_ident(), user
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()

    def check(self) -> None:
        """Raise unless the model is free or held by this thread."""
        if self._lock.locked() and self._owner != threading.get_ident():
            raise AlreadyInstalledError(
                f"the model is in use by {self.user} in another thread: one run at a time per "
                "model with a method installed; wait for it, or load the model twice"
            )

    @property
    def held(self) -> bool:
        """Whether the model is in use."""
        return self._lock.locked()
