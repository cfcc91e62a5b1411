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
    place, patches = run._session.place, Patches()
    own = place.backend, place.traffic
    backend = CudaBackend(run.model, place.parts, place.sparse, make_recorder)
    place.backend, place.traffic = backend, WeightTraffic(backend)
    try:
        backend.install(patches)
        yield backend.graph
    finally:
        patches.undo()
        place.backend, place.traffic = own
