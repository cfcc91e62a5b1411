"""Packages that only some features need. Each feature's extra installs what it needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from corematching.errors import MissingPackageError


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import a package that an extra installs.

    Parameters
    ----------
    package : str
        The module to import.
    extra : str
        The extra of ``corematching`` that installs it.
    purpose : str
        What needs it; the message starts with it.

    Raises
    ------
    MissingPackageError
        It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingPackageError(
            f"{purpose} needs the package '{error.name}': run "
            f'`pip install "corematching[{extra}]"`, or `pip install {error.name}`'
        ) from error


def require_plots(purpose: str) -> None:
    """Look for matplotlib before any work is done.

    Raises
    ------
    MissingPackageError
        It is not installed.
    """
    require("matplotlib", "plots", purpose)
