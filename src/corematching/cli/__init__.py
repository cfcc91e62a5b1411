"""The ``corematching`` command."""

from __future__ import annotations

from corematching.cli.entry import main

__all__ = ["main"]
