"""Another method for some prompts of a model, such as the same one with another budget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from corematching.errors import ConfigError
from corematching.model.spec import ModelSpec, check_policies, choose_counts
from corematching.protocol import VISION, Method


class Substitute(threading.local):
    """The method that reads this thread's prompts in place of the installed one, if any."""

    method: Method | None = None

    @contextmanager
    def use(self, method: Method) -> Iterator[None]:
        """Let a method read this thread's prompts inside the block."""
        before, self.method = self.method, method
        try:
            yield
        finally:
            self.method = before


def check_substitute(parts: ModelSpec, installed: Method, method: Method) -> None:
    """Refuse a method that needs something else on the model than the installed one.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.
    installed, method : Method
        The installed method, and the one in its place.

    Raises
    ------
    ConfigError
        A policy has another type; or it chooses another number of neurons, weighs tokens or reads
        the vision tower, and the installed one does not.
    """
    check_policies(method)
    tokens, base = method.tokens, installed.tokens
    neurons, known = method.neurons, installed.neurons
    if neurons is not None:
        counts = choose_counts(parts, neurons), choose_counts(parts, known)
        if known is None or neurons.per_token != known.per_token or counts[0] != counts[1]:
            raise _misfit("chooses other neurons than the installed one")
    if tokens is None:
        return
    if tokens.proportional and (base is None or not base.proportional):
        raise _misfit("gives tokens weights, which the installed one does not")
    if VISION in tokens.needs and (base is None or VISION not in base.needs):
        raise _misfit("reads the vision tower, which the installed one does not")


def _misfit(what: str) -> ConfigError:
    return ConfigError(
        f"this method {what}: change only how many image tokens are kept, or install it instead"
    )
