"""Decode steps replayed on a stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from corematching.backends.cuda.backend import CudaBackend
from corematching.backends.cuda.graph import GraphSteps
from corematching.backends.traffic import WeightTraffic
from corematching.model.patching import Patches


@contextmanager
def replaying(run: Any, make_recorder: Callable[[], Any]) -> Iterator[GraphSteps]:
    """Give a run the backend of a GPU, whose steps ``make_recorder`` captures."""
    installation, patches = run._session.installation, Patches()
    own = installation.backend, installation.traffic
    backend = CudaBackend(run.model, installation.parts, installation.sparse, make_recorder)
    installation.backend, installation.traffic = backend, WeightTraffic(backend)
    try:
        backend.install(patches)
        yield backend.graph
    finally:
        patches.undo()
        installation.backend, installation.traffic = own
