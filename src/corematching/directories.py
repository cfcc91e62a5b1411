"""The cache directory."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "CORE_MATCHING_CACHE"


def cache_root(cache_dir: Path | str | None = None) -> Path:
    """``cache_dir``, else ``$CORE_MATCHING_CACHE``, else the user's cache directory."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("corematching"))
