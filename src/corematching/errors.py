"""Errors a user can act on. Each message says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

ALL_TOKENS = "keep all tokens, as with CoreMatching(score=None)"
ALL_NEURONS = "compute all neurons, as with CoreMatching(neurons=None)"
"""What works where tokens, or neurons, cannot be dropped."""


class CoreMatchingError(Exception):
    """Base class; the command turns it into one line and exit code 2."""


class ConfigError(CoreMatchingError, ValueError):
    """A parameter has a value that makes no sense."""


class InvalidTensorError(ConfigError):
    """A tensor has an unsupported shape, dtype, layout or value."""


class UnsupportedModelError(CoreMatchingError):
    """The model has a part that this library cannot prune."""


class AlreadyInstalledError(CoreMatchingError):
    """A method is already installed on this model, or the model is in use."""


class InputError(CoreMatchingError):
    """An image, a text or a file is missing, broken or does not fit the model."""


class MemoryCapError(CoreMatchingError):
    """A model does not fit under its cap on memory."""


class MissingPackageError(CoreMatchingError, ImportError):
    """A feature needs a package that an extra of this one installs."""


class QueueFullError(CoreMatchingError):
    """An engine has as many waiting requests as it takes."""


class EngineClosedError(CoreMatchingError):
    """An engine takes no more requests, or has stopped before an answer was complete."""


class BusyMachineError(CoreMatchingError):
    """Other programs are running, so times cannot be compared."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown name, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return ConfigError(f"unknown {kind} '{name}': {hint}known: {', '.join(names)}")


@contextmanager
def translating(what: str, fix: str) -> Iterator[None]:
    """Turn every exception of a block into an `InputError` ``what (reason): fix``.

    For readers of foreign files, such as tokenizers and templates, which raise any exception for
    damaged ones. Our own errors and those of the machine (no memory, no room on disk)
    pass.
    """
    try:
        yield
    except CoreMatchingError:
        raise
    except Exception as error:
        if is_of_machine(error):
            raise
        raise InputError(f"{what} ({describe_error(error)}): {fix}") from error


def is_of_machine(error: BaseException) -> bool:
    """Whether memory or room on disk has run out."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def describe_error(error: BaseException) -> str:
    """An error's first line, with its kind where the text alone says little."""
    if isinstance(error, OSError | ValueError) and str(error).strip():
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    head = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return head.rstrip(".:")[:200]
