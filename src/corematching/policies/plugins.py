"""Methods and scores of other packages, announced under the entry-point group `GROUP`."""

from __future__ import annotations

import functools
import logging
from importlib.metadata import entry_points

logger = logging.getLogger(__name__)

GROUP = "corematching.methods"
"""Each entry point names a module, or a class in it; importing it registers its components."""


@functools.cache
def load() -> tuple[str, ...]:
    """Import what other packages announce, once.

    Returns
    -------
    tuple of str
        What could not be imported, and why: one sentence for each.
    """
    failures = []
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            package = f" of {point.dist.name}" if point.dist else ""
            failures.append(
                f"the method '{point.name}'{package} could not be loaded "
                f"({type(error).__name__}: {error})"
            )
            logger.warning("%s", failures[-1])
    return tuple(failures)
