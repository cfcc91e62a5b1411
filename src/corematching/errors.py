"""Errors a user can act on. Each message says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CoreMatchingError(Exception):
    """Base class; the command turns it into one line and exit code 2."""


class ConfigError(CoreMatchingError, ValueError):
    """A parameter has a value that makes no sense."""


class UnsupportedModelError(CoreMatchingError):
    """The model has a part that this library cannot shorten or thin out."""


class AlreadyInstalledError(CoreMatchingError):
    """A method is already installed on this model, or the model is in use."""


class InputError(CoreMatchingError):
    """An image, a text or a file is missing, broken or does not fit the model."""


class MemoryCapError(CoreMatchingError):
    """A model does not fit under the cap on memory that it was given."""


class MissingPackageError(CoreMatchingError, ImportError):
    """A feature needs a package that an extra of this one installs."""


class BusyMachineError(CoreMatchingError):
    """Other programs run, so that times would mean nothing."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not registered, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return ConfigError(f"unknown {kind} '{name}': {hint}known: {', '.join(names)}")
